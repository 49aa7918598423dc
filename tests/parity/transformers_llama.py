"""Tiny loud Llamas built by ``transformers``: the independent implementation that ours is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orcd_jax.models.config import LlamaConfig, RopeScaling, WeightDtype
from orcd_jax.models.rope import inverse_frequencies

_quiet: Callable[[], None] = transformers.utils.logging.disable_progress_bar
_quiet()

# Sizes are all different, so that no two axes can be mistaken for one another; the vocabulary is odd.
BASE = LlamaConfig(
    vocab_size=263,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=44,
    norm_eps=0.02,
    rope_theta=100.0,
    tied_embeddings=False,
    context_max=128,
    dtype="float32",
)
LINEAR = RopeScaling(kind="linear", factor=2.5)
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_context=32, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=32, beta_fast=4.0, beta_slow=0.5)


def variant(**changes: object) -> LlamaConfig:
    """``BASE`` with some fields changed, validated again."""
    return LlamaConfig.model_validate({**dict(BASE), **changes})


VARIANTS: dict[str, LlamaConfig] = {
    "one_kv_head": variant(num_kv_heads=1),
    "two_kv_heads": BASE,
    "all_kv_heads": variant(num_kv_heads=4),
    "tied": variant(tied_embeddings=True),
    "wide_heads": variant(head_dim=20),
    "narrow_heads": variant(head_dim=4, vocab_size=257),
    "attention_bias": variant(attention_bias=True),
    "mlp_bias": variant(mlp_bias=True),
    "both_biases_tied_one_kv_head": variant(attention_bias=True, mlp_bias=True, tied_embeddings=True, num_kv_heads=1),
    "rope_linear": variant(rope_scaling=LINEAR),
    "rope_llama3": variant(head_dim=16, rope_scaling=LLAMA3),
    "rope_yarn": variant(head_dim=16, rope_scaling=YARN),
    "rope_yarn_untruncated": variant(head_dim=16, rope_scaling=YARN.model_copy(update={"truncate": False})),
    "rope_yarn_own_factor": variant(head_dim=16, rope_scaling=YARN.model_copy(update={"attention_factor": 0.6})),
}
"""Every scaled variant's original context is shorter than the sequences compared."""


def transformers_config(config: LlamaConfig) -> transformers.LlamaConfig:
    """The same model in transformers' words."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope.update(rope_type=scaling.kind, factor=scaling.factor)
        if scaling.original_context is not None:
            rope["original_max_position_embeddings"] = scaling.original_context
        if scaling.kind == "llama3":
            rope.update(low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor)
        if scaling.kind == "yarn":
            rope.update(beta_fast=scaling.beta_fast, beta_slow=scaling.beta_slow, truncate=scaling.truncate)
            if scaling.attention_factor is not None:
                rope["attention_factor"] = scaling.attention_factor
    return transformers.LlamaConfig.from_dict(
        {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.mlp_size,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": config.tied_embeddings,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "max_position_embeddings": config.context_max,
            "bos_token_id": 256,
            "eos_token_id": 256,
            "architectures": ["LlamaForCausalLM"],
            "dtype": config.dtype,
        }
    )


def save_loud_model(config: LlamaConfig, directory: Path, seed: int = 0) -> None:
    """Writes config.json, model.safetensors and a byte-level tokenizer.json of a random model.

    Weights and biases have a standard deviation of 0.3, norms are spread around 1: with transformers' own
    initialisation (0.02, ones, zeros) most mistakes would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers_config(config))
    torch.nn.Module.to(model, dtype=getattr(torch, config.dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(values + 1.0 if name.endswith("norm.weight") else values)
    model.save_pretrained(directory)
    save_tokenizer(directory)


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and one special token."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))


def load(directory: Path, dtype: WeightDtype) -> transformers.LlamaForCausalLM:
    """The saved model, in transformers. Rotary frequencies stay float32, as in its own practice."""
    model = transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
    )
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model


@torch.no_grad()
def logits(model: transformers.LlamaForCausalLM, tokens: Sequence[int]) -> NDArray[np.float32]:
    """``[T, vocab]`` float32 logits of one sequence."""
    out = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return np.asarray(out.float().numpy(), np.float32)


def placed(model: transformers.LlamaForCausalLM, config: LlamaConfig) -> dict[str, NDArray[np.generic]]:
    """The model's weights in device layout, placed by hand from the layout's definition, without our converter."""
    weights = {name: _numpy(value) for name, value in model.state_dict().items()}
    kv, group, size, hidden = config.num_kv_heads, config.query_heads_per_kv, config.head_dim, config.hidden_size
    params: dict[str, NDArray[np.generic]] = {
        "embed": weights["model.embed_tokens.weight"],
        "norm": weights["model.norm.weight"],
        "rope_frequencies": inverse_frequencies(config)[0],
    }
    if not config.tied_embeddings:
        params["head"] = weights["lm_head.weight"]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        params[f"{ours}.attention.norm"] = weights[f"{theirs}.input_layernorm.weight"]
        params[f"{ours}.mlp.norm"] = weights[f"{theirs}.post_attention_layernorm.weight"]
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            if kind == "weight" or config.attention_bias:
                q, k, v = (_heads(weights[f"{attention}.{p}_proj.{kind}"], size) for p in "qkv")
                qkv = [np.concatenate([*q[i * group : (i + 1) * group], k[i], v[i]]) for i in range(kv)]
                params[f"{ours}.attention.qkv{suffix}"] = np.stack(qkv)
            if kind == "weight" or config.mlp_bias:
                gate_up = [weights[f"{mlp}.{p}_proj.{kind}"] for p in ("gate", "up")]
                params[f"{ours}.mlp.gate_up{suffix}"] = np.stack(gate_up)
        out = weights[f"{attention}.o_proj.weight"].T
        params[f"{ours}.attention.out"] = np.ascontiguousarray(out).reshape(kv, group * size, hidden)
        params[f"{ours}.mlp.down"] = np.ascontiguousarray(weights[f"{mlp}.down_proj.weight"].T)
        if config.attention_bias:
            params[f"{ours}.attention.out_bias"] = weights[f"{attention}.o_proj.bias"]
        if config.mlp_bias:
            params[f"{ours}.mlp.down_bias"] = weights[f"{mlp}.down_proj.bias"]
    return params


def _heads(weight: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    return weight.reshape(-1, size, *weight.shape[1:])


def _numpy(value: torch.Tensor) -> NDArray[np.generic]:
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
