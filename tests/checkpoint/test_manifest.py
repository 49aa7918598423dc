"""manifest.json: read whole, or refused with one sentence that says where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orcd_jax.checkpoint import manifest as module
from orcd_jax.checkpoint.manifest import Manifest, canonical_json, read_manifest, tensor_bytes
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.tiny import MemorySource, config, convert, copied, edit_manifest, model_by_hand

Json = dict[str, Any]


def refusal(directory: Path) -> str:
    """Why a manifest is refused: one typed error that can be shown."""
    with pytest.raises(OrcdError) as caught:
        read_manifest(directory)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    return caught.value.message


def written(tmp_path: Path, raw: str | bytes) -> Path:
    (tmp_path / "manifest.json").write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return tmp_path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    made = convert(MemorySource(), tmp_path / "m")
    assert read_manifest(tmp_path / "m") == made
    assert Manifest.model_validate_json(made.model_dump_json()) == made


def test_weight_bytes_are_those_of_all_tensors(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    embed = next(entry for entry in manifest.tensors if entry.path == "embed")
    assert tensor_bytes(embed) == 24 * 16 * 4
    assert manifest.weight_bytes == sum(map(tensor_bytes, manifest.tensors))


# -- the model digest --------------------------------------------------------------------------------------------------


def test_the_model_digest_is_the_one_by_hand(checkpoint: Path) -> None:
    value = json.loads((checkpoint / "manifest.json").read_text())
    assert value["digest"] == model_by_hand(value)


def test_everything_that_decides_an_answer_changes_the_model_digest(tmp_path: Path) -> None:
    plain = MemorySource()
    other_weights = {name: array + (name == "lm_head.weight") for name, array in plain.weights.items()}
    begins = plain.tokenizer.model_copy(update={"add_bos": True})
    sources = [
        plain,
        MemorySource(weights=other_weights),
        MemorySource(config=config(norm_eps=1e-6), weights=plain.weights),
        MemorySource(config=config(context_max=65), weights=plain.weights),
        MemorySource(config=config(dtype="bfloat16"), weights=plain.weights),
        MemorySource(tokenizer=begins),
        MemorySource(tokenizer_json=b'{"model":  "tiny"}'),
        MemorySource(chat_template="{{ messages }}"),
        MemorySource(chat_template=None),
    ]
    digests = [convert(source, tmp_path / str(number)).digest for number, source in enumerate(sources)]
    assert len(set(digests)) == len(digests)


def test_a_name_alone_does_not_change_the_model_digest(tmp_path: Path) -> None:
    one, other = MemorySource(), MemorySource(model_id="renamed")
    assert convert(one, tmp_path / "a").digest == convert(other, tmp_path / "b").digest


def test_canonical_json_is_sorted_compact_and_not_escaped() -> None:
    assert canonical_json({"b": [1, 0.5], "a": "é\n"}) == '{"a":"é\\n","b":[1,0.5]}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


# -- not a manifest ----------------------------------------------------------------------------------------------------


def test_a_missing_manifest_names_the_converters(tmp_path: Path) -> None:
    assert "tools/convert_gguf.py" in refusal(tmp_path)
    assert "no manifest.json" in refusal(tmp_path / "nowhere")


def test_a_manifest_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    assert "cannot be read: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe", b'{"a": 1} x', b"1" * 5000, b"[" * 100_000, b'{"a":' * 100_000]
)
@pytest.mark.requirement("WORKER-4310")
def test_what_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    assert "not valid JSON" in refusal(written(tmp_path, raw))


@pytest.mark.parametrize("depth", [200, 900, 990, 994])
def test_a_version_nested_deeply_is_refused(tmp_path: Path, depth: int) -> None:
    refusal(written(tmp_path, '{"format": "orcd-checkpoint", "format_version": ' + "[" * depth + "]" * depth + "}"))


@pytest.mark.parametrize("raw", ["[]", "null", "3", '"text"', "{}", '{"format": "other", "format_version": 1}'])
def test_json_that_is_no_manifest_is_refused(tmp_path: Path, raw: str) -> None:
    assert "manifest.json is invalid" in refusal(written(tmp_path, raw))


def test_a_manifest_that_is_too_large_is_refused_before_it_is_parsed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (checkpoint / "manifest.json").stat().st_size
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size)
    read_manifest(checkpoint)
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size - 1)
    assert f"larger than {size - 1} bytes" in refusal(checkpoint)


@pytest.mark.parametrize(("version", "shown"), [(2, "2"), (0, "0"), ("1", "'1'"), (None, "None"), ("\x1b[2J", "x1b")])
def test_another_version_is_named_with_the_one_that_is_read(
    checkpoint: Path, tmp_path: Path, version: object, shown: str
) -> None:
    copy = copied(checkpoint, tmp_path)
    edit_manifest(copy, lambda value: value.update(format_version=version))
    message = refusal(copy)
    assert f"format_version {shown}" in message.replace("'\\", "")
    assert "reads 1" in message


# -- inconsistent ------------------------------------------------------------------------------------------------------

SHA = "ab" * 32
REPAIRED: dict[str, tuple[Callable[[Json], object], str]] = {
    "an additional field": (lambda m: m.update(extra=1), "at extra: "),
    "itself among the files": (
        lambda m: m["files"].insert(-1, {"path": "manifest.json", "size_bytes": 9, "sha256": SHA}),
        "files lists manifest.json",
    ),
    "fewer tensors than its layers have": (lambda m: m["config"].update(num_layers=2), "2 layers and there are 10"),
    "rotary frequencies that do not fall": (lambda m: m["config"].update(rope_theta=1.0), "at config.rope_theta"),
    "an additional field of a tensor": (lambda m: m["tensors"][0].update(extra=1), "at tensors.0.extra"),
    "a field whose name steers a terminal": (lambda m: m.update({"\x1b[2J\u202e": 1}), r"at \x1b[2J\u202e: "),
    "a field with a very long name": (lambda m: m.update({"x" * 10_000: 1}), "at xxx"),
    "a field missing": (lambda m: m.pop("source"), "at source: "),
    "unsorted tensors": (lambda m: m["tensors"].reverse(), "tensors must be unique and sorted"),
    "a tensor twice": (lambda m: m["tensors"].insert(0, m["tensors"][0]), "tensors must be unique and sorted"),
    "unsorted files": (lambda m: m["files"].reverse(), "files must be unique and sorted"),
    "a file twice": (lambda m: m["files"].insert(0, m["files"][0]), "files must be unique and sorted"),
    "another vocabulary": (lambda m: m["model"].update(vocab_size=25), "disagree about vocab_size"),
    "another context": (lambda m: m["model"].update(context_max=65), "disagree about vocab_size or context_max"),
    "a configuration that cannot be": (lambda m: m["config"].update(num_kv_heads=3), "not a multiple"),
    "a configuration of text": (lambda m: m["config"].update(hidden_size="16"), "at config.hidden_size"),
    "another architecture": (lambda m: m["config"].update(architecture="mamba"), "at config.architecture"),
    "a digest of another length": (lambda m: m["tensors"][0].update(digest=SHA[:-2]), "at tensors.0.digest"),
    "a digest in capitals": (lambda m: m["tensors"][0].update(digest=SHA.upper()), "at tensors.0.digest"),
    "a digest with a line end": (lambda m: m["files"][0].update(sha256=SHA + "\n"), "at files.0.sha256"),
    "a kind of tomorrow": (lambda m: m["tensors"][0].update(kind="q4"), "at tensors.0.kind"),
    "another dtype": (lambda m: m["tensors"][0].update(dtype="float64"), "at tensors.0.dtype"),
    "an empty axis": (lambda m: m["tensors"][0].update(shape=[0]), "at tensors.0.shape.0"),
    "too many axes": (lambda m: m["tensors"][0].update(shape=[1] * 9), "at tensors.0.shape"),
    "a path that is no path": (lambda m: m["tensors"][0].update(path="a..b"), "at tensors.0.path"),
    "shards that do not divide": (lambda m: m["tensors"][0].update(shard_axis=0, shards=7), "7 shards do not divide"),
    "an axis that is not there": (lambda m: m["tensors"][0].update(shard_axis=5, shards=1), "axis 5"),
    "shards without an axis": (lambda m: m["tensors"][0].update(shard_axis=None, shards=2), "needs a shard_axis"),
    "a negative size": (lambda m: m["files"][0].update(size_bytes=-1), "at files.0.size_bytes"),
    "an absurd size": (lambda m: m["files"][0].update(size_bytes=2**60), "at files.0.size_bytes"),
    "a token id below zero": (lambda m: m["tokenizer"].update(bos_id=-1), "at tokenizer.bos_id"),
}


@pytest.mark.parametrize("name", REPAIRED)
@pytest.mark.requirement("WORKER-4304")
def test_an_inconsistent_manifest_is_refused_whatever_its_digest(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Each has the model digest of its own content: what is refused is the content."""
    edit, message = REPAIRED[name]
    copy = copied(checkpoint, tmp_path)
    edit_manifest(copy, lambda value: value["files"].sort(key=lambda f: f["path"]))  # type: ignore[attr-defined]
    read_manifest(copy)
    edit_manifest(copy, edit, repair=name != "a digest of another length")
    assert message in refusal(copy)


