"""What every converter reads from: a configuration, a tokenizer, and tensors under Hugging Face's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from orcd_jax.checkpoint.manifest import TokenizerEntry
from orcd_jax.models.config import LlamaConfig

Dtype = Literal["auto", "float32", "bfloat16"]
"""What ``--dtype`` takes; ``auto`` never rounds."""


class WeightSource(Protocol):
    """A model in a foreign format, read one tensor at a time.

    Names are ``model.embed_tokens.weight``, ``model.layers.N.self_attn.q_proj.weight``, … ``lm_head.weight``;
    matrices are ``[out, in]``; rotary pairs are half-split, as Hugging Face stores them.
    """

    @property
    def format(self) -> Literal["gguf", "safetensors"]: ...

    @property
    def config(self) -> LlamaConfig:
        """The model; its dtype is that of the checkpoint to be written."""
        ...

    @property
    def model_id(self) -> str: ...

    @property
    def tokenizer(self) -> TokenizerEntry: ...

    @property
    def tokenizer_json(self) -> bytes:
        """The content of ``tokenizer.json``."""
        ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def tensor_types(self) -> tuple[str, ...]:
        """How the source encodes its tensors, sorted."""
        ...

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files read; hashed for provenance."""
        ...

    def names(self) -> frozenset[str]:
        """All tensors. Each must end up in the checkpoint: none is dropped silently."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> NDArray[np.generic]:
        """A tensor's exact values: float32 or ``ml_dtypes.bfloat16``."""
        ...


def model_id_of(name: str) -> str:
    """A model id made of a name that somebody chose: what a model reference may not hold becomes ``-``."""
    return re.sub(r"[^A-Za-z0-9\-_/:.@=]+", "-", name.strip())[:512].strip("-") or "model"


def shown(text: str) -> str:
    """Text of an untrusted file, safe to show: printable ASCII, short."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:80])
