"""Tests of orcd_jax.models."""
