"""Writing a checkpoint: all or nothing, the same every time, and with one array in memory at a time."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint.convert import write as module
from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.digest import tensor_digest
from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_arrays, verify_files
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.tiny import (
    CONFIG,
    TEMPLATE,
    MemorySource,
    config,
    convert,
    random_weights,
    sha256,
    tensor_by_hand,
)


class Stopped(Exception):
    """What a test's callback raises; nothing handles it."""


def refusal(source: MemorySource, destination: Path, code: ErrorCode = ErrorCode.MODEL_LOAD_FAILED) -> str:
    """Why a conversion is refused; nothing of it may be left beside the destination."""
    before = sorted(destination.parent.rglob("*")) if destination.parent.is_dir() else []
    with pytest.raises(OrcdError) as caught:
        convert(source, destination)
    assert caught.value.code is code
    assert (sorted(destination.parent.rglob("*")) if destination.parent.is_dir() else []) == before
    return caught.value.message


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_its_document_says_and_nothing_else(tmp_path: Path) -> None:
    source = MemorySource()
    convert(source, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "manifest.json",
        "arrays",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == source.tokenizer_json
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_model_without_a_template_has_no_file_of_it(tmp_path: Path) -> None:
    write_checkpoint(MemorySource(), tmp_path / "m", lambda _: None, chat_template=None)
    assert not (tmp_path / "m" / "chat_template.jinja").exists()


def test_what_was_written_is_what_the_worker_verifies(tmp_path: Path, device: jax.Device) -> None:
    returned = convert(MemorySource(), tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    assert manifest == returned
    verify_files(tmp_path / "m", manifest, lambda _: None)
    verify_arrays(manifest, restore(tmp_path / "m", manifest, device), lambda _: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_digest_is_the_one_by_hand(tmp_path: Path, dtype: str) -> None:
    source = MemorySource(config=config(dtype=dtype))
    for entry in convert(source, tmp_path / "m").tensors:
        leaf = leaves(source.config)[entry.path]
        array = leaf.build({name: source.weights[name] for name in leaf.sources}).astype(entry.dtype)
        assert entry.digest == tensor_by_hand(array, entry.path, axis=entry.shard_axis, shards=entry.shards), entry.path


@pytest.mark.requirement("WORKER-4710")
def test_the_same_source_has_the_same_digests_twice(tmp_path: Path) -> None:
    """The files of the arrays may differ, and so may their own digests; neither is part of the model's."""
    one, two = (convert(MemorySource(), tmp_path / name) for name in ("one", "two"))
    assert (one.digest, one.tensors) == (two.digest, two.tensors)


def test_the_provenance_is_the_sources_name_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"content")
    (file,) = convert(MemorySource(paths=(tmp_path / "weights.gguf",)), tmp_path / "m").source.files
    assert (file.name, file.size_bytes, file.sha256) == ("weights.gguf", 7, sha256(b"content").hex())


def test_a_source_whose_name_is_not_unicode_can_be_converted(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    path.write_bytes(b"content")
    (file,) = convert(MemorySource(paths=(path,)), tmp_path / "m").source.files
    assert file.name == "�.gguf"


def test_every_stage_reports_from_nothing_to_all(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"content")
    points: list[Progress] = []
    write_checkpoint(MemorySource(paths=(tmp_path / "weights",)), tmp_path / "m", points.append, chat_template=None)
    stages = list(dict.fromkeys(point.stage for point in points))
    assert stages == ["hash_source", "convert", "hash_files"]
    for stage in stages:
        done = [point.percent for point in points if point.stage == stage]
        assert (done[0], done[-1], done) == (0, 100, sorted(done))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even(tmp_path: Path, device: jax.Device) -> None:
    ties = [0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F81_7FFF, 0xBF80_8000, 0xBF81_8000, 0x0000_0001, 0x8000_8000]
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF80, 0xBF82, 0x0000, 0x8000]
    source = MemorySource(config=config(dtype="bfloat16"))
    embed = source.weights["model.embed_tokens.weight"]
    bits = embed.view(np.uint32).reshape(-1)
    bits[: len(ties)] = ties
    manifest = convert(source, tmp_path / "m")
    stored = np.asarray(restore(tmp_path / "m", manifest, device)["embed"]).view(np.uint16).reshape(-1)
    assert stored[: len(ties)].tolist() == expected
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(stored, rounded.astype(np.uint16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"]
)
@pytest.mark.requirement("WORKER-4310")
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path: Path, name: str, dtype: str, value: float) -> None:
    source = MemorySource(config=config(dtype=dtype))
    source.weights[name].reshape(-1)[-1] = value
    message = refusal(source, tmp_path / "m")
    assert name in message
    assert "not finite" in message


def test_a_value_that_is_not_finite_as_bfloat16_only_says_which_dtype_it_needs(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"][3] = np.finfo(np.float32).max
    convert(MemorySource(weights=weights), tmp_path / "float32")
    message = refusal(MemorySource(config=config(dtype="bfloat16"), weights=weights), tmp_path / "bfloat16")
    assert "--dtype=float32" in message


# -- tensors that are not the model's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(random_weights(CONFIG)))
@pytest.mark.requirement("WORKER-4310")
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIG)
    del weights[name]
    assert f"1 tensors of this llama model are missing: {name}" in refusal(
        MemorySource(weights=weights), tmp_path / "m"
    )


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
@pytest.mark.requirement("WORKER-4310")
def test_an_additional_tensor_is_named(tmp_path: Path, name: str) -> None:
    source = MemorySource(weights=random_weights(CONFIG) | {name: np.zeros(16, np.float32)})
    assert f"belong to no part of it: {name}" in refusal(source, tmp_path / "m")


@pytest.mark.parametrize("name", sorted(random_weights(CONFIG)))
@pytest.mark.requirement("WORKER-4310")
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIG)
    wanted = weights[name].shape
    weights[name] = weights[name][:-1]
    message = refusal(MemorySource(weights=weights), tmp_path / "m")
    assert f"{name} has the shape {weights[name].shape}; by the model's configuration it must be {wanted}" in message


def test_many_missing_tensors_are_one_short_sentence(tmp_path: Path) -> None:
    message = refusal(MemorySource(weights={"x" * 1000: np.zeros(1, np.float32)}), tmp_path / "m")
    assert "12 tensors" in message
    assert message.endswith("…")
    assert len(message) < 600


# -- the destination ---------------------------------------------------------------------------------------------------


def test_an_existing_destination_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("content")
    assert "exists: choose another" in refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
    assert (tmp_path / "m" / "mine").read_text() == "content"


def make_file(path: Path) -> None:
    path.write_text("content")


@pytest.mark.parametrize(
    "make",
    [
        make_file,
        lambda path: path.symlink_to(path.with_name("nowhere")),
        lambda path: (path.with_name("empty").mkdir(), path.symlink_to(path.with_name("empty"))),
        os.mkfifo,
    ],
    ids=["file", "dangling link", "link to an empty folder", "fifo"],
)
def test_anything_at_the_destination_is_refused_at_once(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "m")
    source = MemorySource(on_tensor=lambda *_: pytest.fail("converted in vain"))
    assert "exists: choose another" in refusal(source, tmp_path / "m", ErrorCode.INVALID_PARAMS)


@pytest.mark.parametrize("destination", ["/", "/.."])
def test_the_root_folder_is_refused(destination: str) -> None:
    with pytest.raises(OrcdError) as caught:
        convert(MemorySource(), Path(destination))
    assert caught.value.code is ErrorCode.INVALID_PARAMS


def test_an_empty_folder_becomes_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    manifest = convert(MemorySource(), tmp_path / "m")
    assert read_manifest(tmp_path / "m") == manifest


def test_the_folders_above_the_destination_are_made(tmp_path: Path) -> None:
    convert(MemorySource(), tmp_path / "a" / "b" / "m")
    assert (tmp_path / "a" / "b" / "m" / "manifest.json").is_file()


def test_a_relative_destination_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert(MemorySource(), Path("m"))
    assert (tmp_path / "m" / "manifest.json").is_file()


def test_a_file_in_place_of_the_folder_above_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    assert "cannot be written (" in refusal(MemorySource(), tmp_path / "file" / "m", ErrorCode.INVALID_PARAMS)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: tests may run as root, who may write everything."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
    assert message == f"{tmp_path / 'm'} cannot be written (Permission denied)"


def test_a_name_that_is_too_long_is_one_error(tmp_path: Path) -> None:
    assert "File name too long" in refusal(MemorySource(), tmp_path / ("m" * 250), ErrorCode.INVALID_PARAMS)


def test_too_small_a_disk_is_found_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = convert(MemorySource(), tmp_path / "first").weight_bytes

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(count, 0, count))

    free(need)
    source = MemorySource(on_tensor=lambda *_: pytest.fail("converted in vain"))
    assert "GB free: make room" in refusal(source, tmp_path / "m", ErrorCode.INVALID_PARAMS)
    free(need + need // 50)
    convert(MemorySource(), tmp_path / "m")


# -- all or nothing ----------------------------------------------------------------------------------------------------


def stopped_everywhere(tmp_path: Path, convert_until: Callable[[int, type[BaseException]], None]) -> int:
    """Stops a conversion at its first, second, … point until it finishes; the number of points."""
    for point in range(1000):
        error = (Stopped, KeyboardInterrupt)[point % 2]
        try:
            convert_until(point, error)
        except error:
            assert list(tmp_path.iterdir()) == [], f"point {point}"
        else:
            return point
    raise AssertionError("it never finished")


def test_an_exception_at_any_point_of_progress_leaves_nothing(tmp_path: Path) -> None:
    def convert_until(point: int, error: type[BaseException]) -> None:
        seen = 0

        def progress(_: Progress) -> None:
            nonlocal seen
            seen += 1
            if seen > point:
                raise error

        write_checkpoint(MemorySource(), tmp_path / "m", progress, chat_template=None)

    assert stopped_everywhere(tmp_path, convert_until) > 15


def test_an_exception_at_any_tensor_leaves_nothing(tmp_path: Path) -> None:
    def convert_until(point: int, error: type[BaseException]) -> None:
        seen: list[str] = []

        def on_tensor(name: str, _: object) -> None:
            seen.append(name)
            if len(seen) > point:
                raise error

        convert(MemorySource(on_tensor=on_tensor), tmp_path / "m")

    assert stopped_everywhere(tmp_path, convert_until) == len(random_weights(CONFIG))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_at_any_sync_leaves_nothing_and_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The sync of the parent, the last, comes after the rename: by then the checkpoint is whole."""
    synced: list[Path] = []
    monkeypatch.setattr(module, "_sync", synced.append)
    convert(MemorySource(), tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    assert synced[-1] == tmp_path
    for point in range(0, len(synced) - 1, 5):
        calls = iter(range(len(synced)))

        def failing(path: Path, calls: object = calls, point: int = point) -> None:
            if next(calls) == point:  # type: ignore[call-overload]
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, "_sync", failing)
        message = refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
        assert message == f"{tmp_path / 'm'} cannot be written ({os.strerror(number)})"


def test_every_file_and_folder_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Path | str] = []
    rename = Path.rename

    def noted_rename(path: Path, target: Path) -> Path:
        events.extend(["rename"] * (target == tmp_path / "m"))  # Orbax renames too
        return rename(path, target)

    monkeypatch.setattr(module, "_sync", events.append)
    monkeypatch.setattr(Path, "rename", noted_rename)
    convert(MemorySource(), tmp_path / "m")
    partial = tmp_path / ".m.partial"
    written = {partial / path.relative_to(tmp_path / "m") for path in (tmp_path / "m").rglob("*")}
    assert set(events[: events.index("rename")]) == written | {partial}
    assert events[events.index("rename") :] == ["rename", tmp_path]


def test_a_source_that_changes_while_it_is_read_is_told_apart_from_a_full_disk(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone"), ValueError("mmap length is greater than file size")):

        def on_tensor(name: str, _: object, error: Exception = error) -> None:
            if name == "model.layers.0.mlp.up_proj.weight":
                raise error

        message = refusal(MemorySource(on_tensor=on_tensor), tmp_path / "m")
        assert "mlp.gate_proj.weight can no longer be read: did its file change?" in message


def test_a_source_file_that_is_gone_is_one_error(tmp_path: Path) -> None:
    source = MemorySource(paths=(tmp_path / "gone",))
    assert "the source cannot be read (No such file or directory)" in refusal(source, tmp_path / "m")


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("content")
    stale = tmp_path / ".m.partial"
    (stale / "arrays" / "d").mkdir(parents=True)
    (stale / "arrays" / "d" / "old").write_text("old")
    (stale / "manifest.json").write_text("{}")
    (stale / "folder").symlink_to(outside)
    (stale / "file").symlink_to(outside / "kept")
    manifest = convert(MemorySource(), tmp_path / "m")
    verify_files(tmp_path / "m", manifest, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "outside"]
    assert (outside / "kept").read_text() == "content"


@pytest.mark.requirement("WORKER-4320")
def test_a_link_in_place_of_the_partial_folder_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("content")
    (tmp_path / ".m.partial").symlink_to(outside)
    assert "cannot be written" in refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
    assert (outside / "kept").read_text() == "content"


def test_a_second_conversion_into_the_same_destination_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / ".m.partial"
    partial.mkdir()
    (partial / "half").write_text("done")
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        message = refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
        assert "another conversion" in message
        assert (partial / "half").read_text() == "done"
    finally:
        os.close(held)
    convert(MemorySource(), tmp_path / "m")


def test_a_destination_that_appears_while_waiting_for_nobody_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another conversion finishes between the first look at the destination and the lock."""
    flock = fcntl.flock

    def late(held: int, how: int) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "theirs").write_text("content")
        flock(held, how)

    monkeypatch.setattr(fcntl, "flock", late)
    source = MemorySource(on_tensor=lambda *_: pytest.fail("converted in vain"))
    with pytest.raises(OrcdError, match="exists: choose another"):
        convert(source, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_folder_of_a_conversion_that_began_after_the_rename_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_one = tmp_path / ".m.partial"

    def after_the_rename(path: Path) -> None:
        if path == tmp_path:
            next_one.mkdir()

    monkeypatch.setattr(module, "_sync", after_the_rename)
    convert(MemorySource(), tmp_path / "m")
    assert next_one.is_dir()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.requirement("WORKER-4701")
def test_one_array_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """When the next array's first tensor is asked for, no tensor and no array of those before stays alive.

    TensorStore lets go of what it has written in a thread of its own, a moment later: that moment is waited for.
    """
    made = config(dtype=dtype, num_layers=3)
    leaf_of = {name: path for path, leaf in leaves(made).items() for name in leaf.sources}
    alive: dict[int, str] = {}
    numbers = itertools.count()
    changed = threading.Condition()

    def gone(number: int) -> None:
        with changed:
            del alive[number]
            changed.notify_all()

    def track(path: str, array: NDArray[np.generic]) -> None:
        with changed:
            alone = changed.wait_for(lambda: set(alive.values()) <= {path}, timeout=10)
            assert alone, f"{set(alive.values())} is still there when {path} is made"
            number = next(numbers)
            alive[number] = path
        weakref.finalize(array, gone, number)

    def tracked_digest(array: NDArray[np.generic], *, path: str, **rest: object) -> str:
        track(path, array)
        return tensor_digest(array, path=path, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "tensor_digest", tracked_digest)
    convert(MemorySource(config=made, on_tensor=lambda name, array: track(leaf_of[name], array)), tmp_path / "m")
    assert next(numbers) == len(leaf_of) + len(leaves(made))
