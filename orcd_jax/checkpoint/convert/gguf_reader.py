"""A bounded reader of GGUF headers (versions 2 and 3, little-endian).

A GGUF file is untrusted input: every count and length is checked against a limit and against the bytes that are left in
the file before anything is allocated for it. Format: the ``gguf.md`` specification of the ggml project.
"""

from __future__ import annotations

import errno
import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from orcd_jax.checkpoint.convert.gguf_blocks import BLOCKS, TENSOR_TYPES
from orcd_jax.checkpoint.convert.source import shown
from orcd_jax.errors import ErrorCode, OrcdError

MAX_TENSORS = 10_000
MAX_METADATA = 1_000
MAX_STRING_BYTES = 64 * 1024  # the longest string there is: a chat template, of 1 to 16 KB
MAX_ARRAY = 2**21  # elements: the largest vocabularies have 2^18
MAX_DIMS = 4
MAX_DIM = 2**40
ALIGNMENTS = tuple(2**n for n in range(3, 13))

GgufValue = bool | int | float | str | tuple[bool | int | float | str, ...]

_SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<?"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
_STRING, _ARRAY = 8, 9


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
            size = path.stat().st_size
            return _Reader(file, size).header(path)
    except OSError as error:
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED, f"the GGUF file cannot be read: {error.strerror}", field="source"
        ) from None


