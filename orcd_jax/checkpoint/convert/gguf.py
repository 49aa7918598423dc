"""A GGUF file as a source of weights: its configuration, tokenizer and tensors under Hugging Face's names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from orcd_jax.checkpoint.convert.gguf_blocks import dequantize
from orcd_jax.checkpoint.convert.gguf_metadata import GgufValue, Strings
from orcd_jax.checkpoint.convert.gguf_reader import GgufFile, read_gguf
from orcd_jax.checkpoint.convert.gguf_tokenizer import build_tokenizer
from orcd_jax.checkpoint.convert.source import Dtype, model_id_of, shown
from orcd_jax.checkpoint.manifest import TokenizerEntry
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.config import LlamaConfig, RopeScaling, WeightDtype
from orcd_jax.models.rope import inverse_frequencies

Value = TypeVar("Value", int, float, str)

_ROPE_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys of the architecture that are read or change nothing; any other may change the formulas and is refused.
_KNOWN_KEYS = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """Implements ``WeightSource`` over one GGUF file. Reads tensors from the file as they are asked for."""

    format: Literal["gguf"] = "gguf"
    file: GgufFile
    config: LlamaConfig
    model_id: str
    tokenizer: TokenizerEntry
    tokenizer_json: bytes
    chat_template: str | None
    tensor_types: tuple[str, ...]
    paths: tuple[Path, ...]
    gguf_names: Mapping[str, str]

    def names(self) -> frozenset[str]:
        """All tensors, by Hugging Face name."""
        return frozenset(self.gguf_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, ``[out, in]`` for a matrix."""
        return self.file.tensors[self.gguf_names[name]].shape

    def tensor(self, name: str) -> NDArray[np.generic]:
        """A tensor's exact values: bfloat16 as stored, everything else as float32."""
        entry = self.file.tensors[self.gguf_names[name]]
        raw = self.file.blocks(entry.name)
        values: NDArray[np.generic]
        if entry.type == "BF16":
            values = raw.view(ml_dtypes.bfloat16).reshape(entry.shape)
        else:
            values = dequantize(entry.type, raw, entry.shape)
        for part, heads in (("q_proj", self.config.num_heads), ("k_proj", self.config.num_kv_heads)):
            if f".self_attn.{part}." in name:
                return _half_split(values, heads)
        return values


def open_gguf(path: Path, dtype: Dtype) -> GgufSource:
    """Opens a GGUF file whose architecture is supported.

    Args:
      path: the file.
      dtype: of the checkpoint; ``auto`` is bfloat16 when every matrix is BF16 and float32 otherwise, so never rounds.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, naming the field or tensor.
    """
    file = read_gguf(path)
    architecture = _get(file.metadata, "general.architecture", str)
    if architecture != "llama":
        raise _refuse(
            "general.architecture",
            f"{shown(architecture)} is not supported; supported is llama (Llama 2, 3, 3.1, 3.2, SmolLM2 and kin)",
        )
    gguf_names = {hf: name for name in file.tensors if (hf := _hf_name(name)) is not None}
    matrices = {t.type for t in file.tensors.values() if len(t.shape) > 1}
    weights: WeightDtype = "bfloat16" if matrices == {"BF16"} else "float32"
    if dtype != "auto":
        weights = dtype
    config = _config(file, gguf_names, weights)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Strings) and len(tokens) != config.vocab_size:  # before a tokenizer is built of them
        raise _refuse("token_embd.weight", f"its {config.vocab_size} rows are not one for each token")
    tokenizer_json, tokenizer = build_tokenizer(file.metadata)
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise _refuse("tokenizer.chat_template", "it must be of type str")
    return GgufSource(
        file=file,
        config=config,
        model_id=_model_id(file),
        tokenizer=tokenizer,
        tokenizer_json=tokenizer_json,
        chat_template=template,
        tensor_types=tuple(sorted({t.type for t in file.tensors.values()})),
        paths=(path,),
        gguf_names=gguf_names,
    )


