"""Tests of orcd_jax.engine."""
