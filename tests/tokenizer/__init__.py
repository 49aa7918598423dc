"""Tests of orcd_jax.tokenizer."""
