"""orcd-jax: one process, one GPU, one language model, streamed over gRPC."""

__version__ = "0.1.0"
