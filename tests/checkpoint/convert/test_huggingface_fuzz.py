"""No Hugging Face directory is too hostile: it opens, or one typed error names the file, quickly."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orcd_jax.checkpoint.convert import safetensors_weights
from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.convert.tiny_huggingface import SETTINGS, weights, write_model

CORPUS = 1_000

Json = dict[str, object]

VALUES: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 256, 2**24 + 1, 2**63, 2**64, 10**400),
    *(0.0, 1.5, 1e-320, 1e308, float("nan"), float("inf")),
    *("", "llama", "x\0", "\x1b[2J\u202e", "\ud800"),
    *([], [1], [256, -1], [True], [[[]]], {}, {"a": 1}),
)
ROPE: tuple[str, ...] = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
)
ROPE += ("high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate", "new\u202e")
MORE = ("rope_scaling", "rope_theta", "attention_bias", "mlp_bias", "sliding_window", "quantization_config")


def config(content: Json, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 4)):
        if rng.random() < 0.4:
            rope: Json = {"rope_type": rng.choice(["linear", "llama3", "yarn", "default"]), "factor": 8.0}
            rope |= {rng.choice(ROPE): rng.choice(VALUES) for _ in range(rng.randrange(3))}
            content[rng.choice(["rope_parameters", "rope_scaling"])] = rope
        else:
            content[rng.choice([*SETTINGS, *MORE])] = rng.choice(VALUES)


def other(content: Json, rng: random.Random) -> None:
    content[rng.choice([*content, "eos_token_id", "chat_template"])] = rng.choice(VALUES)


def tensors(header: Json, rng: random.Random) -> None:
    """Of a safetensors file's header: a name, shape, place or type that cannot be."""
    name = rng.choice(list(header))
    entry = header[name]
    assert isinstance(entry, dict)
    match rng.randrange(5):
        case 0:
            header[rng.choice(["\x1b[2J", "a\0", "\u202e", "", "x" * 70_000, "lm_head.weight"])] = header.pop(name)
        case 1:
            entry["shape"] = rng.choice([[0], [2**63], [2**32, 2**32], [-1], [], ["a"], [1] * 50, None])
        case 2:
            entry["data_offsets"] = rng.choice([[0, 2**63], [5, 1], [-1, 3], [0, 0], [2**64, 2**64], None, [0]])
        case 3:
            entry["dtype"] = rng.choice(["F8_E4M3", "I64", "X", "", None, 1])
        case _:
            header[name] = rng.choice(VALUES)


def changed_json(change: Callable[[Json, random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    def changed(raw: bytes, rng: random.Random) -> bytes:
        content = json.loads(raw)
        change(content, rng)
        return json.dumps(content).encode()

    return changed


def changed_header(raw: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", raw)
    text = changed_json(tensors)(raw[8 : 8 + length], rng)
    told = rng.choice([len(text)] * 6 + [0, 2**63, 2**64 - 1, len(text) + 1])
    return struct.pack("<Q", told) + text + raw[8 + length :]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return rng.choice([raw[: rng.randrange(len(raw) + 1)], b"[" * 100_000, b'{"a":' * 100_000])
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        changed[rng.randrange(min(len(raw), 3_000))] = rng.randrange(256)
    return bytes(changed)


CHANGES: tuple[tuple[str, Callable[[bytes, random.Random], bytes]], ...] = (
    ("config.json", changed_json(config)),
    ("model.safetensors", changed_header),
    ("generation_config.json", changed_json(other)),
    ("tokenizer_config.json", changed_json(other)),
    ("config.json", damaged),
    ("model.safetensors", damaged),
    ("tokenizer.json", damaged),
    ("tokenizer_config.json", damaged),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [256]}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": "x"}))
    return directory


def refusal(model: Path) -> str:
    """What a directory is refused with, in words that can be shown; empty when it opens."""
    try:
        source = open_huggingface(model, "auto")
    except OrcdError as error:
        refused = error
    else:
        leaves(source.config)  # what is planned of it is bounded by what there is
        return ""
    assert refused.code is ErrorCode.MODEL_LOAD_FAILED
    assert refused.field
    for text in (refused.message, refused.field):
        assert text.isprintable()
        assert text.isascii()
        assert len(text) < 400
    return refused.message


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4304")
@pytest.mark.requirement("WORKER-4310")
def test_every_directory_of_the_corpus_opens_or_is_refused(model: Path) -> None:
    whole = {path.name: path.read_bytes() for path in model.iterdir()}
    opened, messages = 0, set()
    for number in range(CORPUS):
        rng = random.Random(number)
        name, change = CHANGES[number % len(CHANGES)]
        (model / name).write_bytes(change(whole[name], rng))
        before = time.process_time()
        message = refusal(model)
        assert time.process_time() - before < 3, number
        assert not message or any(file in message for file in [*whole, "directory"]), message
        (model / name).write_bytes(whole[name])
        opened += not message
        messages.add(message[:60])
    assert CORPUS // 20 < opened < CORPUS // 2
    assert len(messages) > 30


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_hidden_layers": 2**24}, "num_hidden_layers is more than 12 tensors can make"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is more than 12 tensors can make"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta is 1; it must be above 1"),
    ],
)
@pytest.mark.requirement("WORKER-4312")
def test_a_setting_that_asks_too_much_is_refused(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    assert problem in refusal(write_model(tmp_path / "m", **settings))


@pytest.mark.parametrize("name", ["\x1b[2J", "a b", "\u202e", "a\0", "é", "x" * 257])
@pytest.mark.requirement("WORKER-4304")
def test_a_tensors_name_is_a_name(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "m", weights() | {name: np.zeros(1, np.float32)})
    assert "a name is 1 to 256 of A-Z a-z 0-9 _ . -" in refusal(model)


@pytest.mark.requirement("WORKER-4310")
def test_there_are_no_more_tensors_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert safetensors_weights.MAX_TENSORS == 10_000
    model = write_model(tmp_path / "m")
    monkeypatch.setattr(safetensors_weights, "MAX_TENSORS", len(weights()))
    assert refusal(model) == ""
    monkeypatch.setattr(safetensors_weights, "MAX_TENSORS", len(weights()) - 1)
    assert f"there are more than {len(weights()) - 1} tensors" in refusal(model)
