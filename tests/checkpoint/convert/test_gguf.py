"""A GGUF model as a source: configuration, tokenizer, and tensors in Hugging Face's order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from orcd_jax.checkpoint.convert.gguf import open_gguf
from orcd_jax.checkpoint.manifest import TokenizerEntry
from orcd_jax.errors import OrcdError
from orcd_jax.models.config import RopeScaling
from orcd_jax.models.rope import inverse_frequencies
from tests.checkpoint.convert.tiny_gguf import HEAD_DIM, HEADS, KV_HEADS, TOKENS, weights, write_model
from tests.checkpoint.damages import replaced


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """What the published converters do to q and k: half-split rows to interleaved pairs."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def test_the_configuration_is_read_from_the_metadata(tmp_path: Path) -> None:
    source = open_gguf(write_model(tmp_path / "m.gguf"), "auto")
    config = source.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert (config.hidden_size, config.mlp_size, config.vocab_size) == (32, 64, len(TOKENS))
    assert (config.norm_eps, config.rope_theta, config.context_max) == (1e-5, 10_000.0, 512)
    assert config.tied_embeddings
    assert config.rope_scaling is None
    assert source.model_id == "Tiny-Test"
    assert source.tensor_types == ("F32",)


def test_queries_and_keys_come_back_in_half_split_order(tmp_path: Path) -> None:
    tensors = weights()
    q, k = tensors["blk.1.attn_q.weight"], tensors["blk.1.attn_k.weight"]
    stored = tensors | {"blk.1.attn_q.weight": permute(q, HEADS), "blk.1.attn_k.weight": permute(k, KV_HEADS)}
    source = open_gguf(write_model(tmp_path / "m.gguf", stored), "auto")
    np.testing.assert_array_equal(source.tensor("model.layers.1.self_attn.q_proj.weight"), q)
    np.testing.assert_array_equal(source.tensor("model.layers.1.self_attn.k_proj.weight"), k)
    np.testing.assert_array_equal(
        source.tensor("model.layers.1.self_attn.v_proj.weight"), stored["blk.1.attn_v.weight"]
    )


def test_every_weight_has_its_hugging_face_name(tmp_path: Path) -> None:
    source = open_gguf(write_model(tmp_path / "m.gguf"), "auto")
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    expected |= {f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts}
    assert source.names() == expected


@pytest.mark.parametrize(
    ("quantize", "dtype", "stored"),
    [
        (None, "auto", "float32"),
        ("F16", "auto", "float32"),
        ("Q8_0", "auto", "float32"),
        ("BF16", "auto", "bfloat16"),
        ("BF16", "float32", "float32"),
        ("Q8_0", "bfloat16", "bfloat16"),
    ],
)
def test_auto_never_rounds(tmp_path: Path, quantize: str | None, dtype: str, stored: str) -> None:
    source = open_gguf(write_model(tmp_path / "m.gguf", quantize=quantize), dtype)  # type: ignore[arg-type]
    assert source.config.dtype == stored


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_recovered_from_its_table(tmp_path: Path, factor: float) -> None:
    plain = open_gguf(write_model(tmp_path / "m.gguf"), "auto").config
    scaling = RopeScaling(kind="llama3", factor=factor, original_context=8192)
    scaled = inverse_frequencies(plain.model_copy(update={"rope_scaling": scaling}))[0]
    table = (inverse_frequencies(plain)[0] / scaled).astype(np.float32)
    assert (table > 1).any()
    source = open_gguf(write_model(tmp_path / "s.gguf", weights() | {"rope_freqs.weight": table}), "auto")
    assert source.config.rope_scaling == scaling
    assert "rope_freqs.weight" not in source.names()


def test_an_unknown_scaling_table_is_refused(tmp_path: Path) -> None:
    table = np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)
    path = write_model(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": table})
    with pytest.raises(OrcdError, match="not those of a known Llama 3 scaling"):
        open_gguf(path, "auto")


def test_yarn_and_linear_scaling_are_read(tmp_path: Path) -> None:
    extra: dict[str, int | float | str] = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
    }
    yarn = open_gguf(write_model(tmp_path / "y.gguf", extra=extra), "auto").config.rope_scaling
    assert yarn == RopeScaling(kind="yarn", factor=4.0, original_context=128)
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    linear = open_gguf(write_model(tmp_path / "l.gguf", extra=extra), "auto").config.rope_scaling
    assert linear == RopeScaling(kind="linear", factor=2.0)


def test_the_tokenizer_round_trips_and_knows_its_special_tokens(tmp_path: Path) -> None:
    source = open_gguf(write_model(tmp_path / "m.gguf"), "auto")
    assert source.tokenizer == TokenizerEntry(kind="bpe_byte_level", bos_id=1, eos_ids=(2,), add_bos=False)
    tokenizer = Tokenizer.from_str(source.tokenizer_json.decode())
    sample = "<|im_start|>in the 42 naïve 👩‍💻\n\n  the<|im_end|>"
    ids = tokenizer.encode(sample).ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert TOKENS.index("Ġthe") in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == sample
    assert source.chat_template is not None


def test_a_family_that_begins_with_bos_says_so(tmp_path: Path) -> None:
    assert open_gguf(write_model(tmp_path / "m.gguf", pre="llama-bpe"), "auto").tokenizer.add_bos


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, path.stat().st_size - 64),
        replaced(os.mkfifo),
        Path.unlink,
    ],
    ids=["cut short", "a pipe", "gone"],
)
@pytest.mark.requirement("WORKER-4310")
def test_a_file_that_changes_after_it_was_opened_is_one_error(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """Mapped into memory, a file that is cut short would end the process."""
    source = open_gguf(write_model(tmp_path / "m.gguf"), "auto")
    change(tmp_path / "m.gguf")
    last = max(source.file.tensors.values(), key=lambda tensor: tensor.offset).name
    name = next(name for name, stored in source.gguf_names.items() if stored == last)
    with pytest.raises(OrcdError, match=f"cannot be read any more: {last}: .*: did the file change"):
        source.tensor(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "general.architecture: mamba is not supported; supported is llama"),
        ({"tokenizer": False}, "tokenizer.ggml.model: the file has no such text"),
        ({"pre": "mystery"}, "tokenizer.ggml.pre: mystery is not supported; supported are gpt-2"),
        ({"extra": {"llama.expert_count": 8}}, "llama.expert_count: this setting is not supported"),
        ({"extra": {"llama.attention.sliding_window": 64}}, "llama.attention.sliding_window: this setting"),
        ({"extra": {"llama.rope.dimension_count": 4}}, "partial rotation"),
        ({"extra": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}}, "longrope is not supp"),
        ({"tensors": weights() | {"blk.0.surprise.weight": np.zeros(4, np.float32)}}, "blk.0.surprise.weight is not"),
        ({"tensors": {"output_norm.weight": np.zeros(4, np.float32)}}, "token_embd.weight is missing"),
    ],
)
@pytest.mark.requirement("WORKER-4310")
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(OrcdError, match=message):
        open_gguf(write_model(tmp_path / "m.gguf", **options), "auto")  # type: ignore[arg-type]
