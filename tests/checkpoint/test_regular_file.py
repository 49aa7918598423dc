"""What is opened is a regular file, whatever its name led to a moment ago; nothing waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orcd_jax.checkpoint.regular_file import open_listed, open_regular


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``a/b/file``, and beside it what is no file, or another name of one."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "a" / "pipe")
    (tmp_path / "a" / "link").symlink_to("b/file")
    (tmp_path / "a" / "zero").symlink_to("/dev/zero")
    (tmp_path / "linked").symlink_to("a")
    (tmp_path / "a" / "linked").symlink_to("b")
    return tmp_path


def test_a_regular_file_is_read(folder: Path) -> None:
    for file in (
        open_regular(folder / "a/b/file"),
        open_listed(folder, "a/b/file"),
        open_listed(folder / "a/b", "file"),
    ):
        with file:
            assert file.read() == b"content"


def test_a_link_to_a_regular_file_is_followed_where_nothing_is_listed(folder: Path) -> None:
    with open_regular(folder / "a/link") as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("name", ["a", "a/pipe", "a/zero"])
@pytest.mark.requirement("WORKER-4320")
def test_what_is_no_regular_file_is_refused_at_once(folder: Path, name: str) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(folder / name)


@pytest.mark.parametrize("name", ["a", "a/pipe", "a/zero", "a/link", "linked/b/file", "a/linked/file", "a/b/none"])
@pytest.mark.requirement("WORKER-4320")
def test_below_a_directory_no_link_is_followed(folder: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"regular file|symbolic links|Not a directory|No such file"):
        open_listed(folder, name)


@pytest.mark.requirement("WORKER-4320")
def test_the_directory_itself_may_be_reached_through_a_link(folder: Path) -> None:
    with open_listed(folder / "linked", "b/file") as file:
        assert file.read() == b"content"


@pytest.mark.requirement("WORKER-4320")
def test_a_listed_file_has_one_name(folder: Path) -> None:
    os.link(folder / "a/b/file", folder / "other")
    with pytest.raises(OSError, match="hard link"):
        open_listed(folder, "a/b/file")
    with open_regular(folder / "a/b/file") as file:
        assert file.read() == b"content"


def test_nothing_stays_open(folder: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for name in ("a", "a/pipe", "a/link", "a/linked/file", "a/b/none", "x/y"):
        for directory, below in ((folder, name), (folder / name, "none")):
            with pytest.raises(OSError, match=r"[a-z]"):
                open_listed(directory, below)
    with open_listed(folder, "a/b/file"):
        assert opened() == before + 1
    assert opened() == before