def _hf_name(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None for one that is not a weight. Unknown ones are refused."""
    if name == _ROPE_FACTORS:
        return None
    if match := re.fullmatch(r"(\w+)\.weight", name):
        if match[1] in _TOP:
            return f"{_TOP[match[1]]}.weight"
    elif (match := re.fullmatch(r"blk\.(0|[1-9][0-9]{0,3})\.(\w+)\.(weight|bias)", name)) and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    raise _refuse("tensors", f"{shown(name)} is not part of a llama model; nothing is dropped silently")


def _config(file: GgufFile, names: Mapping[str, str], dtype: WeightDtype) -> LlamaConfig:
    meta = file.metadata
    unknown = sorted(
        key for key in meta if key.startswith("llama.") and key[6:] not in _KNOWN_KEYS and not _is_off(key, meta[key])
    )
    if unknown:
        raise _refuse(shown(unknown[0]), "this setting is not supported and may change the model's formulas")
    heads = _get(meta, "llama.attention.head_count", int)
    hidden = _get(meta, "llama.embedding_length", int)
    head_dim = _get(meta, "llama.attention.key_length", int, hidden // max(heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _get(meta, key, int, head_dim) != head_dim:
            raise _refuse(
                key, f"it differs from head_dim {head_dim}; partial rotation and unequal heads are not supported"
            )
    if "model.embed_tokens.weight" not in names:
        raise _refuse("tensors", "token_embd.weight is missing")
    layers = _get(meta, "llama.block_count", int)
    if layers > len(names):  # what is planned for each layer is bounded by what the file holds
        raise _refuse("llama.block_count", f"{layers} layers cannot be made of {len(names)} tensors")
    theta = _short(_get(meta, "llama.rope.freq_base", float, 10_000.0))
    if theta <= 1:
        raise _refuse("llama.rope.freq_base", f"{theta:g} must be above 1")
    try:
        plain = LlamaConfig(
            vocab_size=file.tensors[names["model.embed_tokens.weight"]].shape[0],
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_get(meta, "llama.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            mlp_size=_get(meta, "llama.feed_forward_length", int),
            norm_eps=_short(_get(meta, "llama.attention.layer_norm_rms_epsilon", float)),
            rope_theta=theta,
            tied_embeddings="lm_head.weight" not in names,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in names,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in names,
            context_max=_get(meta, "llama.context_length", int),
            dtype=dtype,
        )
        return plain.model_copy(update={"rope_scaling": _rope_scaling(file, plain)})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "llama"
        raise _refuse(where, f"the configuration cannot be: {first['msg']}") from None


def _is_off(key: str, value: GgufValue) -> bool:
    """Whether an unknown setting is a count or switch that is off."""
    return key.startswith("llama.expert") and isinstance(value, int | float) and value == 0


def _rope_scaling(file: GgufFile, config: LlamaConfig) -> RopeScaling | None:
    meta = file.metadata
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    kind = _get(meta, "llama.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    factor = _short(_get(meta, "llama.rope.scaling.factor", float))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        context = _get(meta, "llama.rope.scaling.original_context_length", int)
        plain = RopeScaling(kind="yarn", factor=factor, original_context=context)  # refuses a factor without logarithm
        scale = _short(_get(meta, "llama.rope.scaling.attn_factor", float, 1.0))
        if scale == 1.0:
            return plain
        return RopeScaling(**dict(plain) | {"attention_factor": scale * (0.1 * math.log(factor) + 1.0)})
    raise _refuse("llama.rope.scaling.type", f"{shown(kind)} is not supported; supported are none, linear, yarn")


def _llama3_scaling(file: GgufFile, config: LlamaConfig) -> RopeScaling:
    """The parameters behind a table of divisors: those of Llama 3.1 (factor 8) or 3.2 (factor 32)."""
    tensor = file.tensors[_ROPE_FACTORS]
    if tensor.shape != (config.head_dim // 2,):
        raise _refuse(_ROPE_FACTORS, f"its shape {tensor.shape} is not ({config.head_dim // 2},)")
    stored = dequantize(tensor.type, file.blocks(_ROPE_FACTORS), tensor.shape)
    plain, _ = inverse_frequencies(config)
    for factor in (8.0, 32.0):
        scaling = RopeScaling(kind="llama3", factor=factor, original_context=8192)
        scaled, _ = inverse_frequencies(config.model_copy(update={"rope_scaling": scaling}))
        if np.allclose(stored, plain / scaled, rtol=1e-4, atol=0):
            return scaling
    raise _refuse(_ROPE_FACTORS, "its divisors are not those of a known Llama 3 scaling (factor 8 or 32 over 8192)")


def _half_split(values: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Undoes ggml's order of rotary pairs: rows (pair, half) of each head become (half, pair)."""
    rest = values.shape[1:]
    return np.ascontiguousarray(values.reshape(heads, -1, 2, *rest).swapaxes(1, 2)).reshape(values.shape)


def _get(meta: Mapping[str, GgufValue], key: str, kind: type[Value], default: Value | None = None) -> Value:
    """A value of the metadata; ``default`` when it is absent, unless that is None."""
    value = meta.get(key, default)
    if value is None:
        raise _refuse(key, "it is missing")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _refuse(key, f"it must be of type {kind.__name__}")
    return value


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was written as 1e-05."""
    with np.errstate(over="ignore"):  # an infinity is refused as what it is
        return float(str(np.float32(value)))


def _model_id(file: GgufFile) -> str:
    name = file.metadata.get("general.name")
    return model_id_of(name if isinstance(name, str) and name.strip() else file.path.stem)


def _refuse(field: str, problem: str) -> OrcdError:
    return OrcdError(
        ErrorCode.MODEL_LOAD_FAILED, f"the GGUF model cannot be converted: {field}: {problem}", field=field
    )
