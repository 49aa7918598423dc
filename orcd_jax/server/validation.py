"""The rules that fields of requests obey. Every refusal names the field, the rule and the limit, never a text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from orcd_jax.errors import ErrorCode, OrcdError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 256
MAX_CHAT_MESSAGES = 1024
MAX_DETOKENIZE_IDS = 1_048_576
MAX_TOKEN_ID = 2**31 - 1
MIN_NONCE_BYTES, MAX_NONCE_BYTES = 16, 64

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,256}")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_MODEL_REF = re.compile(r"[A-Za-z0-9\-_/:.@=]{1,512}")
_IDENTIFIER_RULE = "1 to 256 of A-Z a-z 0-9 _ -"


def refusal(field: str, problem: str) -> OrcdError:
    """A field that breaks a rule."""
    return OrcdError(ErrorCode.INVALID_PARAMS, f"{field}: {problem}", field=field)


def identifier(field: str, value: str) -> str:
    """A name that somebody chose (WORKER-4300)."""
    if not value:
        raise refusal(field, f"missing; it must be {_IDENTIFIER_RULE}")
    if not _IDENTIFIER.fullmatch(value):
        raise refusal(field, f"{_count(value)} that are not all allowed; it must be {_IDENTIFIER_RULE}")
    return value


def optional_identifier(field: str, value: str) -> str:
    """A name, or nothing."""
    return identifier(field, value) if value else ""


def optional_digest(field: str, value: str) -> str:
    """A SHA-256 as 64 hex digits, in lower case; or nothing (WORKER-4303)."""
    if value and not _DIGEST.fullmatch(value):
        raise refusal(field, f"{_count(value)}, or not all of them hex digits; it must be exactly 64 hex digits")
    return value.lower()


def optional_model_ref(field: str, value: str) -> str:
    """A model reference in form, or nothing (WORKER-4300); what it means is found out where models are found."""
    if value and not _MODEL_REF.fullmatch(value):
        raise refusal(
            field, f"{_count(value)} that are not all allowed; it must be 1 to 512 of A-Z a-z 0-9 - _ / : . @ ="
        )
    return value


def nonce(field: str, value: bytes) -> bytes:
    """Bytes that a caller has not used before."""
    if not MIN_NONCE_BYTES <= len(value) <= MAX_NONCE_BYTES:
        raise refusal(field, f"{len(value)} bytes; it must have {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES}")
    return value


def text(field: str, value: str, *, most: int, least: int = 1) -> str:
    """A text of ``least`` to ``most`` characters, valid UTF-8 and without NUL (WORKER-4301)."""
    if not least <= len(value) <= most:
        raise refusal(field, f"{_count(value)}; it must have {least} to {most}")
    if "\0" in value:
        raise refusal(field, "it holds a NUL character; leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refusal(field, "it holds half a surrogate pair; it must be valid UTF-8") from None
    return value


def integer(field: str, value: int, *, least: int, most: int) -> int:
    """An integer within bounds, both included (WORKER-4302)."""
    if not least <= value <= most:
        shown = value if -(2**63) <= value < 2**64 else "an integer beyond 64 bits"
        raise refusal(field, f"{shown} is not allowed; it must be {least} to {most}")
    return value


def number(field: str, value: float, *, least: float, most: float, least_excluded: bool = False) -> float:
    """A finite number within bounds (WORKER-4302)."""
    too_low = value <= least if least_excluded else value < least
    if not math.isfinite(value) or too_low or value > most:
        rule = f"above {least:g} and at most {most:g}" if least_excluded else f"{least:g} to {most:g}"
        raise refusal(field, f"{value:g} is not allowed; it must be {rule}")
    return value


def token_ids(field: str, values: Sequence[int], *, most: int, least: int = 0, vocab_size: int = 0) -> tuple[int, ...]:
    """Token ids, each below ``vocab_size`` when that is known."""
    if not least <= len(values) <= most:
        raise refusal(field, f"{len(values)} token ids; there must be {least} to {most}")
    largest = vocab_size - 1 if vocab_size else MAX_TOKEN_ID
    if values and not 0 <= min(values) <= max(values) <= largest:
        raise refusal(field, f"a token id is not allowed; each must be 0 to {largest}")
    return tuple(values)


def stop_strings(field: str, values: Sequence[str]) -> tuple[str, ...]:
    """Strings that end a job."""
    if len(values) > MAX_STOP_STRINGS:
        raise refusal(field, f"{len(values)} strings; there must be at most {MAX_STOP_STRINGS}")
    return tuple(text(field, value, most=MAX_STOP_CHARS) for value in values)


def absent(field: str, is_set: bool) -> None:
    """A field that this version of the worker does not know how to honour: refused, rather than ignored."""
    if is_set:
        raise refusal(field, "this worker does not support it; leave it out")


def _count(value: str) -> str:
    return f"{len(value)} character{'' if len(value) == 1 else 's'}"
