"""A bounded reader of GGUF headers (versions 2 and 3, little-endian).

A GGUF file is untrusted input: every count and length is checked against a limit and against the bytes that are left in
the file before anything is allocated for it. What the limits allow costs at most about eight times the header's bytes.
Format: the ``gguf.md`` specification of the ggml project.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orcd_jax.checkpoint.convert.gguf_blocks import BLOCKS, TENSOR_TYPES
from orcd_jax.checkpoint.convert.source import shown
from orcd_jax.errors import ErrorCode, OrcdError

MAX_HEADER_BYTES = 16 * 1024 * 1024  # metadata and tensor table: those of Llama 3, with 280 147 merges, have 8 MB
MAX_TENSORS = 10_000
MAX_METADATA = 1_000
MAX_STRING_BYTES = 64 * 1024  # the longest string there is: a chat template, of 1 to 16 KB
MAX_ARRAY = 2**21  # elements of all arrays together: tokens, their types and merges of Llama 3 are 2^19
MAX_STRINGS = 2**20  # in all arrays together: each costs some 70 bytes and a microsecond
MAX_DIMS = 4
MAX_DIM = 2**40
ALIGNMENTS = tuple(2**n for n in range(3, 13))

GgufValue = bool | int | float | str | tuple[bool | int | float | str, ...]

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_SIZES = {kind: struct.calcsize(form) for kind, form in _SCALARS.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file.

    Attributes:
      type: name of its block format, such as ``Q4_1``.
      shape: in numpy order: GGUF's dimensions reversed.
      offset: bytes from the start of the file.
      n_bytes: bytes of its blocks.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A validated header: nothing in it points outside the file."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """The raw blocks of a tensor, mapped from the file, not copied."""
        tensor = self.tensors[name]
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.n_bytes,))


def read_gguf(path: Path) -> GgufFile:
    """Reads and validates a GGUF header.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, with the field, its offset, what was expected and what was found.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for its writer
            raise OSError(errno.EISDIR, "it is a folder or a special file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _Reader(file.read(min(size, MAX_HEADER_BYTES)), size).header(path)
    except OSError as error:
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED, f"the GGUF file cannot be read: {error.strerror}", field="source"
        ) from None


