"""The tiny model's fixture, for this folder."""

from __future__ import annotations

from tests.tiny_checkpoint import tiny_checkpoint

__all__ = ["tiny_checkpoint"]
