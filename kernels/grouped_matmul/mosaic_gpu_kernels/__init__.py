"""The grouped matmul for Hopper GPUs in Pallas Mosaic GPU: one kernel, one file, and how JAX calls them."""
