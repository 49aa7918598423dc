"""Bearer tokens: read from a private file, compared in constant time, named in logs by a fingerprint only."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from orcd_jax.errors import ErrorCode, OrcdError

MIN_TOKEN_CHARS = 32
MAX_TOKEN_CHARS = 1024
MAX_TOKENS = 2  # the new one and the old one, while clients change over
_MAX_FILE_BYTES = 4096
_FLAG = "api_token_file"
_SCHEME = "bearer"


class Tokens:
    """The tokens that open the worker. Shows none of them, in any text form."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """Takes the tokens as they were read; ``load_tokens`` checks them."""
        self._known = [(secret.encode(), fingerprint(secret)) for secret in secrets]

    def __repr__(self) -> str:
        return f"Tokens({', '.join(name for _, name in self._known)})"

    def authenticate(self, authorization: Sequence[object]) -> str:
        """Who calls.

        Args:
          authorization: every value of the call's ``authorization`` metadata.

        Returns:
          The fingerprint of the token.

        Raises:
          OrcdError: AUTH_FAILED, in the same words whether it is missing, malformed or wrong.
        """
        values = [value for value in authorization if isinstance(value, str)]
        scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        candidate = given.strip().encode() if scheme.lower() == _SCHEME else b""
        found = ""
        for secret, name in self._known:  # all of them, whichever fits: the time tells nothing
            if hmac.compare_digest(secret, candidate):
                found = name
        if not found:
            raise OrcdError(
                ErrorCode.AUTH_FAILED, 'this call needs the metadata "authorization: Bearer <token>" with a valid token'
            )
        return found


def fingerprint(token: str) -> str:
    """Six hex digits that name a token without telling it."""
    return hashlib.sha256(token.encode()).hexdigest()[:6]


def load_tokens(path: Path) -> Tokens:
    """Reads the token file: one token, or two during a rotation, each on a line of its own.

    Raises:
      OrcdError: INVALID_PARAMS, saying what is wrong with the file and what to do.
    """
    text = _read_private(path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_TOKENS:
        raise _refusal(f"it holds {len(lines)} tokens; put one on a line of its own, or two during a rotation")
    for number, line in enumerate(lines, 1):
        if not MIN_TOKEN_CHARS <= len(line) <= MAX_TOKEN_CHARS:
            raise _refusal(
                f"token {number} has {len(line)} characters; it must have {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS}: "
                "make one with `openssl rand -hex 32`"
            )
        if not all("!" <= character <= "~" for character in line):
            raise _refusal(f"token {number} has a character that is not printable ASCII, or a blank inside")
    if len(set(lines)) != len(lines):
        raise _refusal("it holds the same token twice; leave one")
    return Tokens(lines)


def _read_private(path: Path) -> str:
    """The text of a small regular file that only its owner can read."""
    try:
        # Without O_NONBLOCK a named pipe would hold the start forever.
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _refusal(
            f"it cannot be read ({reason}); make it, with mode 0600, as the user who runs the worker"
        ) from None
    try:
        # Of the open file, not of the path: nobody can exchange it in between.
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal("it is not a regular file")
        if status.st_mode & 0o077:
            raise _refusal(f"others can use it (mode {stat.S_IMODE(status.st_mode):04o}); run `chmod 600` on it")
        if status.st_size > _MAX_FILE_BYTES:
            raise _refusal(f"it has {status.st_size} bytes; the limit is {_MAX_FILE_BYTES}")
        data = os.read(opened, _MAX_FILE_BYTES + 1)
    finally:
        os.close(opened)
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise _refusal("it has a character that is not ASCII") from None


def _refusal(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"--{_FLAG}: {problem}", field=_FLAG)
