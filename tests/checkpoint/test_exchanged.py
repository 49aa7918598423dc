"""A file that is exchanged after it was looked at is refused, at once, by what is opened and read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orcd_jax.checkpoint import digest as digest_module
from orcd_jax.checkpoint.manifest import Manifest, read_manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.verify import read_verified, verify_files
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.damages import files_below, make_link, make_socket, replaced
from tests.checkpoint.tiny import MemorySource, config, convert


def swapped(copy: Path, manifest: Manifest, name: str, change: Callable[[Path], None]) -> str:
    """Why a checkpoint is refused of which a file changes after all names were looked at and before it is read."""
    calls = 0

    def on_progress(_: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            change(copy / name)

    with pytest.raises(OrcdError) as caught:
        verify_files(copy, manifest, on_progress)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert f"the checkpoint's file {name} " in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (make_link, "Too many levels of symbolic links"),
        (replaced(os.mkfifo), "not a regular file"),
        (replaced(make_socket), "No such device or address"),
        (replaced(lambda path: path.symlink_to("/dev/zero")), "Too many levels of symbolic links"),
        (replaced(Path.mkdir), "not a regular file"),
        (Path.unlink, "No such file or directory"),
        (lambda path: os.link(path, path.with_name("outside")), "it has another name, a hard link"),
    ],
    ids=["link", "fifo", "socket", "link to a device", "folder", "gone", "hard link"],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "arrays/_METADATA"])
@pytest.mark.requirement("WORKER-4320")
def test_a_file_that_is_exchanged_before_it_is_read_is_refused_at_once(
    copy: Path, manifest: Manifest, name: str, change: Callable[[Path], None], reason: str
) -> None:
    """A pipe would wait for its writer, and a device may never end."""
    assert f"cannot be read ({reason})" in swapped(copy, manifest, name, change)


@pytest.mark.requirement("WORKER-4320")
def test_a_folder_that_is_exchanged_for_a_link_is_not_entered(copy: Path, manifest: Manifest, tmp_path: Path) -> None:
    def change(path: Path) -> None:
        outside = path.parent.rename(tmp_path / "outside")
        path.parent.symlink_to(outside)

    only = manifest.model_copy(update={"files": tuple(f for f in manifest.files if f.path == "arrays/_METADATA")})
    for path in files_below(copy):
        if path.name not in ("_METADATA", "manifest.json"):
            path.unlink()
    shutil.rmtree(copy / "arrays" / "d")
    shutil.rmtree(copy / "arrays" / "ocdbt.process_0")
    assert "cannot be read (Not a directory)" in swapped(copy, only, "arrays/_METADATA", change)


def test_a_file_that_grows_while_it_is_read_is_not_followed(
    copy: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who appends faster than the disk reads would keep a load for ever."""
    monkeypatch.setattr(digest_module, "_FILE_BLOCK", 16)
    only = manifest.model_copy(update={"files": tuple(f for f in manifest.files if f.path == "tokenizer.json")})
    (copy / "chat_template.jinja").unlink()
    shutil.rmtree(copy / "arrays")
    size = only.files[0].size_bytes

    def on_progress(progress: Progress) -> None:
        assert progress.done <= size + 16
        with (copy / "tokenizer.json").open("ab") as file:
            file.write(bytes(32 * (progress.done > 0)))

    with pytest.raises(OrcdError, match=r"tokenizer\.json has another SHA-256"):
        verify_files(copy, only, on_progress)


@pytest.mark.requirement("WORKER-4310")
def test_what_is_read_after_the_check_is_compared_once_more(tmp_path: Path) -> None:
    """A file exchanged between its hash and its use is found by the bytes that are used."""
    convert(MemorySource(config=config()), tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    whole = (tmp_path / "m" / "tokenizer.json").read_bytes()
    assert read_verified(tmp_path / "m", manifest, "tokenizer.json", 10**6) == whole
    assert read_verified(tmp_path / "m", manifest, "nothing.json", 10**6) is None
    for changed in (whole[:-1], whole + b" ", whole[:-2] + b"?" + whole[-1:]):
        (tmp_path / "m" / "tokenizer.json").write_bytes(changed)
        with pytest.raises(OrcdError, match=r"tokenizer\.json was changed while the model was loaded"):
            read_verified(tmp_path / "m", manifest, "tokenizer.json", 10**6)
    with pytest.raises(OrcdError, match="over the limit of 3"):
        read_verified(tmp_path / "m", manifest, "tokenizer.json", 3)


@pytest.mark.parametrize(
    "change",
    [make_link, replaced(os.mkfifo), replaced(lambda path: path.symlink_to("/dev/zero")), replaced(Path.mkdir)],
    ids=["link", "fifo", "link to a device", "folder"],
)
@pytest.mark.requirement("WORKER-4320")
def test_what_is_read_after_the_check_is_still_a_regular_file(
    copy: Path, manifest: Manifest, change: Callable[[Path], None]
) -> None:
    change(copy / "tokenizer.json")
    with pytest.raises(OrcdError, match=r"tokenizer\.json cannot be read"):
        read_verified(copy, manifest, "tokenizer.json", 10**6)
