"""The real model's fixtures, for this folder."""

from __future__ import annotations

from tests.real_model import smollm2_checkpoint, smollm2_checkpoints, smollm2_gguf

__all__ = ["smollm2_checkpoint", "smollm2_checkpoints", "smollm2_gguf"]
