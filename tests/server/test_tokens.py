"""The token file, and that no token is ever shown."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import pytest

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server import auth
from orcd_jax.server.auth import Tokens, fingerprint, load_tokens

ONE, TWO = "a" * 31 + "1", "b" * 31 + "2"


def token_file(directory: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = directory / "token"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(OrcdError) as caught:
        load_tokens(path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_PARAMS, "api_token_file")
    assert caught.value.message.startswith("--api_token_file: ")
    shown = "".join(traceback.format_exception(caught.value))
    assert ONE not in shown
    assert TWO not in shown
    return caught.value.message


def opens(tokens: Tokens, token: str) -> bool:
    try:
        return tokens.authenticate([f"Bearer {token}"]) == fingerprint(token)
    except OrcdError:
        return False


@pytest.mark.requirement("WORKER-4910")
@pytest.mark.parametrize("content", [ONE, f"{ONE}\n", f"\n  {ONE}\t\r\n\n"])
def test_one_token_with_whatever_blanks_around_it_opens(tmp_path: Path, content: str) -> None:
    tokens = load_tokens(token_file(tmp_path, content))
    assert opens(tokens, ONE)
    assert not opens(tokens, TWO)


@pytest.mark.requirement("WORKER-4201")
def test_two_tokens_open_during_a_rotation(tmp_path: Path) -> None:
    tokens = load_tokens(token_file(tmp_path, f"{ONE}\n{TWO}\n"))
    assert opens(tokens, ONE)
    assert opens(tokens, TWO)


@pytest.mark.requirement("WORKER-4910")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    assert refusal(token_file(tmp_path, ONE, mode)) == (
        f"--api_token_file: others can use it (mode {mode:04o}); run `chmod 600` on it"
    )


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_its_owner_alone_is_accepted(tmp_path: Path, mode: int) -> None:
    assert opens(load_tokens(token_file(tmp_path, ONE, mode)), ONE)


@pytest.mark.requirement("WORKER-4910")
def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none")


@pytest.mark.requirement("WORKER-4910")
@pytest.mark.requirement("WORKER-4913")
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "it holds 0 tokens"),
        (" \n\n", "it holds 0 tokens"),
        (f"{ONE}\n{TWO}\n{'c' * 32}\n", "it holds 3 tokens"),
        (ONE[:-1], "token 1 has 31 characters; it must have 32 to 1024"),
        (f"{ONE}\nshort", "token 2 has 5 characters"),
        ("a" * 1025, "token 1 has 1025 characters"),
        (f"{ONE} {TWO}", "not printable ASCII, or a blank inside"),
        (f"{ONE}\x00", "not printable ASCII"),
        (f"{ONE}é", "not ASCII"),
        (b"\xff\xfe" + ONE.encode(), "not ASCII"),
        (f"{ONE}\n{ONE}\n", "the same token twice"),
        (f"{ONE}\n" + " " * 4096, "it has 4129 bytes; the limit is 4096"),
    ],
)
def test_a_file_that_does_not_hold_one_or_two_good_tokens_is_refused(
    tmp_path: Path, content: str | bytes, problem: str
) -> None:
    assert problem in refusal(token_file(tmp_path, content))


@pytest.mark.requirement("WORKER-4913")
@pytest.mark.parametrize("length", [auth.MIN_TOKEN_CHARS, auth.MAX_TOKEN_CHARS])
def test_the_shortest_and_the_longest_token_open(tmp_path: Path, length: int) -> None:
    assert opens(load_tokens(token_file(tmp_path, "a" * length)), "a" * length)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.timeout(10)
def test_a_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "token"
    os.mkfifo(path, 0o600)
    assert "not a regular file" in refusal(path)


@pytest.mark.requirement("WORKER-4202")
def test_tokens_show_their_fingerprints_and_nothing_else() -> None:
    tokens = Tokens([ONE, TWO])
    assert repr(tokens) == str(tokens) == f"Tokens({fingerprint(ONE)}, {fingerprint(TWO)})"
    with pytest.raises(OrcdError) as caught:
        tokens.authenticate([f"Bearer {ONE}x"])
    assert ONE not in f"{caught.value!r}{caught.value}{caught.value.__cause__}{caught.value.__context__}"


@pytest.mark.requirement("WORKER-4202")
def test_a_fingerprint_is_six_hex_digits_of_the_digest() -> None:
    # printf %s tttttttttttttttttttttttttttttttt | sha256sum
    assert fingerprint("t" * 32) == "8408c6"
