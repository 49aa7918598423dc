"""A Hugging Face model directory as a source of weights: config.json, safetensors and tokenizer.json.

Nothing in the directory is executed, and no pickle is read: weights in other files than safetensors are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from orcd_jax.checkpoint.convert.huggingface_files import (
    MAX_JSON_BYTES,
    Json,
    check_values,
    read_bytes,
    read_json,
    refuse,
)
from orcd_jax.checkpoint.convert.safetensors_weights import (
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    find_tensors,
    read_tensor,
    same_matrices,
)
from orcd_jax.checkpoint.convert.source import Dtype, model_id_of, shown
from orcd_jax.checkpoint.manifest import TokenizerEntry
from orcd_jax.models.config import LlamaConfig, RopeScaling, WeightDtype
from orcd_jax.tokenizer.token_bytes import tokenizer_kind
from orcd_jax.tokenizer.tokenizer import MAX_FILE_BYTES, TOKENIZER_FILE

MAX_TOKENIZER_VALUES = 3_000_000  # the largest vocabularies, with their merges as pairs, have 1 800 000

Value = TypeVar("Value", int, float, bool, str)

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Settings that change the formulas, and the only value each may have.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "num_local_experts": (0, None),
    "logit_scale": (1, 1.0, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}
_ROPE_KINDS = ("linear", "llama3", "yarn")
_ROPE_KNOWN = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "truncate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSource:
    """Implements ``WeightSource`` over one directory. Reads tensors from their files as they are asked for."""

    format: Literal["safetensors"] = "safetensors"
    config: LlamaConfig
    model_id: str
    tokenizer: TokenizerEntry
    tokenizer_json: bytes
    chat_template: str | None
    tensor_types: tuple[str, ...]
    paths: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    def names(self) -> frozenset[str]:
        """All tensors."""
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[name].shape

    def tensor(self, name: str) -> NDArray[np.generic]:
        """A tensor's exact values: bfloat16 as stored, float16 as float32."""
        values = read_tensor(self.tensors[name], name)
        return values.astype(np.float32) if values.dtype == np.float16 else values


def open_huggingface(directory: Path, dtype: Dtype) -> HuggingFaceSource:
    """Opens a model directory whose architecture is supported.

    Args:
      directory: holds config.json, tokenizer.json and model.safetensors or its shards with their index.
      dtype: of the checkpoint; ``auto`` is bfloat16 when every matrix is BF16 and float32 otherwise, so never rounds.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, naming the file and the field or tensor.
    """
    if not directory.is_dir():
        raise refuse(directory.name, "it is not a directory with config.json, tokenizer.json and safetensors files")
    settings = read_json(directory / "config.json")
    _check_settings(settings)
    tensors = find_tensors(directory)
    matrices = {tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1}
    weights: WeightDtype = "bfloat16" if matrices == {"BF16"} else "float32"
    if dtype != "auto":
        weights = dtype
    config = _config(settings, tensors, weights)
    if config.tied_embeddings and _HEAD in tensors:  # some files repeat the embedding as a head
        shape = (config.vocab_size, config.hidden_size)
        if not same_matrices(tensors, _HEAD, _EMBED, shape):
            raise refuse("config.json", "tie_word_embeddings is true, but lm_head.weight is not the embedding")
        del tensors[_HEAD]
    tokenizer_json = read_bytes(directory / TOKENIZER_FILE, MAX_FILE_BYTES)
    check_values(directory / TOKENIZER_FILE, tokenizer_json, MAX_TOKENIZER_VALUES)
    extra = read_json(directory / "tokenizer_config.json", optional=True)
    generation = read_json(directory / "generation_config.json", optional=True)
    files = {tensor.path for tensor in tensors.values()}
    used = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
    if directory / WEIGHTS_FILE not in files:
        used.append(INDEX_FILE)
    return HuggingFaceSource(
        config=config,
        model_id=model_id_of(directory.resolve().name),
        tokenizer=_tokenizer(tokenizer_json, settings, generation, extra),
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(directory, extra),
        tensor_types=tuple(sorted({tensor.kind for tensor in tensors.values()})),
        paths=(
            *(directory / name for name in used if (directory / name).is_file()),
            *sorted(files),
        ),
        tensors=tensors,
    )


# -- configuration -------------------------------------------------------------------------------------------------


def _check_settings(settings: Json) -> None:
    kind = settings.get("model_type")
    if kind != "llama":
        raise refuse(
            "config.json",
            f"model_type {shown(str(kind))} is not supported; supported is llama "
            "(Llama 2, 3, 3.1, 3.2, SmolLM2 and kin)",
        )
    for key, allowed in _FIXED.items():
        if settings.get(key) not in allowed:
            raise refuse("config.json", f"{key} is {shown(str(settings[key]))}; supported is {allowed[0]}")


