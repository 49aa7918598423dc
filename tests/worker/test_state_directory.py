"""The directory of a worker: where it is, who may use it, and that one process has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker.state_directory import StateDirectory, base_directory

ROOT = Path(__file__).parent.parent.parent


def refusal(state_dir: Path | None, worker_id: str = "w1", **environment: str) -> OrcdError:
    with pytest.raises(OrcdError) as caught:
        StateDirectory.open(state_dir, worker_id, environment)
    return caught.value


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_directory_and_what_is_in_it_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        state = StateDirectory.open(tmp_path / "a" / "b", "w1", {})
    finally:
        os.umask(before)
    assert state.path == tmp_path / "a" / "b" / "w1"
    assert [mode(path) for path in (state.path, state.plans, state.audit)] == [0o700] * 3
    assert (state.identity, state.restarts) == (state.path / "identity.pem", state.path / "restarts.json")
    state.close()


@pytest.mark.parametrize(
    ("given", "environment", "used"),
    [
        ("/flag", {"STATE_DIRECTORY": "/service", "HOME": "/home/u"}, "/flag"),
        (None, {"STATE_DIRECTORY": "/service", "HOME": "/home/u"}, "/service"),
        (None, {"STATE_DIRECTORY": "/service:/other"}, "/service"),
        (None, {"STATE_DIRECTORY": "", "HOME": "/home/u"}, "/home/u/.local/state/orcd-jax"),
    ],
)
def test_the_flag_goes_before_the_service_manager_before_the_home(
    given: str | None, environment: dict[str, str], used: str
) -> None:
    assert base_directory(None if given is None else Path(given), environment) == Path(used)


def test_the_flag_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_directory(Path("state"), {}) == tmp_path / "state"


@pytest.mark.parametrize("environment", [{}, {"HOME": "here"}, {"STATE_DIRECTORY": "here", "HOME": "/home/u"}])
def test_without_an_absolute_path_it_is_asked_for(environment: dict[str, str]) -> None:
    error = refusal(None, **environment)
    assert error.code is ErrorCode.INVALID_PARAMS
    assert "give --state_dir" in error.message


@pytest.mark.parametrize("bits", [0o750, 0o707, 0o720])
def test_a_directory_that_others_can_use_is_refused(tmp_path: Path, bits: int) -> None:
    (tmp_path / "w1").mkdir()
    (tmp_path / "w1").chmod(bits)
    error = refusal(tmp_path)
    assert error.field == "state_dir"
    assert f"others can use it (mode {bits:04o}): run `chmod 700` on it" in error.message


@pytest.mark.parametrize(("bits", "refused"), [(0o755, False), (0o1777, False), (0o777, True), (0o770, True)])
def test_a_place_where_others_could_exchange_it_is_refused(tmp_path: Path, bits: int, refused: bool) -> None:
    base = tmp_path / "base"
    base.mkdir()
    base.chmod(bits)
    if refused:
        assert "others can write it" in refusal(base).message
    else:
        StateDirectory.open(base, "w1", {}).close()


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "w1").symlink_to(tmp_path / "private")
    assert "is not a directory" in refusal(tmp_path).message


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w1").touch()
    assert "is not a directory" in refusal(tmp_path).message
    (tmp_path / "base").touch()
    assert "cannot be used" in refusal(tmp_path / "base").message


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w1").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert "it belongs to another user" in refusal(tmp_path).message


def test_names_that_differ_have_directories_that_differ_however_long(tmp_path: Path) -> None:
    first, second = (StateDirectory.open(tmp_path, "x" * 255 + end, {}) for end in "ab")
    assert first.path != second.path
    assert first.path.name.startswith("x" * 200)
    first.close()
    second.close()


# -- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4020")
def test_a_second_process_of_the_same_worker_is_refused_by_name(tmp_path: Path) -> None:
    first = StateDirectory.open(tmp_path, "w1", {})
    error = refusal(tmp_path)
    assert (error.code, error.field) == (ErrorCode.BUSY, "worker_id")
    assert error.message.startswith(f"worker w1 runs as process {os.getpid()}: stop that one")
    StateDirectory.open(tmp_path, "w2", {}).close()
    first.close()
    StateDirectory.open(tmp_path, "w1", {}).close()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from orcd_jax.worker.state_directory import StateDirectory\n"
        "StateDirectory.open(Path(sys.argv[1]), 'w1', {})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -9
    assert (tmp_path / "w1" / "lock").exists()
    StateDirectory.open(tmp_path, "w1", {}).close()


def test_a_program_that_the_worker_starts_does_not_hold_its_directory(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path, "w1", {})
    command = [sys.executable, "-c", "print('here', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, close_fds=False) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        state.close()
        StateDirectory.open(tmp_path, "w1", {}).close()
        other.communicate("\n")
