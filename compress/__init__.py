"""Compression: pure functions on `{path: array}` with statistics in and a coverage report out."""
