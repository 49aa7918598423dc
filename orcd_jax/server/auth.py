"""Bearer tokens: read from private files, compared in constant time, named in logs by a fingerprint only.

There are two roles with files of their own: *execute* runs jobs, *control* loads, inspects and ends the worker.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from orcd_jax.config_files import read_private, refusal
from orcd_jax.errors import ErrorCode, OrcdError

MIN_TOKEN_CHARS = 32
MAX_TOKEN_CHARS = 1024
MAX_TOKENS = 2  # the new one and the old one, while clients change over
_MAX_FILE_BYTES = 4096
_SCHEME = "bearer"


class Role(enum.StrEnum):
    """What a token is for."""

    EXECUTE = "execute"
    CONTROL = "control"


TOKEN_FLAGS = {Role.EXECUTE: "api_token_file", Role.CONTROL: "control_token_file"}
"""The flag that names the file of a role's tokens."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls.

    Attributes:
      fingerprint: of the token.
      roles: what it is for.
    """

    fingerprint: str
    roles: frozenset[Role]


@dataclass(frozen=True, slots=True)
class Rotation:
    """What changed when the token files were read again, as fingerprints; for the audit."""

    came: tuple[str, ...]
    went: tuple[str, ...]


class Tokens:
    """The tokens of one role. Keeps their digests only, and shows none of them in any text form."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """Takes the tokens as they were read; ``load_tokens`` checks them."""
        self._digest_of = {fingerprint(secret): _digest(secret.encode()) for secret in secrets}

    def __repr__(self) -> str:
        return f"Tokens({', '.join(self._digest_of)})"

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Names of the tokens, as logs show them."""
        return tuple(self._digest_of)

    @property
    def digests(self) -> Mapping[str, bytes]:
        """Name to SHA-256 of each."""
        return self._digest_of

    def find(self, presented: bytes) -> str:
        """The fingerprint of the token that was presented; empty when it is none of these."""
        given, found = _digest(presented), ""
        for name, digest in self._digest_of.items():  # all of them, whichever fits: the time tells nothing
            if hmac.compare_digest(digest, given):
                found = name
        return found

    def authenticate(self, authorization: Sequence[object]) -> str:
        """Who calls, where there is one role; see :meth:`Access.authenticate`."""
        return self.find(_presented(authorization)) or _refuse()


class Access:
    """The tokens of every role. Owns them, and reads their files again when asked."""

    def __init__(self, tokens: Mapping[Role, Tokens], files: Mapping[Role, Path] | None = None) -> None:
        """Takes tokens as they were read.

        Args:
          tokens: of each role that anybody has.
          files: where they came from, for :meth:`reload`.
        """
        _check_apart(tokens)
        self._tokens = dict(tokens)
        self._files = dict(files or {})

    @classmethod
    def from_files(cls, execute: Path, control: Path | None = None) -> Self:
        """Reads the file of the execute role, and that of the control role if anybody is to have it.

        Raises:
          OrcdError: INVALID_PARAMS, saying what is wrong with which file and what to do.
        """
        files = {Role.EXECUTE: execute} | ({} if control is None else {Role.CONTROL: control})
        return cls(_read_all(files), files)

    def __repr__(self) -> str:
        return f"Access({', '.join(f'{role}={tokens!r}' for role, tokens in self._tokens.items())})"

    @property
    def roles(self) -> frozenset[Role]:
        """The roles that somebody can have."""
        return frozenset(self._tokens)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Names of all tokens, as logs show them."""
        return tuple(name for tokens in self._tokens.values() for name in tokens.fingerprints)

    def authenticate(self, authorization: Sequence[object]) -> Identity:
        """Who calls.

        Args:
          authorization: every value of the call's ``authorization`` metadata.

        Returns:
          The fingerprint of the token, and the role it is for.

        Raises:
          OrcdError: AUTH_FAILED, in the same words whether it is missing, malformed or wrong.
        """
        presented = _presented(authorization)
        found = {role: tokens.find(presented) for role, tokens in self._tokens.items()}  # all of them, as above
        name = "".join(found.values()) or _refuse()  # no token has two roles
        return Identity(name, frozenset(role for role, of in found.items() if of))

    def reload(self) -> Rotation:
        """Reads the files again. The next calls need a token that is there now; to end the others is the caller's part.

        Returns:
          What changed. A token that has changed its role both went and came.

        Raises:
          OrcdError: INVALID_PARAMS: a file is not as it must be; the tokens are the old ones.
        """
        tokens = _read_all(self._files) if self._files else self._tokens
        _check_apart(tokens)
        before = _held(self._tokens)
        self._tokens = dict(tokens)
        now = _held(tokens)
        came = tuple(name for role, name, digest in now if (role, name, digest) not in before)
        went = tuple(name for role, name, digest in before if (role, name, digest) not in now)
        return Rotation(came, went)


def fingerprint(token: str) -> str:
    """Six hex digits that name a token without telling it."""
    return _digest(token.encode()).hex()[:6]


def load_tokens(path: Path, role: Role = Role.EXECUTE) -> Tokens:
    """Reads a token file: one token, or two during a rotation, each on a line of its own.

    Raises:
      OrcdError: INVALID_PARAMS, saying what is wrong with the file and what to do.
    """
    flag = TOKEN_FLAGS[role]
    text = read_private(path, flag, _MAX_FILE_BYTES)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_TOKENS:
        raise refusal(flag, f"it holds {len(lines)} tokens; put one on a line of its own, or two during a rotation")
    for number, line in enumerate(lines, 1):
        if not MIN_TOKEN_CHARS <= len(line) <= MAX_TOKEN_CHARS:
            raise refusal(
                flag,
                f"token {number} has {len(line)} characters; it must have {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS}: "
                "make one with `openssl rand -hex 32`",
            )
        if not all("!" <= character <= "~" for character in line):
            raise refusal(flag, f"token {number} has a character that is not printable ASCII, or a blank inside")
    if len(set(lines)) != len(lines):
        raise refusal(flag, "it holds the same token twice; leave one")
    if len({fingerprint(line) for line in lines}) != len(lines):
        raise refusal(flag, "its tokens have the same fingerprint; make another")
    return Tokens(lines)


def _read_all(files: Mapping[Role, Path]) -> dict[Role, Tokens]:
    return {role: load_tokens(path, role) for role, path in files.items()}


def _held(tokens: Mapping[Role, Tokens]) -> dict[tuple[Role, str, bytes], None]:
    """Who has what, in order: two tokens of one fingerprint are not one."""
    return {(role, name, digest): None for role, of in tokens.items() for name, digest in of.digests.items()}


def _check_apart(tokens: Mapping[Role, Tokens]) -> None:
    """Raises INVALID_PARAMS when two roles share a token, or what logs call it."""
    names = [name for of in tokens.values() for name in of.fingerprints]
    if len(set(names)) != len(names):
        other = TOKEN_FLAGS[Role.EXECUTE]
        raise refusal(
            TOKEN_FLAGS[Role.CONTROL], f"it holds a token of --{other}, or one with its fingerprint; make another"
        )


def _presented(authorization: Sequence[object]) -> bytes:
    """The token of an ``authorization`` header; empty when there is none or it is not well-formed."""
    values = [value for value in authorization if isinstance(value, str)]
    scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return given.strip().encode() if scheme.lower() == _SCHEME else b""


def _refuse() -> NoReturn:
    raise OrcdError(
        ErrorCode.AUTH_FAILED, 'this call needs the metadata "authorization: Bearer <token>" with a valid token'
    )


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
