"""Weights of a Hugging Face model: safetensors, whole, in the same folder; anything else is one error."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from orcd_jax.checkpoint.convert import safetensors_weights
from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from tests.checkpoint.convert.refusals import opening_refusal
from tests.checkpoint.convert.tiny_huggingface import (
    safetensors,
    split,
    weights,
    write_index,
    write_model,
)


def test_a_directory_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").unlink()
    assert opening_refusal(tmp_path / "m") == "m: it has neither model.safetensors nor model.safetensors.index.json"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_not_read_and_the_message_says_why(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").rename(tmp_path / "m" / name)
    assert f"{name} is a pickle, which may run code: save it as safetensors" in opening_refusal(tmp_path / "m")


def header(value: object, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "a length cut short": b"\0\0\0",
    "a length of nothing": struct.pack("<Q", 0),
    "a length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "a length of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length of -8": struct.pack("<q", -8) + b"{}",
    "no JSON": header(b"not JSON"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "deep nesting": header(b'{"a":' * 50_000),
    "a list": header([]),
    "offsets beyond the data": header({"a": entry([4], 0, 16)}, b"\0" * 8),
    "offsets of 2^63": header({"a": entry([4], 2**63, 2**63 + 16)}, b"\0" * 16),
    "offsets backwards": header({"a": entry([4], 16, 0)}, b"\0" * 16),
    "a negative offset": header({"a": entry([4], -16, 0)}, b"\0" * 16),
    "a shape that overflows": header({"a": entry([2**40, 2**40], 0, 16)}, b"\0" * 16),
    "a shape of other bytes": header({"a": entry([5], 0, 16)}, b"\0" * 16),
    "tensors that overlap": header({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, b"\0" * 24),
    "a hole": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "data that belongs to nothing": header({"a": entry([1], 0, 4)}, b"\0" * 8),
    "an unknown type": header({"a": entry([4], 0, 16, "F7")}, b"\0" * 16),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.requirement("WORKER-4310")
def test_a_hostile_header_is_one_error(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").write_bytes(HOSTILE[name])
    assert opening_refusal(tmp_path / "m") == "model.safetensors: it cannot be read (truncated or not safetensors)"


LARGE: dict[str, tuple[bytes, str]] = {
    "its bytes": (struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 1), "its header has 16777217 bytes; the limit is"),
    "its tensors": (
        header(b"{" + b",".join(b'"%x":{"shape":[0]}' % n for n in range(90_000)) + b"}"),
        "it holds more than 250000 values",
    ),
    "a shape": (header(b'{"a": {"shape": [' + b"0," * 300_000 + b"0]}}"), "it holds more than 250000 values"),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.requirement("WORKER-4312")
def test_a_header_beyond_the_limits_is_refused_before_the_library_reads_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would take ten seconds and a gigabyte for what it allows."""
    raw, problem = LARGE[name]
    (write_model(tmp_path / "m") / "model.safetensors").write_bytes(raw)
    monkeypatch.setattr(safetensors_weights, "safe_open", None)
    assert opening_refusal(tmp_path / "m").startswith(f"model.safetensors: {problem}")


@pytest.mark.requirement("WORKER-4310")
def test_as_many_tensors_as_the_limit_have_room_in_a_header(tmp_path: Path) -> None:
    names = [f"model.layers.{n + 1}.self_attn.q_proj.weight" for n in range(9_988)]
    entries = {name: entry([1, 1, 1, 1], 4 * n, 4 * n + 4) for n, name in enumerate(names)}
    whole = header(entries, bytes(4 * len(entries)))
    split(write_model(tmp_path / "m"), 1)
    (tmp_path / "m" / "more.safetensors").write_bytes(whole)
    write_index(tmp_path / "m", {"a": "more.safetensors", "b": "model-00001-of-00001.safetensors"})
    assert len(open_huggingface(tmp_path / "m", "auto").tensors) == 10_000


@pytest.mark.requirement("WORKER-4310")
def test_a_file_cut_short_anywhere_is_one_error(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    for size in (*range(12), *np.random.default_rng(3).integers(12, len(whole), 40), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated or not safetensors" in opening_refusal(tmp_path / "m"), size


def test_a_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").write_bytes(header({}))
    assert opening_refusal(tmp_path / "m") == "m: its safetensors files hold no tensor"


@pytest.mark.parametrize(("dtype", "kind"), [("float64", "F64"), ("int64", "I64")])
@pytest.mark.requirement("WORKER-4310")
def test_a_tensor_of_another_type_is_named(tmp_path: Path, dtype: str, kind: str) -> None:
    tensors = weights() | {"model.norm.weight": np.ones(16, dtype)}
    message = opening_refusal(write_model(tmp_path / "m", tensors))
    assert message == f"model.safetensors: tensor model.norm.weight is of type {kind}; supported are BF16, F16, F32"


def test_the_name_of_a_tensor_cannot_steer_a_terminal(tmp_path: Path) -> None:
    tensors = weights() | {"\x1b[2J\n\u202e" + "x" * 1000: np.ones(4, np.int64)}
    assert "tensor ?[2J??xxx" in opening_refusal(write_model(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (None, "weight_map is missing"),
        ({}, "weight_map is missing"),
        ([1], "weight_map is missing"),
        ({"a": "../secret.safetensors"}, "not NAME.safetensors in the same folder"),
        ({"a": "/etc/secret.safetensors"}, "not NAME.safetensors in the same folder"),
        ({"a": "folder/x.safetensors"}, "not NAME.safetensors in the same folder"),
        ({"a": "x.safetensors\n"}, "not NAME.safetensors in the same folder"),
        ({"a": "pytorch_model.bin"}, "not NAME.safetensors in the same folder"),
        ({"a": 7}, "not NAME.safetensors in the same folder"),
        ({"a": None}, "not NAME.safetensors in the same folder"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing: download the model again"),
        ({str(n): f"{n}.safetensors" for n in range(1001)}, "it names 1001 files; the limit is 1000"),
    ],
)
@pytest.mark.requirement("WORKER-4320")
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, places: object, message: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(safetensors(weights()))
    (write_model(tmp_path / "m") / "model.safetensors").unlink()
    write_index(tmp_path / "m", places)
    told = opening_refusal(tmp_path / "m")
    assert told.startswith("model.safetensors.index.json: ")
    assert message in told


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    places = split(write_model(tmp_path / "m"), 2)
    first, second = sorted(set(places.values()))
    (tmp_path / "m" / second).write_bytes((tmp_path / "m" / first).read_bytes())
    assert f"{second}: tensor lm_head.weight is in {first} too" in opening_refusal(tmp_path / "m")


def test_a_shard_that_is_damaged_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "m" / max(split(write_model(tmp_path / "m"), 2).values())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert opening_refusal(tmp_path / "m") == f"{shard.name}: it cannot be read (truncated or not safetensors)"
