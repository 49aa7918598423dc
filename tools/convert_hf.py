#!/usr/bin/env python3
"""Converts a Hugging Face model directory: ``tools/convert_hf.py SOURCE DESTINATION``; see ``--help``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # a conversion needs no GPU and must not take one's memory
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from orcd_jax.checkpoint.convert.command import run
    from orcd_jax.checkpoint.convert.huggingface import open_huggingface
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {missing.name} is not installed for {sys.executable}: use the Python that has orcd-jax's packages"
    )

if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv,
            open_source=open_huggingface,
            source="a Hugging Face model directory (config.json, safetensors, tokenizer.json) of a Llama-style model",
            example="tools/convert_hf.py SmolLM2-135M-Instruct/ smollm2-135m",
        )
    )
