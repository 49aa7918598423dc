"""Tiny Hugging Face model directories, every byte of the weights written here."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.checkpoint.tiny import config, random_weights

CONFIG = config(vocab_size=263)
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "float64": "F64"}
SETTINGS: dict[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 263,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 12,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}

Weights = Mapping[str, NDArray[np.generic]]


def weights(dtype: str = "float32", **changes: object) -> dict[str, NDArray[np.generic]]:
    """Random weights of the model, all of one dtype."""
    made = random_weights(config(vocab_size=263, **changes))
    return {name: array.astype(dtype) for name, array in made.items()}


def safetensors(tensors: Weights) -> bytes:
    """The format: the header's length, the header, the data."""
    header: dict[str, object] = {}
    data = b""
    for name, array in tensors.items():
        raw = array.tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": TYPES[array.dtype.name], "shape": array.shape, "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tokenizer_json() -> bytes:
    """A byte-level tokenizer without merges: 256 bytes and one special token."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    text: str = tokenizer.to_str()
    return text.encode()


def write_model(
    directory: Path, tensors: Weights | None = None, *, without: tuple[str, ...] = (), **settings: object
) -> Path:
    """Writes config.json, tokenizer.json and model.safetensors.

    Args:
      directory: is made.
      tensors: the weights, random float32 ones by default.
      without: settings to leave out.
      settings: others than ``SETTINGS``.
    """
    directory.mkdir(parents=True)
    told = {key: value for key, value in (SETTINGS | settings).items() if key not in without}
    (directory / "config.json").write_text(json.dumps(told))
    (directory / "tokenizer.json").write_bytes(tokenizer_json())
    (directory / "model.safetensors").write_bytes(safetensors(tensors or weights()))
    return directory


def split(directory: Path, files: int) -> dict[str, str]:
    """Turns ``model.safetensors`` into shards and their index; which file each tensor is in."""
    raw = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = sorted(header)
    places = {}
    for number in range(files):
        shard, content = {}, b""
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        for name in names[number::files]:
            start, end = header[name]["data_offsets"]
            shard[name] = header[name] | {"data_offsets": [len(content), len(content) + end - start]}
            content += data[start:end]
            places[name] = file
        text = json.dumps(shard).encode()
        (directory / file).write_bytes(struct.pack("<Q", len(text)) + text + content)
    (directory / "model.safetensors").unlink()
    write_index(directory, places)
    return places


def write_index(directory: Path, places: object) -> None:
    """Writes the index of shards."""
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_extra(directory: Path, name: str = "tokenizer_config.json", **settings: object) -> Path:
    """Writes a file of further settings beside the model."""
    (directory / name).write_text(json.dumps(settings))
    return directory
