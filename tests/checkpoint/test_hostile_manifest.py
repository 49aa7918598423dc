"""A manifest.json that somebody made to hurt: refused in a moment, or one thing to every reader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orcd_jax.checkpoint.manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    MAX_TENSORS,
    FileEntry,
    Manifest,
    parse_manifest,
)
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.tiny import edit_manifest, model_by_hand

Json = dict[str, Any]


def refusal(raw: bytes) -> str:
    with pytest.raises(OrcdError) as caught:
        parse_manifest(raw)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.fixture(scope="module")
def raw(checkpoint: Path) -> bytes:
    return (checkpoint / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"digest":', b'"digest": "%s", "digest":' % (b"0" * 64)),
        (b'"vocab_size":', b'"vocab_size": 7, "vocab_size":'),
        (b'"sha256":', b'"sha256": 1, "sha\\u0032\\u0035\\u0036":'),
        (b'"norm_eps": 0.00001', b'"norm_eps": NaN'),
        (b'"shards": 1', b'"shards": Infinity'),
    ],
    ids=["digest twice", "a field of the configuration twice", "twice in two spellings", "NaN", "Infinity"],
)
@pytest.mark.requirement("WORKER-4310")
def test_what_two_readers_may_see_differently_is_refused(raw: bytes, old: bytes, new: bytes) -> None:
    """The last of two fields counts to one reader, the first to another."""
    assert old in raw
    assert "is not valid JSON, names a field twice" in refusal(raw.replace(old, new))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_another_encoding_than_utf_8_is_refused(raw: bytes, encoding: str) -> None:
    assert "is not valid JSON" in refusal(raw.decode().encode(encoding))


OTHER_TYPES: dict[str, Callable[[Json], object]] = {
    "files.0.size_bytes": lambda m: m["files"][0].update(size_bytes=True),
    "files.1.size_bytes": lambda m: m["files"][1].update(size_bytes=str(m["files"][1]["size_bytes"])),
    "files.2.size_bytes": lambda m: m["files"][2].update(size_bytes=float(m["files"][2]["size_bytes"])),
    "tensors.0.shards": lambda m: m["tensors"][0].update(shards=float(m["tensors"][0]["shards"])),
    "tensors.0.shape.0": lambda m: m["tensors"][0].update(shape=[True, *m["tensors"][0]["shape"][1:]]),
    "tensors.0.shard_axis": lambda m: m["tensors"][0].update(shard_axis=False),
    "model.context_max": lambda m: m["model"].update(context_max=str(m["model"]["context_max"])),
    "tokenizer.bos_id": lambda m: m["tokenizer"].update(bos_id=True),
    "tokenizer.eos_ids.0": lambda m: m["tokenizer"].update(eos_ids=[True]),
    "tokenizer.add_bos": lambda m: m["tokenizer"].update(add_bos=0),
    "format_version": lambda m: m.update(format_version=True),
    "format_version ": lambda m: m.update(format_version=1.0),
}


@pytest.mark.parametrize("place", OTHER_TYPES)
@pytest.mark.requirement("WORKER-4310")
def test_a_value_of_another_type_is_refused_even_if_it_is_equal(copy: Path, place: str) -> None:
    edit_manifest(copy, OTHER_TYPES[place])
    assert f"at {place.strip()}: Input should be a valid" in refusal((copy / "manifest.json").read_bytes())


@pytest.mark.parametrize("tokens", [{"eos_ids": [24]}, {"eos_ids": [1, 2**30]}, {"bos_id": 24}])
@pytest.mark.requirement("WORKER-4310")
def test_a_token_beyond_the_vocabulary_is_refused(copy: Path, tokens: Json) -> None:
    edit_manifest(copy, lambda m: m["tokenizer"].update(tokens))  # type: ignore[attr-defined]
    assert "names a token that is not below vocab_size 24" in refusal((copy / "manifest.json").read_bytes())


def values(count: int, value: bytes) -> bytes:
    return b",".join([value] * count)


LARGE: dict[str, bytes] = {
    "objects": b'{"a":[' + values(MAX_MANIFEST_BYTES // 3 - 9, b"{}") + b"]}",
    "lists": b"[" + values(MAX_MANIFEST_BYTES // 3 - 9, b"[]") + b"]",
    "numbers": b'{"a":[' + values(MAX_MANIFEST_BYTES // 2 - 9, b"0") + b"]}",
    "fields": b"{" + b",".join(b'"%x":0' % n for n in range(MAX_MANIFEST_VALUES - 9)) + b"}",
    "empty files": b'{"files":[' + values(MAX_MANIFEST_VALUES // 2 - 9, b"{}") + b"]}",
    "empty tensors": b'{"tensors":[' + values(MAX_MANIFEST_VALUES // 2 - 9, b"[]") + b"]}",
    "a shape": b'{"tensors":[{"shape":[' + values(MAX_MANIFEST_VALUES - 9, b"true") + b"]}]}",
    "ends": b'{"tokenizer":{"eos_ids":[' + values(MAX_MANIFEST_VALUES - 9, b'""') + b"]}}",
    "history": b'{"source":{"files":[' + values(MAX_MANIFEST_VALUES // 2 - 9, b"{}") + b'],"tensor_types":[0]}}',
    "a text": b'{"a":"' + "😀".encode() + b"x" * (MAX_MANIFEST_BYTES - 99) + b'"}',
}


SCRIPT = """
import resource, sys
from pathlib import Path
from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.errors import OrcdError

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for directory in sys.argv[2:]:
    try:
        read_manifest(Path(directory))
    except OrcdError as error:
        print(error.message)
"""


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4312")
def test_a_large_manifest_is_refused_in_a_bounded_memory(tmp_path: Path) -> None:
    """Tried in a process that may have so much more than it has. The first took 22 GB while it had 64 MiB."""
    told: list[str] = []
    for mebibytes, names in ((768, LARGE.keys() - {"a text"}), (1_536, {"a text"})):
        directories = [tmp_path / name for name in names]
        for directory in directories:
            directory.mkdir()
            (directory / "manifest.json").write_bytes(LARGE[directory.name])
        command = [sys.executable, "-c", SCRIPT, str(mebibytes * 2**20), *map(str, directories)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        told += done.stdout.splitlines()
    assert len(told) == len(LARGE)
    assert all(line.startswith("manifest.json is ") for line in told)


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4310")
def test_as_many_tensors_and_files_as_the_limits_are_read(raw: bytes) -> None:
    """Written with spaces, as the converters do."""
    value = json.loads(raw)
    tensor = {"shape": [1] * 8, "dtype": "float32", "kind": "dense", "shard_axis": 7, "shards": 1, "digest": "0" * 64}
    value["tensors"] = [{"path": f"layers.{n:04}.attention.tensor"} | tensor for n in range(MAX_TENSORS)]
    value["files"] = [
        FileEntry(path=f"arrays/ocdbt.process_0/d/{n:032}", size_bytes=2**40, sha256="0" * 64).model_dump()
        for n in range(MAX_FILES)
    ]
    value["digest"] = model_by_hand(value)
    del value["provenance_digest"]
    written = json.dumps(value, indent=1).encode()
    assert MAX_MANIFEST_BYTES // 2 < len(written) < MAX_MANIFEST_BYTES
    made = parse_manifest(written)
    assert isinstance(made, Manifest)
    assert (len(made.tensors), len(made.files)) == (10_000, 100_000)
