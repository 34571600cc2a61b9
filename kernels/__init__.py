"""Kernels: arrays in, arrays out; one folder per op, one file per implementation. Imports jax and numpy alone."""
