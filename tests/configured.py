"""A valid configuration, with flags added."""

from __future__ import annotations

from orcd_jax.command_line import parse
from orcd_jax.config import WorkerConfig

REQUIRED = (
    "--worker_id=w1",
    "--pool_id=p1",
    "--model_path=/models/tiny",
    "--rpc_port=50051",
    "--api_token_file=/run/token",
)


def parsed(*given: str) -> WorkerConfig:
    config = parse(["orcd-worker", *REQUIRED, *given])
    assert config is not None
    return config
