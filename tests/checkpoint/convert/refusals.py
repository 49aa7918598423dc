"""Why a source cannot be opened or converted: one typed error, which can be shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.tiny import MemorySource, convert


def conversion_refusal(source: MemorySource, destination: Path, code: ErrorCode = ErrorCode.MODEL_LOAD_FAILED) -> str:
    """Why a conversion is refused; nothing of it may be left beside the destination."""
    before = sorted(destination.parent.rglob("*")) if destination.parent.is_dir() else []
    with pytest.raises(OrcdError) as caught:
        convert(source, destination)
    assert caught.value.code is code
    assert (sorted(destination.parent.rglob("*")) if destination.parent.is_dir() else []) == before
    return caught.value.message


def opening_refusal(directory: Path) -> str:
    """Why a directory is refused: one typed error that can be shown."""
    with pytest.raises(OrcdError) as caught:
        open_huggingface(directory, "auto")
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 600
    return caught.value.message.removeprefix("the model cannot be converted: ")
