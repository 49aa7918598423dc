"""Tests of orcd_jax.device."""
