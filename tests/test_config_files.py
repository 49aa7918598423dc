"""The files a configuration names are looked at before anything starts, all of them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_jax.config import WorkerConfig
from orcd_jax.config_files import lets_others_in, others_can_use, problems_of_files

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NOBODY = 0xFFFFFFFF
ME = os.geteuid()


def made(path: Path, mode: int = 0o600) -> Path:
    path.touch()
    path.chmod(mode)
    return path


def config(folder: Path, **changes: object) -> WorkerConfig:
    (folder / "model").mkdir(exist_ok=True)
    given = {
        "worker_id": "w",
        "pool_id": "p",
        "rpc_port": 50051,
        "standalone": True,
        "model_path": folder / "model",
        "api_token_file": made(folder / "token"),
        **changes,
    }
    return WorkerConfig.model_validate(given)


def access_list(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_files_that_are_there_and_private_are_no_problem(tmp_path: Path) -> None:
    names = ("control_token_file", "callback_token_file", "tls_key_file", "seal_key_file", "identity_key_file")
    public = ("tls_cert_file", "tls_client_ca_file", "signature_file", "trusted_keys_file")
    given: dict[str, object] = {name: made(tmp_path / name, 0o400) for name in names}
    given |= {name: made(tmp_path / name, 0o644) for name in public}
    assert problems_of_files(config(tmp_path, **given, model_root=tmp_path)) == []


@pytest.mark.requirement("WORKER-4912")
def test_everything_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    names = (
        "model_path", "model_root", "api_token_file", "control_token_file", "callback_token_file", "tls_key_file",
        "seal_key_file", "tls_cert_file", "tls_client_ca_file", "signature_file", "trusted_keys_file",
    )  # fmt: skip
    found = problems_of_files(config(tmp_path, **{name: tmp_path / "none" / name for name in names}))
    assert sorted(line.split(":")[0] for line in found) == sorted(f"--{name}" for name in names)
    assert all("cannot be read (No such file or directory)" in line for line in found)


@pytest.mark.requirement("WORKER-4911")
@pytest.mark.requirement("WORKER-4912")
@pytest.mark.parametrize(
    "name",
    [
        "api_token_file",
        "control_token_file",
        "callback_token_file",
        "seal_key_file",
        "identity_key_file",
        "tls_key_file",
    ],
)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_use_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    secret = made(tmp_path / name, mode)
    given = {name: secret, "tls_cert_file": made(tmp_path / "c.pem", 0o644), "tls_key_file": made(tmp_path / "k.pem")}
    (line,) = problems_of_files(config(tmp_path, **{**given, name: secret}))
    assert line.startswith(f"--{name}: ")
    assert line.endswith(f"can be used by others (mode {mode:04o}): run `chmod 600` on it")


def test_a_model_is_not_looked_for_when_commit_will_name_it(tmp_path: Path) -> None:
    assert problems_of_files(config(tmp_path, model_path=tmp_path / "none", await_commit=True)) == []


def test_a_file_is_no_model_and_a_directory_no_token(tmp_path: Path) -> None:
    found = problems_of_files(config(tmp_path, model_path=made(tmp_path / "file"), api_token_file=tmp_path))
    assert found[0].endswith("is not a directory")
    assert found[1].endswith("is not a regular file")


def test_a_pipe_does_not_hold_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (line,) = problems_of_files(config(tmp_path, api_token_file=tmp_path / "pipe"))
    assert line.endswith("is not a regular file")


def test_an_identity_that_the_first_start_makes_needs_its_directory_only(tmp_path: Path) -> None:
    assert problems_of_files(config(tmp_path, identity_key_file=tmp_path / "identity.pem")) == []
    (line,) = problems_of_files(config(tmp_path, identity_key_file=tmp_path / "none" / "identity.pem"))
    assert line.startswith("--identity_key_file:")


def test_one_file_under_two_names_is_still_one_token(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "token")
    (line,) = problems_of_files(config(tmp_path, control_token_file=tmp_path / "link"))
    assert "--api_token_file" in line


# -- access lists, by which a service manager lets one user read root's file -------------------------------------------

CREDENTIAL = access_list(
    (USER_OBJ, 4, NOBODY), (USER, 4, ME), (GROUP_OBJ, 0, NOBODY), (MASK, 4, NOBODY), (OTHER, 0, NOBODY)
)


@pytest.mark.requirement("WORKER-4911")
def test_a_credential_lets_nobody_else_in() -> None:
    assert not lets_others_in(CREDENTIAL, ME)
    assert lets_others_in(CREDENTIAL, ME + 1)


@pytest.mark.requirement("WORKER-4912")
@pytest.mark.parametrize(
    "entry", [(USER, 4, ME + 1), (USER, 2, ME + 1), (GROUP_OBJ, 4, NOBODY), (GROUP, 4, 100), (OTHER, 4, NOBODY)]
)
def test_an_entry_for_anyone_else_lets_others_in(entry: tuple[int, int, int]) -> None:
    assert lets_others_in(access_list((USER_OBJ, 6, NOBODY), (MASK, 7, NOBODY), entry), ME)


@pytest.mark.parametrize("damaged", [b"", b"\2\0\0", b"\3\0\0\0", CREDENTIAL[:-1], CREDENTIAL + b"\0"])
def test_a_list_that_cannot_be_understood_lets_others_in(damaged: bytes) -> None:
    assert lets_others_in(damaged, ME)


@given(st.binary(max_size=64))
def test_any_bytes_are_answered(data: bytes) -> None:
    lets_others_in(data, ME)


@pytest.mark.requirement("WORKER-4911")
def test_a_file_with_the_list_of_a_credential_is_private_whatever_its_mode_looks_like(tmp_path: Path) -> None:
    token, private = made(tmp_path / "token", 0o400), True
    try:
        os.setxattr(token, "system.posix_acl_access", CREDENTIAL)
    except OSError:  # a file system without access lists: then its mode is all there is
        token.chmod(0o440)
        private = False
    assert token.stat().st_mode & 0o777 == 0o440
    assert (problems_of_files(config(tmp_path, api_token_file=token)) == []) is private
    with token.open("rb") as stream:
        assert others_can_use(stream.fileno()) is not private


def test_a_file_of_another_user_with_such_a_list_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made(tmp_path / "token").open("rb") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr(os, "getxattr", lambda *_: CREDENTIAL)
        for owner, private in ((0, True), (ME, True), (ME + 1, False)):
            seen = os.stat_result((0o100440, *status[1:4], owner, *status[5:10]))
            monkeypatch.setattr(os, "fstat", lambda _, seen=seen: seen)
            assert others_can_use(stream.fileno()) is not private
