"""A bounded reader of GGUF headers (versions 2 and 3, little-endian).

A GGUF file is untrusted input: every count and length is checked against a limit and against the bytes that are left in
the file before anything is allocated for it. A header at every limit takes less than half a second and 48 MB.
Format: the ``gguf.md`` specification of the ggml project.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orcd_jax.checkpoint.convert.gguf_blocks import BLOCKS, TENSOR_TYPES
from orcd_jax.checkpoint.convert.gguf_metadata import PREFIX, Metadata, Strings
from orcd_jax.checkpoint.convert.source import shown
from orcd_jax.checkpoint.regular_file import open_regular
from orcd_jax.errors import ErrorCode, OrcdError

MAX_HEADER_BYTES = 16 * 1024 * 1024  # metadata and tensor table: those of Llama 3, with 280 147 merges, have 8 MB
MAX_TENSORS = 10_000
MAX_METADATA = 1_000
MAX_STRING_BYTES = 64 * 1024  # the longest string there is: a chat template, of 1 to 16 KB
MAX_NAME_BYTES = 64  # of a tensor; the format's own limit
MAX_ARRAY = 2**21  # elements of all arrays together: tokens, their types and merges of Llama 3 are 2^19
MAX_STRINGS = 700_000  # in all arrays together: the tokens and merges of Llama 3 are 408 403
MAX_DIMS = 4
MAX_DIM = 2**40
ALIGNMENTS = tuple(2**n for n in range(3, 13))

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
_DTYPES = {kind: np.dtype(form) for kind, form in _SCALARS.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")
_REST = {n_dims: struct.Struct(f"<{n_dims}QIQ") for n_dims in range(1, MAX_DIMS + 1)}
"""What follows the number of a tensor's dimensions: they, its type and its offset."""


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
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """The raw blocks of a tensor, read from the file.

        Raises:
          OrcdError: MODEL_LOAD_FAILED, when they are no longer there.
        """
        tensor = self.tensors[name]
        raw = np.empty(tensor.n_bytes, np.uint8)
        try:
            with open_regular(self.path) as file:  # not mapped: a mapped file that is cut short ends the process
                file.seek(tensor.offset)
                if file.readinto(raw.data) != tensor.n_bytes:
                    raise OSError(errno.EIO, "it was cut short")
        except OSError as error:
            raise OrcdError(
                ErrorCode.MODEL_LOAD_FAILED,
                f"the GGUF file cannot be read any more: {shown(name)}: {error.strerror}: did the file change?",
                field=shown(name),
            ) from None
        return raw


