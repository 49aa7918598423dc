"""JSON that a stranger wrote: its values are counted before it is parsed, and every reader sees the same in it.

``{}`` is three bytes in a list and up to a kilobyte parsed, so a limit on bytes alone is none on memory.
"""

from __future__ import annotations

import json

MAX_FIELDS = 64
"""Of one object. What is compared with a list of fields has one complaint for each that is not in it."""


def check_values(raw: bytes, *, most: int) -> None:
    """Raises ValueError when a text may hold more than ``most`` values. Commas and brackets inside texts count too."""
    if 1 + sum(map(raw.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"more than {most} values")


def load(raw: bytes, *, most: int) -> object:
    """Parses JSON strictly.

    Args:
      raw: the text.
      most: how many values it may hold.

    Raises:
      ValueError: it holds more, is not JSON in UTF-8, is nested too deeply, has an object with a field twice or more
        than ``MAX_FIELDS``, or a number that JSON does not know: NaN or an infinity.
    """
    check_values(raw, most=most)
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_unknown)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MAX_FIELDS:
        raise ValueError(f"an object of more than {MAX_FIELDS} fields")
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a field twice")
    return value


def _unknown(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
