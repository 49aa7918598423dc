"""The values of flags and files that ``orcd`` takes: each is read whole and refused in one sentence."""

from __future__ import annotations

import argparse
import ipaddress
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

UINT32, UINT64 = 2**32 - 1, 2**64 - 1
MAX_TOKEN_FILE_BYTES = 4096
# gRPC writes a timeout with eight digits.
_MAX_TIMEOUT_S = 99_999_999


class UsageError(Exception):
    """What was given cannot be used; one sentence says what to do."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    """Reads ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
      UsageError: it is neither.
    """
    problem = f"--address: {text[:80]!r} is not HOST:PORT; write it like 127.0.0.1:50051, or [::1]:50051 for IPv6"
    found = re.fullmatch(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})", text)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise UsageError(problem)
    if found["ipv6"]:
        try:
            ipaddress.IPv6Address(found["ipv6"])
        except ValueError:
            raise UsageError(problem) from None
    return Address(found["ipv6"] or found["name"], int(found["port"]))


def token(file: str) -> str:
    """The first token of a file: during a rotation it holds two, and either opens the worker.

    Raises:
      UsageError: there is none in it.
    """
    where = f"--token_file: {file[:200]!r}"
    data = content("token_file", file, MAX_TOKEN_FILE_BYTES, "name the worker's token file")
    first = data.strip().partition(b"\n")[0].strip()
    if not first:
        raise UsageError(f"{where} is empty; put the worker's token into it")
    if not all(0x21 <= byte <= 0x7E for byte in first):
        raise UsageError(f"{where} holds what no token has; a token is printable ASCII without blanks")
    return first.decode("ascii")


def content(flag: str, file: str, most: int, advice: str) -> bytes:
    """The bytes of a small file.

    Args:
      flag: who named it, for the error.
      file: its path.
      most: bytes it may have.
      advice: what to do when it cannot be used.

    Raises:
      UsageError: it cannot be read, or has more.
    """
    where = f"--{flag}: {file[:200]!r}"
    try:
        with Path(file).open("rb") as source:
            data = source.read(most + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        raise UsageError(f"{where} cannot be read ({reason}); {advice}") from None
    if len(data) > most:
        raise UsageError(f"{where} has more than {most} bytes; {advice}")
    return data


def whole(most: int) -> Callable[[str], int]:
    """A type of whole numbers from 0 to ``most``."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) > most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 0 to {most}")
        return int(text)

    return read


def number(text: str) -> float:
    """A number that fits the wire's 32 bits."""
    try:
        value = float(text)
        fits = math.isfinite(value) and math.isfinite(struct.unpack("<f", struct.pack("<f", value))[0])
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number that can be sent; write it like 0.8")
    return value


def seconds(text: str) -> float:
    """A time above 0 that gRPC can express."""
    value = number(text)
    if not 0 < value <= _MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not allowed; it must be above 0, in seconds")
    return value


def digest(text: str) -> str:
    """A model's digest: 64 hex digits, in lower case."""
    return _hex(text, "it must be 64 hex digits, as `orcd ready --json` shows the digest")


def public_key(text: str) -> str:
    """A worker's public key: 64 hex digits, in lower case."""
    return _hex(text, "it must be 64 hex digits, as `orcd ready --json` shows identity_public_key")


def is_unicode(text: str) -> bool:
    """Whether a word of the command line was valid text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hex(text: str, problem: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise argparse.ArgumentTypeError(problem)
    return text.lower()