def read_gguf(path: Path) -> GgufFile:
    """Reads and validates a GGUF header.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, with the field, its offset, what was expected and what was found.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            return _Reader(file.read(min(size, MAX_HEADER_BYTES)), size).header(path)
    except OSError as error:
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED, f"the GGUF file cannot be read: {error.strerror}", field="source"
        ) from None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the tensor table as it stands; ``offset`` is from the start of the data."""

    at: int
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class _Reader:
    """Reads one header front to back; knows where it is, whose part it reads, and how much of the file is left."""

    def __init__(self, head: bytes, size: int) -> None:
        # A file that was cut short since it was measured ends where reading did.
        self._head, self._size = head, size if len(head) == MAX_HEADER_BYTES else len(head)
        self._at, self._elements, self._strings = 0, 0, 0
        self._of = ""  # the key or tensor that is being read: errors name it

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
        metadata = self._metadata(n_metadata)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment not in ALIGNMENTS:
            raise self._refuse("general.alignment", self._at, "a power of two from 8 to 4096", _brief(alignment))
        entries = [self._entry() for _ in range(n_tensors)]
        data = -(-self._at // alignment) * alignment
        return GgufFile(path, version, alignment, metadata, self._place(entries, data, alignment))

    # -- metadata ------------------------------------------------------------------------------------------------------

    def _metadata(self, count: int) -> Metadata:
        found: dict[str, bool | int | float | bytes | Strings | NDArray[np.generic]] = {}
        for _ in range(count):
            at = self._at
            raw = self._text("metadata key", MAX_STRING_BYTES)
            if not raw:
                raise self._refuse("metadata key", at, "a name", "none")
            if not raw.isascii():  # as the format has it; its other bytes would take four times their room
                raise self._refuse("metadata key", at, "ASCII", "other characters")
            key = raw.decode()
            if key in found:
                raise self._refuse("metadata key", at, "each key once", f"{shown(key)} twice")
            self._of = key
            found[key] = self._value()
            self._of = ""
        return Metadata(found)

    def _value(self) -> bool | int | float | bytes | Strings | NDArray[np.generic]:
        kind = self._kind("type")
        if kind == _STRING:
            return self._text("", MAX_STRING_BYTES)
        if kind != _ARRAY:
            raw = self._bytes(_DTYPES[kind].itemsize, "")
            if kind == _BOOL and raw[0] > 1:
                raise self._refuse("", self._at - 1, "a boolean 0 or 1", str(raw[0]))
            value: bool | int | float = struct.unpack(_SCALARS[kind], raw)[0]
            return value
        element = self._kind("element: type")
        if element == _ARRAY:
            raise self._refuse("element", self._at - 4, "no array of arrays", "one")
        count = self._count("", MAX_ARRAY - self._elements)
        self._elements += count
        return self._array_of_strings(count) if element == _STRING else self._array_of_numbers(element, count)

    def _array_of_numbers(self, kind: int, count: int) -> NDArray[np.generic]:
        start = self._at
        self._pass(count * _DTYPES[kind].itemsize, "")
        if kind == _BOOL and np.frombuffer(self._head, np.uint8, count, start).max(initial=0) > 1:
            raise self._refuse("", start, "booleans 0 or 1", "another byte")
        return np.frombuffer(self._head, _DTYPES[kind], count, start)

    def _array_of_strings(self, count: int) -> Strings:
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self._refuse("", self._at - 8, f"at most {MAX_STRINGS} strings in all arrays", "more")
        if count * PREFIX > self._size - self._at:
            raise self._refuse("", self._at, f"{count} strings in the {self._size - self._at} bytes left", "fewer")
        # A vocabulary and its merges are hundreds of thousands of strings: what is done for each is done here.
        head, length_at, bounds = self._head, _LENGTH.unpack_from, array("I", [self._at])
        at, end, append = self._at, len(head) - PREFIX, bounds.append
        for _ in range(count):
            if at > end:
                break
            (length,) = length_at(head, at)
            if length > MAX_STRING_BYTES:
                break
            at += PREFIX + length
            append(at)
        if len(bounds) <= count or at > len(head):  # the one where it ended is wrong
            self._at = bounds[-1] if at <= len(head) else bounds[-2]
            self._text("", MAX_STRING_BYTES)
        self._at = at
        strings = Strings(head, bounds)
        if (wrong := strings.first_wrong()) is not None:
            raise self._refuse("", wrong, "UTF-8", "other bytes")
        return strings

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _entry(self) -> _Entry:
        at, self._of = self._at, ""
        name = self._text("tensor name", MAX_NAME_BYTES).decode()
        if not name:
            raise self._refuse("tensor name", at, "a name", "none")
        self._of = name
        n_dims = self._integer(4, "n_dims")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._refuse("n_dims", self._at - 4, f"1 to {MAX_DIMS}", str(n_dims))
        first, rest = self._at, _REST[n_dims]
        *dims, kind, offset = rest.unpack(self._bytes(rest.size, "dimensions"))
        for index, dim in enumerate(dims):
            if not 1 <= dim <= MAX_DIM:
                raise self._refuse(f"dimension {index}", first + 8 * index, f"1 to {MAX_DIM}", str(dim))
        if kind not in TENSOR_TYPES:
            supported = ", ".join(sorted(BLOCKS))
            raise self._refuse("type", first + 8 * n_dims, f"one of {supported}", f"ggml type {kind}")
        type_name = TENSOR_TYPES[kind]
        elements, n_bytes = BLOCKS[type_name]
        if dims[0] % elements:
            raise self._refuse("dimension 0", first, f"a multiple of {elements} for {type_name}", str(dims[0]))
        total = math.prod(dims) // elements * n_bytes
        if total > self._size:
            raise self._refuse("size", at, f"at most the file's {self._size} bytes", f"{total} bytes")
        return _Entry(at, name, type_name, tuple(reversed(dims)), offset, total)

    def _place(self, entries: list[_Entry], data: int, alignment: int) -> dict[str, GgufTensor]:
        """The tensors by name, each inside the file and apart from the others."""
        tensors: dict[str, GgufTensor] = {}
        for entry in entries:
            self._of = entry.name
            if entry.name in tensors:
                raise self._refuse("name", entry.at, "each tensor once", "it twice")
            if entry.offset % alignment:
                raise self._refuse("offset", entry.at, f"a multiple of {alignment}", str(entry.offset))
            start = data + entry.offset
            if start + entry.n_bytes > self._size:
                raise self._refuse(
                    "data",
                    start,
                    f"{entry.n_bytes} bytes inside the file",
                    f"a file that ends at {self._size}: it is truncated or its header is wrong",
                )
            tensors[entry.name] = GgufTensor(entry.name, entry.type, entry.shape, start, entry.n_bytes)
        for before, after in itertools.pairwise(sorted(tensors.values(), key=lambda t: t.offset)):
            if before.offset + before.n_bytes > after.offset:
                self._of = after.name
                raise self._refuse("offset", after.offset, "its own bytes", f"those of {shown(before.name)}")
        return tensors

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _kind(self, what: str) -> int:
        kind = self._integer(4, what)
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise self._refuse(what, self._at - 4, "a GGUF value type from 0 to 12", str(kind))
        return kind

    def _count(self, what: str, most: int) -> int:
        count = self._integer(8, what)
        if count > most:
            raise self._refuse(what, self._at - 8, f"at most {most}", str(count))
        return count

    def _text(self, what: str, most: int) -> bytes:
        """A string's bytes, which are UTF-8."""
        where = f"{what}: length".removeprefix(": ")
        length = self._integer(PREFIX, where)
        if length > most:
            raise self._refuse(where, self._at - PREFIX, f"at most {most} bytes", str(length))
        start = self._at
        raw = self._bytes(length, what)
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise self._refuse(what, start + error.start, "UTF-8", "other bytes") from None
        return raw

    def _integer(self, size: Literal[4, 8], what: str) -> int:
        return int.from_bytes(self._bytes(size, what), "little")

    def _bytes(self, count: int, what: str) -> bytes:
        self._pass(count, what)
        return self._head[self._at - count : self._at]

    def _pass(self, count: int, what: str) -> None:
        """Goes on by some bytes, which are there."""
        end = self._at + count
        if end > self._size:
            left = self._size - self._at
            raise self._refuse(what, self._at, f"{count} bytes", f"{left} left: the file is truncated")
        if end > len(self._head):
            raise self._refuse(what, self._at, f"a header of at most {MAX_HEADER_BYTES} bytes", "a longer one")
        self._at = end

    def _refuse(self, what: str, offset: int, expected: str, found: str) -> OrcdError:
        field = ": ".join(part for part in (shown(self._of), what) if part)
        return OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"not a valid GGUF file: {field} at byte {offset}: expected {expected}, found {found}",
            field=field,
        )


def _brief(value: object) -> str:
    """A value in a few characters; what is of no use as an alignment need not be shown whole."""
    return shown(str(value)) if isinstance(value, bool | int | float | str) else "an array"
