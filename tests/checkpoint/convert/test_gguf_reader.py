"""A GGUF header is untrusted: whatever it says, the reader answers quickly with a header or a typed error."""

from __future__ import annotations

import contextlib
import resource
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orcd_jax.checkpoint.convert.gguf_reader import GgufFile, read_gguf
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.convert.tiny_gguf import array, header, tensor_info, text, weights, write_model

HUGE = 2**62


def read(tmp_path: Path, raw: bytes) -> GgufFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


def string_of(length: int) -> bytes:
    return struct.pack("<Q", length)


ATTACKS = {
    "magic": (header(magic=b"GGML"), "magic at byte 0: expected GGUF"),
    "version 1": (header(version=1), "version at byte 4: expected 2 or 3"),
    "big-endian": (header(version=3 << 24), "found a big-endian file"),
    "empty file": (b"", "magic at byte 0: expected 4 bytes, found 0 left"),
    "n_tensors": (header(n_tensors=HUGE), "tensor count at byte 8: expected at most 10000"),
    "n_kv": (header(n_metadata=HUGE), "metadata count at byte 16: expected at most 1000"),
    "key length": (header(n_metadata=1, body=string_of(HUGE)), "metadata key: length at byte 24: expected at most"),
    "key beyond the file": (header(n_metadata=1, body=string_of(1000)), "1000 bytes, found 0 left"),
    "string length": (
        header(n_metadata=1, body=text("k") + struct.pack("<IQ", 8, HUGE)),
        "k: length at byte 37: expected at most 65536 bytes",
    ),
    "array length": (header(n_metadata=1, body=text("k") + array(4, HUGE)), "k at byte 41: expected at most 2097152"),
    "array beyond the file": (header(n_metadata=1, body=text("k") + array(4, 10**6)), "4000000 bytes, found 0 left"),
    "strings beyond the file": (header(n_metadata=1, body=text("k") + array(8, 10**5)), "100000 strings"),
    "array nesting": (header(n_metadata=1, body=text("k") + array(9, 1)), "expected no array of arrays"),
    "value type": (header(n_metadata=1, body=text("k") + struct.pack("<I", 77)), "a GGUF value type from 0 to 12"),
    "bool": (header(n_metadata=1, body=text("k") + struct.pack("<IB", 7, 9)), "a boolean 0 or 1, found 9"),
    "bools": (header(n_metadata=1, body=text("k") + array(7, 3, b"\1\2\0")), "k at byte 49: expected booleans 0 or 1"),
    "not UTF-8": (header(n_metadata=1, body=text(b"\xff\xfe")), "expected UTF-8"),
    "key twice": (
        header(n_metadata=2, body=(text("k") + struct.pack("<IB", 0, 1)) * 2),
        "expected each key once, found k twice",
    ),
    "alignment": (
        header(n_metadata=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
        "general.alignment at byte 57: expected a power of two from 8 to 4096, found 0",
    ),
    "n_dims": (header(n_tensors=1, body=text("t") + struct.pack("<I", 99)), "t: n_dims at byte 33: expected 1 to 4"),
    "dimension": (header(n_tensors=1, body=tensor_info(dims=(0,))), "t: dimension 0"),
    "dims product": (header(n_tensors=1, body=tensor_info(dims=(2**40, 2**40, 2**40))), "t: size at byte 24"),
    "tensor type": (header(n_tensors=1, body=tensor_info(kind=16)), "expected one of BF16, F16, F32"),
    "block size": (header(n_tensors=1, body=tensor_info(dims=(33,), kind=8)), "a multiple of 32 for Q8_0"),
    "offset past the end": (header(n_tensors=1, body=tensor_info(offset=2**40)), "its header is wrong"),
    "offset unaligned": (header(n_tensors=1, body=tensor_info(offset=7)), "expected a multiple of 32, found 7"),
    "overlap": (
        header(n_tensors=2, body=tensor_info("a") + tensor_info("b")) + bytes(200),
        "expected its own bytes, found those of a",
    ),
    "name twice": (header(n_tensors=2, body=tensor_info() * 2) + bytes(200), "t: name"),
    "escape in a name": (header(n_tensors=1, body=tensor_info("\x1b[31m", kind=99)), r"\?\[31m: type"),
}


@pytest.mark.requirement("WORKER-4310")
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_field_is_refused_by_name_with_its_place(tmp_path: Path, name: str) -> None:
    raw, message = ATTACKS[name]
    before = time.process_time()
    with pytest.raises(OrcdError, match=message) as caught:
        read(tmp_path, raw)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert time.process_time() - before < 1.0


@pytest.mark.requirement("WORKER-4310")
def test_no_attack_costs_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for raw, _ in ATTACKS.values():
        with pytest.raises(OrcdError):
            read(tmp_path, raw)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def test_every_tensor_of_a_valid_file_is_found_with_its_bytes(tmp_path: Path, valid: bytes) -> None:
    file = read(tmp_path, valid)
    expected = weights()
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        assert file.tensors[name].shape == values.shape
        assert file.blocks(name).tobytes() == values.tobytes()


@pytest.mark.requirement("WORKER-4310")
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, valid: bytes) -> None:
    for length in range(0, len(valid) - 32, max(1, len(valid) // 400)):
        with pytest.raises(OrcdError):
            read(tmp_path, valid[:length])


@pytest.mark.requirement("WORKER-4310")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_mutated_header_parses_or_gives_a_typed_error(
    tmp_path: Path, valid: bytes, changes: list[tuple[int, int]]
) -> None:
    raw = bytearray(valid)
    for at, byte in changes:
        raw[at] = byte
    with contextlib.suppress(OrcdError):
        file = read(tmp_path, bytes(raw))
        assert all(t.offset + t.n_bytes <= len(raw) for t in file.tensors.values())


def test_a_file_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(OrcdError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "none.gguf")
