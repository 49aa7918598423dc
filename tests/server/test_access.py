"""Two token files, read at the start and again when asked."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.auth import Access, Identity, Role, Rotation, Tokens, fingerprint
from tests.server.fake_worker import serving
from tests.server.peer import Peer, bearer

ONE, TWO, THREE, FOUR = (letter * 32 for letter in "abcd")


def names(*tokens: str) -> tuple[str, ...]:
    return tuple(fingerprint(token) for token in tokens)


def write(path: Path, *tokens: str, mode: int = 0o600) -> Path:
    path.write_text("\n".join(tokens), encoding="ascii")
    path.chmod(mode)
    return path


@pytest.fixture
def execute(tmp_path: Path) -> Path:
    return write(tmp_path / "execute", ONE)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return write(tmp_path / "control", TWO)


def who(access: Access, token: str) -> Identity | None:
    try:
        return access.authenticate([f"Bearer {token}"])
    except OrcdError:
        return None


@pytest.mark.requirement("WORKER-4200")
def test_a_token_has_the_role_of_its_file(execute: Path, control: Path) -> None:
    access = Access.from_files(execute, control)
    assert who(access, ONE) == Identity(fingerprint(ONE), frozenset({Role.EXECUTE}))
    assert who(access, TWO) == Identity(fingerprint(TWO), frozenset({Role.CONTROL}))
    assert who(access, THREE) is None
    assert access.roles == {Role.EXECUTE, Role.CONTROL}


@pytest.mark.requirement("WORKER-4200")
def test_without_a_second_file_nobody_has_control(execute: Path) -> None:
    access = Access.from_files(execute)
    assert access.roles == {Role.EXECUTE}
    assert who(access, TWO) is None


@pytest.mark.requirement("WORKER-4910")
def test_what_is_wrong_with_the_second_file_is_told_under_its_own_flag(execute: Path, tmp_path: Path) -> None:
    for path in (write(tmp_path / "short", "x"), write(tmp_path / "open", TWO, mode=0o640), tmp_path / "none"):
        with pytest.raises(OrcdError) as caught:
            Access.from_files(execute, path)
        assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_PARAMS, "control_token_file")
        assert caught.value.message.startswith("--control_token_file: ")


@pytest.mark.requirement("WORKER-4200")
def test_the_files_may_not_share_a_token(tmp_path: Path) -> None:
    shared = write(tmp_path / "execute", ONE, TWO), write(tmp_path / "control", TWO, THREE)
    with pytest.raises(OrcdError) as caught:
        Access.from_files(*shared)
    assert caught.value.message == (
        "--control_token_file: it holds a token of --api_token_file, or one with its fingerprint; make another"
    )


# -- rotation ----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4201")
def test_a_rotation_step_by_step(execute: Path, control: Path) -> None:
    access = Access.from_files(execute, control)
    write(execute, ONE, THREE)
    assert access.reload() == Rotation(came=names(THREE), went=())
    assert who(access, ONE)
    assert who(access, THREE)
    write(execute, THREE)
    write(control, FOUR)
    assert access.reload() == Rotation(came=names(FOUR), went=names(ONE, TWO))
    assert [bool(who(access, token)) for token in (ONE, TWO, THREE, FOUR)] == [False, False, True, True]
    assert access.reload() == Rotation((), ())


@pytest.mark.requirement("WORKER-4201")
@pytest.mark.parametrize("bad", ["gone", "too short", "shared", "readable by others", "three"])
def test_when_a_file_is_not_as_it_must_be_the_old_tokens_stay(execute: Path, control: Path, bad: str) -> None:
    access = Access.from_files(execute, control)
    write(execute, THREE)  # good, and not taken either: both or none
    if bad == "gone":
        control.unlink()
    elif bad == "too short":
        write(control, "short")
    elif bad == "shared":
        write(control, THREE)
    elif bad == "readable by others":
        control.chmod(0o644)
    else:
        write(control, ONE, TWO, FOUR)
    with pytest.raises(OrcdError) as caught:
        access.reload()
    assert caught.value.field == "control_token_file"
    assert who(access, ONE)
    assert who(access, TWO)
    assert who(access, THREE) is None


@pytest.mark.requirement("WORKER-4201")
def test_a_server_takes_the_new_tokens_without_a_restart(execute: Path, control: Path) -> None:
    access = Access.from_files(execute, control)
    with serving(access=access) as served, Peer(served.port) as peer:
        assert peer.unary("Ready", metadata=bearer(ONE)).ready
        write(execute, THREE)
        served.on_loop(access.reload)
        assert peer.unary("Ready", metadata=bearer(THREE)).ready
        with pytest.raises(grpc.RpcError) as caught:
            peer.unary("Ready", metadata=bearer(ONE))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


# -- nothing is shown, and the time tells nothing ----------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4202")
def test_access_shows_fingerprints_and_keeps_no_token(execute: Path, control: Path) -> None:
    access = Access.from_files(execute, control)
    assert repr(access) == f"Access(execute=Tokens({fingerprint(ONE)}), control=Tokens({fingerprint(TWO)}))"
    assert access.fingerprints == names(ONE, TWO)
    kept = repr([vars(access), *(vars(tokens) for tokens in access._tokens.values())])
    assert ONE not in kept
    assert TWO not in kept


@pytest.mark.requirement("WORKER-4201")
@pytest.mark.parametrize("presented", [ONE, TWO, THREE, FOUR, "", "x", ONE[:-1], "z" * 1024])
def test_whatever_is_presented_every_token_of_both_roles_is_compared(
    monkeypatch: pytest.MonkeyPatch, presented: str
) -> None:
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("orcd_jax.server.auth.hmac.compare_digest", compare)
    who(Access({Role.EXECUTE: Tokens([ONE, TWO]), Role.CONTROL: Tokens([THREE, FOUR])}), presented)
    assert compared == [(32, 32)] * 4  # of equal length, whatever the length of what was presented