class _Reader:
    """Reads one header front to back; knows where it is and how much of the file is left."""

    def __init__(self, head: bytes, size: int) -> None:
        # A file that was cut short since it was measured ends where reading did.
        self._head, self._size = head, size if len(head) == MAX_HEADER_BYTES else len(head)
        self._at, self._elements, self._strings = 0, 0, 0

    def header(self, path: Path) -> GgufFile:
        magic = self._bytes(4, "magic")
        if magic != b"GGUF":
            raise self._refuse("magic", 0, "GGUF", ascii(magic)[2:-1])
        version = self._integer(4, "version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "a big-endian file" if swapped in (2, 3) else str(version)
            raise self._refuse("version", 4, "2 or 3, little-endian", what)
        n_tensors = self._count("tensor count", MAX_TENSORS)
        n_metadata = self._count("metadata count", MAX_METADATA)
        metadata: dict[str, GgufValue] = {}
        for _ in range(n_metadata):
            at = self._at
            key = self._string("metadata key")
            if not key:
                raise self._refuse("metadata key", at, "a name", "none")
            if key in metadata:
                raise self._refuse("metadata key", at, "each key once", f"{shown(key)} twice")
            metadata[key] = self._value(shown(key))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment not in ALIGNMENTS:
            raise self._refuse("general.alignment", self._at, "a power of two from 8 to 4096", shown(str(alignment)))
        infos = [(self._at, self._tensor_info()) for _ in range(n_tensors)]
        data = -(-self._at // alignment) * alignment
        return GgufFile(path, version, alignment, metadata, self._place(infos, data, alignment))

    def _tensor_info(self) -> GgufTensor:
        """One entry of the table; its offset is still from the start of the data."""
        at = self._at
        name = self._string("tensor name")
        if not name:
            raise self._refuse("tensor name", at, "a name", "none")
        label = shown(name)
        n_dims = self._integer(4, f"{label}: n_dims")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._refuse(f"{label}: n_dims", self._at - 4, f"1 to {MAX_DIMS}", str(n_dims))
        first, dims = self._at, []
        for index in range(n_dims):
            dim = self._integer(8, f"{label}: dimension {index}")
            if not 1 <= dim <= MAX_DIM:
                raise self._refuse(f"{label}: dimension {index}", self._at - 8, f"1 to {MAX_DIM}", str(dim))
            dims.append(dim)
        kind = self._integer(4, f"{label}: type")
        if kind not in TENSOR_TYPES:
            supported = ", ".join(sorted(BLOCKS))
            raise self._refuse(f"{label}: type", self._at - 4, f"one of {supported}", f"ggml type {kind}")
        type_name = TENSOR_TYPES[kind]
        elements, n_bytes = BLOCKS[type_name]
        if dims[0] % elements:
            raise self._refuse(
                f"{label}: dimension 0", first, f"a multiple of {elements} for {type_name}", str(dims[0])
            )
        total = math.prod(dims) // elements * n_bytes
        if total > self._size:
            raise self._refuse(f"{label}: size", at, f"at most the file's {self._size} bytes", f"{total} bytes")
        return GgufTensor(name, type_name, tuple(reversed(dims)), self._integer(8, f"{label}: offset"), total)

    def _place(self, infos: list[tuple[int, GgufTensor]], data: int, alignment: int) -> dict[str, GgufTensor]:
        """The tensors by name, each inside the file and apart from the others."""
        tensors: dict[str, GgufTensor] = {}
        for at, info in infos:
            label = shown(info.name)
            if info.name in tensors:
                raise self._refuse(f"{label}: name", at, "each tensor once", "it twice")
            if info.offset % alignment:
                raise self._refuse(f"{label}: offset", at, f"a multiple of {alignment}", str(info.offset))
            tensors[info.name] = placed = replace(info, offset=data + info.offset)
            if placed.offset + placed.n_bytes > self._size:
                raise self._refuse(
                    f"{label}: data",
                    placed.offset,
                    f"{placed.n_bytes} bytes inside the file",
                    f"a file that ends at {self._size}: it is truncated or its header is wrong",
                )
        ordered = sorted(tensors.values(), key=lambda t: t.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.n_bytes > after.offset:
                raise self._refuse(
                    f"{shown(after.name)}: offset", after.offset, "its own bytes", f"those of {shown(before.name)}"
                )
        return tensors

    def _value(self, what: str) -> GgufValue:
        kind = self._kind(what)
        if kind == _STRING:
            return self._string(what)
        if kind != _ARRAY:
            return self._scalar(kind, what)
        element = self._kind(f"{what}: element")
        if element == _ARRAY:
            raise self._refuse(f"{what}: element", self._at - 4, "no array of arrays", "one")
        count = self._count(what, MAX_ARRAY - self._elements)
        self._elements += count
        if element == _STRING:
            self._strings += count
            if self._strings > MAX_STRINGS:
                raise self._refuse(what, self._at - 8, f"at most {MAX_STRINGS} strings in all arrays", "more")
            if count * 8 > self._size - self._at:
                raise self._refuse(
                    what, self._at, f"{count} strings in the {self._size - self._at} bytes left", "fewer"
                )
            return tuple([self._string(what) for _ in range(count)])
        raw = self._bytes(count * _SIZES[element], what)
        if element == _BOOL and raw.strip(b"\0\1"):
            raise self._refuse(what, self._at - len(raw), "booleans 0 or 1", "another byte")
        return struct.unpack(f"<{count}{_SCALARS[element][1:]}", raw)

    def _scalar(self, kind: int, what: str) -> bool | int | float:
        raw = self._bytes(_SIZES[kind], what)
        if kind == _BOOL and raw[0] > 1:
            raise self._refuse(what, self._at - 1, "a boolean 0 or 1", str(raw[0]))
        value: bool | int | float = struct.unpack(_SCALARS[kind], raw)[0]
        return value

    def _kind(self, what: str) -> int:
        kind = self._integer(4, f"{what}: type")
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise self._refuse(f"{what}: type", self._at - 4, "a GGUF value type from 0 to 12", str(kind))
        return kind

    def _count(self, what: str, most: int) -> int:
        count = self._integer(8, what)
        if count > most:
            raise self._refuse(what, self._at - 8, f"at most {most}", str(count))
        return count

    def _string(self, what: str) -> str:
        # Without a call where all is well: a vocabulary and its merges are hundreds of thousands of strings.
        start = self._at + 8
        length = int.from_bytes(self._head[self._at : start], "little")
        if length > MAX_STRING_BYTES or start + length > len(self._head):
            length = self._integer(8, f"{what}: length")
            if length > MAX_STRING_BYTES:
                raise self._refuse(f"{what}: length", start - 8, f"at most {MAX_STRING_BYTES} bytes", str(length))
            self._bytes(length, what)
        self._at = start + length
        try:
            return self._head[start : self._at].decode()
        except UnicodeDecodeError as error:
            raise self._refuse(what, start + error.start, "UTF-8", "other bytes") from None

    def _integer(self, size: Literal[4, 8], what: str) -> int:
        return int.from_bytes(self._bytes(size, what), "little")

    def _bytes(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > self._size:
            left = self._size - self._at
            raise self._refuse(what, self._at, f"{count} bytes", f"{left} left: the file is truncated")
        if end > len(self._head):
            raise self._refuse(what, self._at, f"a header of at most {MAX_HEADER_BYTES} bytes", "a longer one")
        raw = self._head[self._at : end]
        self._at = end
        return raw

    @staticmethod
    def _refuse(field: str, offset: int, expected: str, found: str) -> OrcdError:
        return OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"not a valid GGUF file: {field} at byte {offset}: expected {expected}, found {found}",
            field=field,
        )
