"""The grouped matmul in Triton: kernels, plain and packed, the tiles they get, and how JAX calls them."""
