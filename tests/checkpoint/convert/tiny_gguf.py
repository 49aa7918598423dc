"""Tiny GGUF files: whole models written by the ``gguf`` package, and raw headers written byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 32, 2, 4, 2, 8, 64
BYTE_TOKENS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The GPT-2 byte alphabet in full (188 printable, 68 shifted), a few merges, three control tokens.
ALPHABET = BYTE_TOKENS + [chr(256 + n) for n in range(68)]
MERGED = ["th", "the", "Ġthe", "in"]
TOKENS = SPECIAL + ALPHABET + MERGED
MERGES = ["t h", "th e", "Ġ the", "i n"]


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random arrays under ggml's names; q and k already in ggml's order."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    out = {"token_embd.weight": normal(len(TOKENS), HIDDEN), "output_norm.weight": 1 + normal(HIDDEN)}
    for i in range(LAYERS):
        out |= {
            f"blk.{i}.attn_norm.weight": 1 + normal(HIDDEN),
            f"blk.{i}.attn_q.weight": normal(HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm.weight": 1 + normal(HIDDEN),
            f"blk.{i}.ffn_gate.weight": normal(MLP, HIDDEN),
            f"blk.{i}.ffn_up.weight": normal(MLP, HIDDEN),
            f"blk.{i}.ffn_down.weight": normal(HIDDEN, MLP),
        }
    return out


def write_model(
    path: Path,
    tensors: dict[str, NDArray[np.float32]] | None = None,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    pre: str = "smollm",
    quantize: str | None = None,
    extra: dict[str, int | float | str] | None = None,
) -> Path:
    """Writes a whole model, matrices quantised to a ggml type when asked."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny Test")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, array in (tensors or weights()).items():
        if quantize is not None and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantize]
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str | bytes) -> bytes:
    """A GGUF string: its length, then its bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def header(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int = 0,
    n_metadata: int = 0,
    body: bytes = b"",
) -> bytes:
    """A file's first bytes, with whatever follows the counts."""
    return magic + struct.pack("<IQQ", version, n_tensors, n_metadata) + body


def tensor_info(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """One entry of the tensor table."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def array(element: int, count: int, raw: bytes = b"") -> bytes:
    """An array value: its type, its element type, its length, its elements."""
    return struct.pack("<IIQ", 9, element, count) + raw
