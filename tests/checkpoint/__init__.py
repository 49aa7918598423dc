"""Tests of orcd_jax.checkpoint."""
