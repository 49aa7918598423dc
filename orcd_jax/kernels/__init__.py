"""Device kernels: each a reference in plain JAX and, where it pays, a GPU kernel beside it."""
