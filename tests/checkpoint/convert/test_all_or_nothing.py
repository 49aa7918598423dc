"""A conversion is there whole, on disk, or not at all; and no two are in each other's way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orcd_jax.checkpoint.convert import write as module
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.convert.refusals import conversion_refusal
from tests.checkpoint.tiny import (
    CONFIG,
    MemorySource,
    convert,
    random_weights,
)


class Stopped(Exception):
    """What a test's callback raises; nothing handles it."""


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
        message = conversion_refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
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

        message = conversion_refusal(MemorySource(on_tensor=on_tensor), tmp_path / "m")
        assert "mlp.gate_proj.weight can no longer be read: did its file change?" in message


@pytest.mark.parametrize("change", ["longer", "exchanged", "touched", "gone"])
def test_a_source_that_changes_after_it_was_hashed_is_refused(tmp_path: Path, change: str) -> None:
    """The manifest would name the hash of bytes that are not the ones converted."""
    path = tmp_path / "weights"
    path.write_bytes(b"content")
    status = path.stat()

    def on_tensor(name: str, _: object) -> None:
        if name != "model.norm.weight":
            return
        if change == "longer":
            path.write_bytes(b"content and more")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif change == "exchanged":
            other = path.with_name("other")
            other.write_bytes(b"changed")
            os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
            other.rename(path)
        elif change == "touched":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        else:
            path.unlink()

    with pytest.raises(OrcdError) as caught:
        convert(MemorySource(paths=(path,), on_tensor=on_tensor), tmp_path / "m")
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert ("cannot be read" if change == "gone" else "its files were changed meanwhile") in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["weights"] * (change != "gone")


def test_a_tensor_that_no_memory_holds_is_one_error(tmp_path: Path) -> None:
    """A sparse source may claim any size."""

    def on_tensor(name: str, _: object) -> None:
        if name == "lm_head.weight":
            raise MemoryError

    message = conversion_refusal(MemorySource(on_tensor=on_tensor), tmp_path / "m", ErrorCode.HOST_OOM)
    assert message.startswith("head takes 1536 bytes")


def test_a_source_file_that_is_gone_is_one_error(tmp_path: Path) -> None:
    source = MemorySource(paths=(tmp_path / "gone",))
    assert "the source cannot be read (No such file or directory)" in conversion_refusal(source, tmp_path / "m")


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
    assert "cannot be written" in conversion_refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
    assert (outside / "kept").read_text() == "content"


@pytest.mark.requirement("WORKER-4320")
def test_a_partial_folder_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that all may write to, such as /tmp: its owner could put a link in place of any file of it."""
    partial = tmp_path / ".m.partial"
    partial.mkdir()
    (partial / "theirs").write_text("content")
    monkeypatch.setattr(os, "geteuid", lambda: partial.stat().st_uid + 1)
    message = conversion_refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
    assert message == f"{partial} belongs to another user: remove it, or choose another destination"
    assert (partial / "theirs").read_text() == "content"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
@pytest.mark.requirement("WORKER-4320")
def test_a_link_that_appears_among_the_files_is_not_written_through(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("content")

    def on_tensor(tensor: str, _: object) -> None:
        if tensor == "lm_head.weight":
            (tmp_path / ".m.partial" / name).symlink_to(outside)

    message = conversion_refusal(MemorySource(on_tensor=on_tensor), tmp_path / "m", ErrorCode.INVALID_PARAMS)
    assert message == f"{tmp_path / 'm'} cannot be written (File exists)"
    assert outside.read_text() == "content"


def test_a_second_conversion_into_the_same_destination_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / ".m.partial"
    partial.mkdir()
    (partial / "half").write_text("done")
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        message = conversion_refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
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