@pytest.mark.parametrize(
    "path", ["../x", "a/../x", "..", "/etc/passwd", "", ".", "./x", "a//x", "a/", "a\0x", "arrays/../../x"]
)
@pytest.mark.requirement("WORKER-4320")
def test_a_file_outside_the_folder_is_refused(checkpoint: Path, tmp_path: Path, path: str) -> None:
    copy = copied(checkpoint, tmp_path)
    edit_manifest(copy, lambda value: value["files"][0].update(path=path))  # type: ignore[index]
    assert "relative, normalised and inside the checkpoint" in refusal(copy)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(digest=SHA),
        lambda m: m["tensors"][3].update(digest=SHA),
        lambda m: m["config"].update(rope_theta=10_001.0),
        lambda m: m["config"].update(dtype="bfloat16"),
        lambda m: m["tokenizer"].update(eos_ids=[3]),
        lambda m: m["tokenizer"].update(bos_id=None),
        lambda m: next(f for f in m["files"] if f["path"] == "tokenizer.json").update(sha256=SHA),
        lambda m: next(f for f in m["files"] if f["path"] == "chat_template.jinja").update(sha256=SHA),
        lambda m: m.update(files=[f for f in m["files"] if f["path"] != "chat_template.jinja"]),
    ],
)
def test_content_with_the_digest_of_another_is_refused(
    checkpoint: Path, tmp_path: Path, edit: Callable[[Json], object]
) -> None:
    copy = copied(checkpoint, tmp_path)
    edit_manifest(copy, edit, repair=False)
    assert "digest does not match the manifest's own content" in refusal(copy)
