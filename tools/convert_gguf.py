#!/usr/bin/env python3
"""Converts a GGUF file into a checkpoint directory: ``tools/convert_gguf.py SOURCE DESTINATION``; see ``--help``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # a conversion needs no GPU and must not take one's memory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from orcd_jax.checkpoint.convert.command import run
    from orcd_jax.checkpoint.convert.gguf import open_gguf
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {missing.name} is not installed for {sys.executable}: use the Python that has orcd-jax's packages"
    )

if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv,
            open_source=open_gguf,
            source="a GGUF file of a Llama-style model",
            example="tools/convert_gguf.py --dtype=bfloat16 SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m",
        )
    )
