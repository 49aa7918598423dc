"""The destination of a conversion: a name that is free, on a disk with room, or one error."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.convert.refusals import conversion_refusal
from tests.checkpoint.tiny import (
    MemorySource,
    convert,
)


def test_an_existing_destination_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("content")
    assert "exists: choose another" in conversion_refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
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
    assert "exists: choose another" in conversion_refusal(source, tmp_path / "m", ErrorCode.INVALID_PARAMS)


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
    assert "cannot be written (" in conversion_refusal(
        MemorySource(), tmp_path / "file" / "m", ErrorCode.INVALID_PARAMS
    )


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: tests may run as root, who may write everything."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = conversion_refusal(MemorySource(), tmp_path / "m", ErrorCode.INVALID_PARAMS)
    assert message == f"{tmp_path / 'm'} cannot be written (Permission denied)"


def test_a_name_that_is_too_long_is_one_error(tmp_path: Path) -> None:
    assert "File name too long" in conversion_refusal(MemorySource(), tmp_path / ("m" * 250), ErrorCode.INVALID_PARAMS)


def test_too_small_a_disk_is_found_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = convert(MemorySource(), tmp_path / "first").weight_bytes

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(count, 0, count))

    free(need)
    source = MemorySource(on_tensor=lambda *_: pytest.fail("converted in vain"))
    assert "GB free: make room" in conversion_refusal(source, tmp_path / "m", ErrorCode.INVALID_PARAMS)
    free(need + need // 50)
    convert(MemorySource(), tmp_path / "m")
