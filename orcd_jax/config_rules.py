"""What a value of the configuration must look like, and which values must fit together.

Pure functions: a value is returned as it is used, or refused with ValueError. One that says more than the flag's own
rule does is an :class:`Unfit`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,256}")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_SIZE = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,9})?) ?([kKMGT]?B|[KMGT]iB)?")
_POWER_OF = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


class Unfit(ValueError):
    """A value that is well formed and not allowed all the same; says why and what to do."""


def identifier(value: str) -> str:
    """A name of 1 to 256 letters, digits, ``_`` and ``-``."""
    if not _IDENTIFIER.fullmatch(value):
        raise ValueError
    return value


def sha256(value: str) -> str:
    """64 hex digits, in small letters; empty stays empty."""
    if value and not _SHA256.fullmatch(value):
        raise ValueError
    return value.lower()


def size(value: object) -> object:
    """Text such as ``24GiB``, ``80GB`` or ``1.5 TiB`` as a whole number of bytes; anything but text is left alone."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError
    unit = (match[2] or "").removesuffix("B")
    exact = Fraction(match[1]) * (1024 if unit.endswith("i") else 1000) ** _POWER_OF[unit.removesuffix("i")]
    if exact.denominator != 1:
        raise ValueError
    return exact.numerator


def http_url(value: str) -> str:
    """An ``http`` or ``https`` URL without a password or a fragment; empty stays empty."""
    if value:
        url = urlsplit(value)
        url.port  # noqa: B018 - raises ValueError when it is not a number in range
        hostile = any(c.isspace() or not c.isprintable() for c in value)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.fragment or hostile:
            raise ValueError
    return value


def path(value: Path | None) -> Path | None:
    """A path, with ``~`` for the home directory."""
    if value is None:
        return None
    text = str(value)
    if text == "." or "\0" in text or len(text) > 4096:
        raise ValueError
    return value.expanduser()


def bind_address(value: str, *, exposed_ok: bool) -> str:
    """An IP address as Python writes it. One that other hosts reach is refused unless ``exposed_ok``."""
    address = ipaddress.ip_address("127.0.0.1" if value == "localhost" else value)
    if not address.is_loopback and not exposed_ok:
        raise Unfit(
            "other hosts could reach it and traffic is not encrypted: use 127.0.0.1, give --tls_cert_file, or add "
            "--allow_insecure_bind on a trusted network"
        )
    return str(address)


# -- values that must fit others ---------------------------------------------------------------------------------------
# A rule is given the value and those before it that are valid. Of one that is not, it says nothing: that was said.

Before = Mapping[str, object]


def _emulated_memory(value: object, before: Before) -> None:
    if value and before.get("platform") == "cuda":
        raise Unfit("a GPU has the memory it has; emulate it with --platform=cpu, or leave this out")


def _tls_key(value: object, before: Before) -> None:
    if "tls_cert_file" not in before:
        return
    if value is None and before["tls_cert_file"] is not None:
        raise Unfit("--tls_cert_file needs the private key of the certificate")
    if value is not None and before["tls_cert_file"] is None:
        raise Unfit("it needs --tls_cert_file")


def _tls_client_ca(value: object, before: Before) -> None:
    if value is not None and before.get("tls_cert_file", value) is None:
        raise Unfit("it needs --tls_cert_file and --tls_key_file")


def _control_token(value: object, before: Before) -> None:
    if value is not None and value == before.get("api_token_file"):
        raise Unfit("it is --api_token_file too, so whoever runs jobs could stop the worker: use another file")


def _metrics_port(value: object, before: Before) -> None:
    if isinstance(value, int) and 0 < value < 1024:
        raise ValueError
    if value == before.get("rpc_port"):
        raise Unfit("--rpc_port has it already: choose another")


def _callback(value: object, before: Before) -> None:
    if not value and before.get("standalone") is False:
        raise Unfit("give the pool manager's URL, or --standalone to run without one")
    if value and before.get("standalone"):
        raise Unfit("a standalone worker tells nobody: give either this or --standalone")


def _trusted_keys(value: object, before: Before) -> None:
    if value is None and before.get("signature_file") is not None:
        raise Unfit("--signature_file needs the public keys to check it with")


def _require_pinned(value: object, before: Before) -> None:
    known = {"await_commit", "expected_digest", "signature_file"} <= before.keys()
    if value and known and not any(before[name] for name in ("await_commit", "expected_digest", "signature_file")):
        raise Unfit("nothing pins the model: give --expected_digest or --signature_file, or add --await_commit")


FITS: dict[str, Callable[[object, Before], None]] = {
    "emulated_memory": _emulated_memory,
    "tls_key_file": _tls_key,
    "tls_client_ca_file": _tls_client_ca,
    "control_token_file": _control_token,
    "metrics_port": _metrics_port,
    "readiness_callback_url": _callback,
    "trusted_keys_file": _trusted_keys,
    "require_pinned": _require_pinned,
}