def _config(settings: Json, tensors: Mapping[str, StoredTensor], dtype: WeightDtype) -> LlamaConfig:
    heads, hidden = _get(settings, "num_attention_heads", int), _get(settings, "hidden_size", int)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise refuse("config.json", "rope_scaling is not an object")
    theta = _get(rope, "rope_theta", float, _get(settings, "rope_theta", float, 10_000.0))
    if theta <= 1:
        raise refuse("config.json", f"rope_theta is {theta:g}; it must be above 1")
    layers = _get(settings, "num_hidden_layers", int)
    if layers > len(tensors):  # what is planned for each layer is bounded by what the files hold
        raise refuse("config.json", f"num_hidden_layers is more than {len(tensors)} tensors can make")
    head_dim = settings.get("head_dim")
    try:
        return LlamaConfig(
            vocab_size=_get(settings, "vocab_size", int),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_get(settings, "num_key_value_heads", int, heads),
            head_dim=hidden // max(heads, 1) if head_dim is None else _get(settings, "head_dim", int),
            mlp_size=_get(settings, "intermediate_size", int),
            norm_eps=_get(settings, "rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=_rope_scaling(rope),
            tied_embeddings=_get(settings, "tie_word_embeddings", bool, default=False),
            attention_bias=_get(settings, "attention_bias", bool, default=False),
            mlp_bias=_get(settings, "mlp_bias", bool, default=False),
            context_max=_get(settings, "max_position_embeddings", int, 2048),
            dtype=dtype,
        )
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise refuse("config.json", f"{where} cannot be: {first['msg']}") from None


def _rope_scaling(rope: Json) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *_ROPE_KINDS):
        supported = ", ".join(_ROPE_KINDS)
        raise refuse("config.json", f"rope_type {shown(str(kind))} is not supported; supported are {supported}")
    if unknown := sorted(key for key in rope.keys() - _ROPE_KNOWN if rope[key] is not None):
        raise refuse("config.json", f"rope_scaling: {shown(unknown[0])} is not supported")
    if kind == "default":
        return None
    given: dict[str, object] = {"kind": kind, "factor": _get(rope, "factor", float)}
    if rope.get("original_max_position_embeddings") is not None:
        given["original_context"] = _get(rope, "original_max_position_embeddings", int)
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
        if rope.get(name) is not None:
            given[name] = _get(rope, name, float)
    if rope.get("truncate") is not None:
        given["truncate"] = _get(rope, "truncate", bool)
    return RopeScaling.model_validate(given)


# -- tokenizer -----------------------------------------------------------------------------------------------------


def _tokenizer(tokenizer_json: bytes, settings: Json, generation: Json, extra: Json) -> TokenizerEntry:
    vocab_size = _get(settings, "vocab_size", int)
    ends = {
        *_token_ids(settings, "eos_token_id", vocab_size),
        *_token_ids(generation, "eos_token_id", vocab_size, file="generation_config.json"),
    }
    if not ends:
        raise refuse("config.json", "eos_token_id is missing, here and in generation_config.json")
    starts = _token_ids(settings, "bos_token_id", vocab_size)
    add_bos = _get(extra, "add_bos_token", bool, default=False, file="tokenizer_config.json")
    return TokenizerEntry(
        kind=tokenizer_kind(tokenizer_json),
        bos_id=starts[0] if starts else None,
        eos_ids=tuple(sorted(ends)),
        add_bos=add_bos and bool(starts),
    )


def _token_ids(source: Json, key: str, vocab_size: int, *, file: str = "config.json") -> list[int]:
    value = source.get(key)
    given: list[object] = value if isinstance(value, list) else [] if value is None else [value]
    ids = [i for i in given if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size]
    if len(ids) != len(given):
        raise refuse(file, f"{key} must be a token id below {vocab_size}, or a list of such")
    return ids


def _chat_template(directory: Path, extra: Json) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bytes(path, MAX_JSON_BYTES).decode()
        except UnicodeDecodeError:
            raise refuse(path.name, "it is not UTF-8") from None
    value = extra.get("chat_template")
    if isinstance(value, list):  # several, by name
        default = (item for item in value if isinstance(item, dict) and item.get("name") == "default")
        value = next(default, {}).get("template")
    if not isinstance(value, str):
        return None
    if any("\ud800" <= c <= "\udfff" for c in value):  # JSON can hold half a character, UTF-8 cannot
        raise refuse("tokenizer_config.json", "chat_template is not valid Unicode")
    return value


# -- values --------------------------------------------------------------------------------------------------------


def _get(
    source: Json, key: str, kind: type[Value], default: Value | None = None, *, file: str = "config.json"
) -> Value:
    """A value of a JSON object; ``default`` when it is absent or null, unless that is None."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise refuse(file, f"{key} is missing")
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise refuse(file, f"{key} must be of type {kind.__name__}")
    return value
