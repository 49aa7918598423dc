"""Tests of orcd_jax.kernels."""
