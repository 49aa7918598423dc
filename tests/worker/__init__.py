"""Tests of orcd_jax.worker."""