class _Reader:
    """Reads one header front to back; knows where it is and how much of the file is left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def header(self, path: Path) -> GgufFile:
        magic = self._bytes(4, "magic")
        if magic != b"GGUF":
            raise self._refuse("magic", 0, "GGUF", ascii(magic)[2:-1])
        version = self._scalar("<I", "version")
        if version not in (2, 3):
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            what = "a big-endian file" if swapped in (2, 3) else str(version)
            raise self._refuse("version", 4, "2 or 3, little-endian", what)
        n_tensors = self._count("tensor count", MAX_TENSORS)
        n_metadata = self._count("metadata count", MAX_METADATA)
        metadata: dict[str, GgufValue] = {}
        for _ in range(n_metadata):
            at = self._at
            key = self._string("metadata key", MAX_STRING_BYTES)
            if key in metadata:
                raise self._refuse("metadata key", at, "each key once", f"{shown(key)} twice")
            metadata[key] = self._value(shown(key))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment not in ALIGNMENTS:
            raise self._refuse("general.alignment", self._at, "a power of two from 8 to 4096", shown(str(alignment)))
        infos = [self._tensor_info() for _ in range(n_tensors)]
        data = -(-self._at // alignment) * alignment
        return GgufFile(path, int(version), alignment, metadata, self._place(infos, data, alignment))

    def _tensor_info(self) -> tuple[str, str, tuple[int, ...], int, int]:
        at = self._at
        name = self._string("tensor name", MAX_STRING_BYTES)
        label = shown(name)
        n_dims = self._scalar("<I", f"{label}: n_dims")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._refuse(f"{label}: n_dims", self._at - 4, f"1 to {MAX_DIMS}", str(n_dims))
        dims = []
        for index in range(int(n_dims)):
            dim = int(self._scalar("<Q", f"{label}: dimension {index}"))
            if not 1 <= dim <= MAX_DIM:
                raise self._refuse(f"{label}: dimension {index}", self._at - 8, f"1 to {MAX_DIM}", str(dim))
            dims.append(dim)
        kind = int(self._scalar("<I", f"{label}: type"))
        if kind not in TENSOR_TYPES:
            supported = ", ".join(sorted(BLOCKS))
            raise self._refuse(f"{label}: type", self._at - 4, f"one of {supported}", f"ggml type {kind}")
        type_name = TENSOR_TYPES[kind]
        elements, n_bytes = BLOCKS[type_name]
        if dims[0] % elements:
            raise self._refuse(f"{label}: dimension 0", at, f"a multiple of {elements} for {type_name}", str(dims[0]))
        total = math.prod(dims) // elements * n_bytes
        if total > self._size:
            raise self._refuse(f"{label}: size", at, f"at most the file's {self._size} bytes", f"{total} bytes")
        offset = int(self._scalar("<Q", f"{label}: offset"))
        return name, type_name, tuple(reversed(dims)), offset, total

    def _place(
        self, infos: list[tuple[str, str, tuple[int, ...], int, int]], data: int, alignment: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for name, type_name, shape, offset, n_bytes in infos:
            label = shown(name)
            if name in tensors:
                raise self._refuse(f"{label}: name", self._at, "each tensor once", "it twice")
            if offset % alignment:
                raise self._refuse(f"{label}: offset", self._at, f"a multiple of {alignment}", str(offset))
            if data + offset + n_bytes > self._size:
                raise self._refuse(
                    f"{label}: data",
                    data + offset,
                    f"{n_bytes} bytes inside the file",
                    f"a file that ends at {self._size}: it is truncated or its header is wrong",
                )
            tensors[name] = GgufTensor(name, type_name, shape, data + offset, n_bytes)
        ordered = sorted(tensors.values(), key=lambda t: t.offset)
        for first, second in itertools.pairwise(ordered):
            if first.offset + first.n_bytes > second.offset:
                raise self._refuse(
                    f"{shown(second.name)}: offset", second.offset, "its own bytes", f"those of {shown(first.name)}"
                )
        return tensors

    def _value(self, what: str) -> GgufValue:
        kind = self._kind(what)
        if kind == _STRING:
            return self._string(what, MAX_STRING_BYTES)
        if kind != _ARRAY:
            return self._checked_scalar(kind, what)
        element = self._kind(f"{what}: element")
        if element == _ARRAY:
            raise self._refuse(f"{what}: element", self._at - 4, "no array of arrays", "one")
        count = self._count(what, MAX_ARRAY)
        if element == _STRING:
            if count * 8 > self._left:
                raise self._refuse(what, self._at, f"{count} strings in the {self._left} bytes left", "fewer")
            return tuple(self._string(what, MAX_STRING_BYTES) for _ in range(count))
        form = _SCALARS[element][1]
        raw = self._bytes(count * struct.calcsize(form), what)
        if element == 7 and any(byte > 1 for byte in raw):
            raise self._refuse(what, self._at - len(raw), "booleans 0 or 1", "another byte")
        return tuple(value for (value,) in struct.iter_unpack(form, raw))

    def _checked_scalar(self, kind: int, what: str) -> bool | int | float:
        if kind == 7:
            raw = self._bytes(1, what)
            if raw[0] > 1:
                raise self._refuse(what, self._at - 1, "a boolean 0 or 1", str(raw[0]))
            return bool(raw[0])
        return self._scalar(_SCALARS[kind][1], what)

    def _kind(self, what: str) -> int:
        kind = int(self._scalar("<I", f"{what}: type"))
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise self._refuse(f"{what}: type", self._at - 4, "a GGUF value type from 0 to 12", str(kind))
        return kind

    def _count(self, what: str, most: int) -> int:
        count = int(self._scalar("<Q", what))
        if count > most:
            raise self._refuse(what, self._at - 8, f"at most {most}", str(count))
        return count

    def _string(self, what: str, most: int) -> str:
        length = int(self._scalar("<Q", f"{what}: length"))
        if length > most:
            raise self._refuse(f"{what}: length", self._at - 8, f"at most {most} bytes", str(length))
        at, raw = self._at, self._bytes(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._refuse(what, at + error.start, "UTF-8", "other bytes") from None

    def _scalar(self, form: str, what: str) -> int | float:
        value: int | float = struct.unpack(form, self._bytes(struct.calcsize(form), what))[0]
        return value

    @property
    def _left(self) -> int:
        return self._size - self._at

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._left:
            raise self._refuse(what, self._at, f"{count} bytes", f"{self._left} left: the file is truncated")
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._refuse(what, self._at, f"{count} bytes", f"{len(raw)}: the file changed while it was read")
        self._at += count
        return raw

    @staticmethod
    def _refuse(field: str, offset: int, expected: str, found: str) -> OrcdError:
        return OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"not a valid GGUF file: {field} at byte {offset}: expected {expected}, found {found}",
            field=field,
        )
