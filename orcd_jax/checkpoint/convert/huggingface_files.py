"""The files of a Hugging Face directory: read up to a limit, or one error that names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from orcd_jax.checkpoint import untrusted_json
from orcd_jax.checkpoint.convert.source import shown
from orcd_jax.checkpoint.regular_file import open_regular
from orcd_jax.errors import ErrorCode, OrcdError

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_JSON_VALUES = 500_000

Json = Mapping[str, object]


def read_json(path: Path, *, optional: bool = False) -> Json:
    """The JSON object in a file; empty when the file is not there and need not be.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, naming the file and what is wrong with it.
    """
    if optional and not path.is_file():
        return {}
    raw = read_bytes(path, MAX_JSON_BYTES)
    check_values(path, raw, MAX_JSON_VALUES)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise refuse(path.name, "it is not valid JSON") from None
    if not isinstance(value, dict):
        raise refuse(path.name, "it is not a JSON object")
    return value


def check_values(path: Path, raw: bytes, most: int) -> None:
    """Raises MODEL_LOAD_FAILED when a file's JSON may hold more than ``most`` values."""
    try:
        untrusted_json.check_values(raw, most=most)
    except ValueError:
        raise refuse(path.name, f"it holds more than {most} values") from None


def read_bytes(path: Path, most: int) -> bytes:
    """A file's bytes.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when there are more than ``most``, or they cannot be read.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(raw) > most:
        raise refuse(path.name, f"it is larger than {most} bytes")
    return raw


def unreadable(path: Path, error: Exception) -> OrcdError:
    """Why a file cannot be read: what the system says, else that it is no safetensors."""
    reason = (error.strerror or type(error).__name__) if isinstance(error, OSError) else "truncated or not safetensors"
    return refuse(path.name, f"it cannot be read ({reason})")


def refuse(file: str, problem: str) -> OrcdError:
    """An error about one file."""
    return OrcdError(
        ErrorCode.MODEL_LOAD_FAILED, f"the model cannot be converted: {shown(file)}: {problem}", field=shown(file)
    )
