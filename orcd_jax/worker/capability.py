"""Can this worker run a model? Its capabilities (ECP), derived from the code, against the model's needs (MCD)."""

from __future__ import annotations

from dataclasses import dataclass

from orcd_jax.checkpoint.manifest import ModelCapabilities
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import ATTENTION, MODELS, POSITIONAL
from orcd_jax.tokenizer.token_bytes import TOKENIZER_KINDS

QUANT = ("none",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supported:
    """What the code in this worker can run, whatever the device."""

    architectures: tuple[str, ...] = tuple(sorted(MODELS))
    positional: tuple[str, ...] = POSITIONAL
    attention: tuple[str, ...] = ATTENTION
    quant: tuple[str, ...] = QUANT
    tokenizers: tuple[str, ...] = TOKENIZER_KINDS


SUPPORTED = Supported()


def check_capabilities(model: ModelCapabilities) -> None:
    """Raises CAPABILITY_MISMATCH listing every mismatch at once (WORKER-4620); silent when the model can run."""
    wants = (
        ("architecture", model.architecture, SUPPORTED.architectures),
        ("positional", model.positional, SUPPORTED.positional),
        ("attention", model.attention, SUPPORTED.attention),
        ("quant", model.quant, SUPPORTED.quant),
        ("tokenizer", model.tokenizer, SUPPORTED.tokenizers),
    )
    missing = [
        f"requires {name} {wanted:.64}; this worker has {', '.join(offered)}"
        for name, wanted, offered in wants
        if wanted not in offered
    ]
    if missing:
        raise OrcdError(ErrorCode.CAPABILITY_MISMATCH, "; ".join(missing), field="model")
