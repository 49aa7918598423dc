"""Single changes of a GGUF file that was taken apart, and ways to write one to disk."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from tests.checkpoint.convert.gguf_mutants import Parts
from tests.checkpoint.convert.tiny_gguf import array, text

Edit = Callable[[Parts], object]


def put(key: str, value: bytes) -> Edit:
    """A pair with this key has this value."""

    def edit(parts: Parts) -> None:
        parts.pairs[parts.place(key.encode())] = (key.encode(), value)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda parts: [edit(parts) for edit in edits]


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def u64(value: int) -> bytes:
    return struct.pack("<IQ", 10, value)


def f32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def string(value: str | bytes) -> bytes:
    return struct.pack("<I", 8) + text(value)


def strings(*values: str | bytes) -> bytes:
    return array(8, len(values), b"".join(map(text, values)))


def tensor(**fields: object) -> Edit:
    """The first tensor, ``token_embd.weight``, tells this of itself."""

    def edit(parts: Parts) -> None:
        for name, value in fields.items():
            setattr(parts.tensors[0], name, value)

    return edit


def written(path: Path, parts: Parts) -> Path:
    path.write_bytes(parts.encoded())
    return path


def sparse(path: Path, size: int, head: bytes) -> Path:
    """A file that claims much and takes no room: zeros after its head."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path
