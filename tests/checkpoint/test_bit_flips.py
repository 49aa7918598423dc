"""No bit of a checkpoint changes unnoticed: each is found before a model could become ready, with the place named.

The stages are those of a load: manifest, capabilities, files, restore, arrays. What a stage lets pass, the next one
looks at.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec

import jax
import numpy as np
import pytest

from orcd_jax.checkpoint import verify as verify_module
from orcd_jax.checkpoint.manifest import Manifest, ModelCapabilities, read_manifest
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.errors import OrcdError
from orcd_jax.worker.capability import check_capabilities
from tests.checkpoint.proof import proved
from tests.checkpoint.tiny import edit_manifest
from tests.tiny_checkpoint import make_tiny_checkpoint

FLIPS = 1_000
MANIFEST = "manifest.json"
MODEL_FIELDS = tuple(ModelCapabilities.model_fields)

P = ParamSpec("P")

# Orbax leaves coroutines behind when it fails; they complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected_here() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that every test changes in place, and leaves as it was."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def manifest(whole: Path) -> Manifest:
    return read_manifest(whole)


def names_below(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def load(directory: Path, device: jax.Device) -> None:
    """A load as far as a model that could become ready."""
    manifest = read_manifest(directory)
    check_capabilities(manifest.model)
    verify_files(directory, manifest, lambda _: None)
    assert proved(manifest, restore(directory, manifest, device)) == manifest.digest


def refusal(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> str:
    """What a call is refused with, in words that can be shown; empty when it is not."""
    try:
        call(*args, **kwargs)
    except OrcdError as error:
        message = error.message
    else:
        return ""
    assert message.isprintable()
    assert message.isascii()
    assert len(message) < 500
    return message


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[bytes]:
    """The content of a file that may be changed, removed or replaced, and is given back at the end."""
    raw = path.read_bytes()
    try:
        yield raw
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(raw)


def test_a_whole_checkpoint_loads(whole: Path, device: jax.Device) -> None:
    load(whole, device)


# -- one bit -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4304")
@pytest.mark.requirement("WORKER-4310")
@pytest.mark.requirement("WORKER-4313")
def test_a_thousand_flipped_bits_are_all_caught_and_each_names_its_place(
    whole: Path, manifest: Manifest, device: jax.Device, tmp_path: Path
) -> None:
    """Spread over every file alike: the first of each in the whole checkpoint, the others in that file alone."""
    rng, names = np.random.default_rng(4310), names_below(whole)
    # One in the manifest may show as a file or tensor that is not there, or as another kind of model.
    listed = "the checkpoint's file "
    places = [MANIFEST, listed, *(entry.path for entry in manifest.tensors), *(f"requires {f} " for f in MODEL_FIELDS)]
    tried = dict.fromkeys(names, 0)
    for name in names:
        alone = tmp_path / "alone"
        (alone / name).parent.mkdir(parents=True)
        only = manifest.model_copy(update={"files": tuple(f for f in manifest.files if f.path == name)})
        with changing(whole / name) as raw:
            for bit in rng.integers(0, len(raw) * 8, -(-FLIPS // len(names))).tolist():
                if name == MANIFEST or not tried[name]:
                    (whole / name).write_bytes(flipped(raw, bit))
                    message = refusal(load, whole, device)
                else:
                    (alone / name).write_bytes(flipped(raw, bit))
                    message = refusal(verify_files, alone, only, lambda _: None)
                assert message, f"bit {bit} of {name} was not noticed"
                assert any(place in message for place in (places if name == MANIFEST else [name])), message
                tried[name] += 1
        shutil.rmtree(alone)
    assert sum(tried.values()) >= FLIPS
    assert min(tried.values()) >= 20


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4310")
def test_no_byte_of_the_manifest_is_free(whole: Path, manifest: Manifest, device: jax.Device) -> None:
    """One bit of every fifth byte: white space, the name and the history of the model are covered like the rest."""
    rng, unnoticed = np.random.default_rng(4311), []
    with changing(whole / MANIFEST) as raw:
        for byte in range(int(rng.integers(5)), len(raw), 5):
            bit = byte * 8 + int(rng.integers(8))
            (whole / MANIFEST).write_bytes(flipped(raw, bit))
            try:
                damaged = read_manifest(whole)
            except OrcdError as error:
                message = error.message
            else:
                # Another table of files is what the first test shows to be found.
                message = "files" if damaged.files != manifest.files else refusal(load, whole, device)
            if not message:
                unnoticed.append(bit)
    assert unnoticed == []


@pytest.mark.requirement("WORKER-4310")
def test_the_name_and_history_of_a_model_are_covered(whole: Path) -> None:
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda value: value["model"].update(model_id="Tiny-Text"),
        lambda value: value["source"].update(converter_version="9"),
        lambda value: value["source"]["files"][0].update(sha256="0" * 64),
        lambda value: value["source"].update(tensor_types=["F16"]),
        lambda value: value.update(provenance_digest="0" * 64),
    ]
    for edit in edits:
        with changing(whole / MANIFEST):
            edit_manifest(whole, edit)
            assert "provenance_digest does not match model_id and source" in refusal(read_manifest, whole)


def test_a_manifest_from_before_its_history_was_covered_is_read(whole: Path, manifest: Manifest) -> None:
    with changing(whole / MANIFEST):
        edit_manifest(whole, lambda value: value.pop("provenance_digest"))
        assert read_manifest(whole) == manifest


# -- whole files -------------------------------------------------------------------------------------------------------


def cut(path: Path, raw: bytes) -> None:
    path.write_bytes(raw[:-2])  # the last byte of the manifest is a line end, which says nothing


def halved(path: Path, raw: bytes) -> None:
    path.write_bytes(raw[: len(raw) // 2])


def emptied(path: Path, _: bytes) -> None:
    path.write_bytes(b"")


def appended(path: Path, raw: bytes) -> None:
    path.write_bytes(raw + b"\0")


def zeroed(path: Path, raw: bytes) -> None:
    path.write_bytes(bytes(len(raw)))


def removed(path: Path, _: bytes) -> None:
    path.unlink()


def symlinked(path: Path, _: bytes) -> None:
    """To its own content, outside."""
    outside = path.rename(outside_of(path))
    path.symlink_to(outside)


def hard_linked(path: Path, _: bytes) -> None:
    """The same content under a name outside, by which it can be changed after it was checked."""
    os.link(path, outside_of(path))


def outside_of(path: Path) -> Path:
    root = next(above for above in path.parents if (above.parent / "tiny.gguf").exists())
    return root.parent / "outside"


DAMAGES = [cut, halved, emptied, appended, zeroed, removed, symlinked, hard_linked]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
@pytest.mark.requirement("WORKER-4310")
@pytest.mark.requirement("WORKER-4320")
def test_a_damage_of_any_file_is_caught_and_names_it(
    whole: Path, device: jax.Device, damage: Callable[[Path, bytes], None]
) -> None:
    for name in names_below(whole):
        path = whole / name
        with changing(path) as raw:
            damage(path, raw)
            message = refusal(load, whole, device)
            outside_of(path).unlink(missing_ok=True)
        assert name in message, f"{damage.__name__} {name}: {message or 'it was not noticed'}"


@pytest.mark.requirement("WORKER-4310")
def test_two_files_in_each_others_place_are_caught(whole: Path, device: jax.Device) -> None:
    names = [name for name in names_below(whole) if name != MANIFEST]
    for first, second in itertools.pairwise(names):
        with changing(whole / first) as one, changing(whole / second) as other:
            (whole / first).write_bytes(other)
            (whole / second).write_bytes(one)
            message = refusal(load, whole, device)
        assert first in message or second in message, (first, second, message)


@pytest.mark.parametrize("name", ["more", "arrays/d/more", "arrays/ocdbt.process_0/more", ".more", "manifest.json~"])
@pytest.mark.parametrize("content", [b"", b"x"])
@pytest.mark.requirement("WORKER-4310")
def test_a_file_too_many_is_caught_and_named(whole: Path, device: jax.Device, name: str, content: bytes) -> None:
    try:
        (whole / name).write_bytes(content)
        assert f"file {name} is not listed in manifest.json" in refusal(load, whole, device)
    finally:
        (whole / name).unlink()


@pytest.mark.requirement("WORKER-4310")
def test_no_more_files_are_listed_than_there_may_be(
    whole: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "MAX_FILES", len(manifest.files))
    verify_files(whole, manifest, lambda _: None)
    monkeypatch.setattr(verify_module, "MAX_FILES", len(manifest.files) - 1)
    assert f"there may be {len(manifest.files) - 1}" in refusal(verify_files, whole, manifest, lambda _: None)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
@pytest.mark.requirement("WORKER-4310")
def test_a_manifest_that_is_no_file_is_refused_at_once(whole: Path, make: Callable[[Path], None]) -> None:
    with changing(whole / MANIFEST):
        (whole / MANIFEST).unlink()
        make(whole / MANIFEST)
        try:
            assert "manifest.json" in refusal(read_manifest, whole)
        finally:
            (whole / MANIFEST).rmdir() if (whole / MANIFEST).is_dir() else (whole / MANIFEST).unlink()


# -- a manifest that agrees with itself and asks too much --------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m["config"].update(num_layers=2**24), "config has 16777216 layers and there are 15 tensors"),
        (lambda m: m.update(tensors=[m["tensors"][0]] * 10_001), "at tensors: "),
        (lambda m: m.update(files=[m["files"][0]] * 100_001), "at files: "),
        (lambda m: m["model"].update(architecture="\x1b[2Jllama"), "at model.architecture: "),
        (lambda m: m["model"].update(model_id="a b"), "at model.model_id: "),
        (lambda m: m["model"].update(model_id="\u202e"), "at model.model_id: "),
    ],
)
@pytest.mark.requirement("WORKER-4304")
@pytest.mark.requirement("WORKER-4310")
def test_a_manifest_beyond_the_limits_is_refused_before_its_digest_is_compared(
    whole: Path, edit: Callable[[dict[str, Any]], object], problem: str
) -> None:
    with changing(whole / MANIFEST):
        edit_manifest(whole, edit, repair=False)
        assert problem in refusal(read_manifest, whole)


# -- the second line of defence ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params(whole: Path, manifest: Manifest, device: jax.Device) -> Mapping[str, bytes]:
    """The true bytes of every tensor."""
    return {path: np.asarray(array).tobytes() for path, array in restore(whole, manifest, device).items()}


@pytest.mark.requirement("WORKER-4310")
def test_a_flip_that_the_file_check_did_not_see_is_caught_on_the_device_and_names_the_tensor(
    whole: Path, manifest: Manifest, device: jax.Device, params: Mapping[str, bytes]
) -> None:
    """As when a disk changes its mind after it was read. Orbax restores all of these without a word."""
    rng, seen = np.random.default_rng(4312), 0
    for tensor, true in params.items():
        for path in (whole / name for name in names_below(whole) if name.startswith("arrays/")):
            at = path.read_bytes().find(true)
            if at < 0 or len(true) < 1_000:  # small ones lie, packed, in a table that has a checksum of its own
                continue
            with changing(path) as raw:
                path.write_bytes(flipped(raw, at * 8 + int(rng.integers(len(true) * 8))))
                restored = restore(whole, manifest, device)
            message = refusal(proved, manifest, restored)
            assert f"tensor {tensor} on the device is not the one" in message
            seen += 1
    assert seen >= 9  # the embedding, and four matrices of each layer


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4310")
def test_no_flip_that_the_file_check_did_not_see_changes_a_tensor(
    whole: Path, manifest: Manifest, device: jax.Device, params: Mapping[str, bytes]
) -> None:
    """Whatever Orbax makes of it: one error, or the true bytes, for much of what it writes it does not read again."""
    rng, errors = np.random.default_rng(4313), 0
    for name in (name for name in names_below(whole) if name.startswith("arrays/")):
        with changing(whole / name) as raw:
            for bit in rng.integers(0, len(raw) * 8, 3).tolist():
                (whole / name).write_bytes(flipped(raw, bit))
                restored: Mapping[str, jax.Array] = {}
                with contextlib.suppress(OrcdError):  # any other error ends the test
                    restored = restore(whole, manifest, device)
                if not restored or refusal(proved, manifest, restored):
                    errors += 1
                else:
                    assert {path: np.asarray(a).tobytes() for path, a in restored.items()} == params, (name, bit)
    assert errors > 30
