"""What a GGUF file says of itself. Values stay as they lie in the header until they are asked for.

One Python object for each element would take eight times the header's bytes, and one wide character makes a text take
four bytes for each of its characters. Neither is spent on a value that nobody reads.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

PREFIX: Final = 8
"""Bytes before a text, in which its length stands."""

_PIECE = 2**20  # bytes that are checked at a time, so that what they decode to stays small


class Strings:
    """The texts of one array: 4 bytes each beside the header, decoded whenever they are gone through."""

    def __init__(self, head: bytes, bounds: array[int]) -> None:
        """Texts of a header.

        Args:
          head: the header.
          bounds: where each text's length stands, then where the last text ends.
        """
        self._head, self._bounds = head, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        return self._head[self._bounds[index] + PREFIX : self._bounds[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return map(bytes.decode, self.raw())

    def raw(self) -> Iterator[bytes]:
        """The texts as the UTF-8 they are stored in."""
        head = self._head
        return (head[start + PREFIX : end] for start, end in pairwise(self._bounds))

    def first_wrong(self) -> int | None:
        """Where in the header the first byte stands that is not UTF-8; None when all are.

        Many texts are decoded at once, with zeros for their lengths: no sequence of bytes goes on across a zero.
        """
        bounds = np.frombuffer(self._bounds, np.uint32).astype(np.int64)
        first, last = 0, len(self)
        while first < last:
            after = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _PIECE)) - 1)
            start = int(bounds[first])
            piece = np.frombuffer(self._head, np.uint8, int(bounds[after]) - start, start).copy()
            for byte in range(3):  # a length of up to 64 KiB takes three bytes; the others are zero
                piece[bounds[first:after] - start + byte] = 0
            try:
                str(piece.data, "utf-8")
            except UnicodeDecodeError as error:
                return start + error.start
            first = after
        return None


GgufValue = bool | int | float | str | Strings | NDArray[np.generic]
"""A value of the metadata; an array of numbers is a view of the header's bytes."""


class Metadata(Mapping[str, GgufValue]):
    """Keys and their values. A text is decoded each time it is asked for."""

    def __init__(self, values: Mapping[str, bool | int | float | bytes | Strings | NDArray[np.generic]]) -> None:
        """Of these values, texts as the UTF-8 they are stored in."""
        self._values = values

    def __getitem__(self, key: str) -> GgufValue:
        value = self._values[key]
        return value.decode() if isinstance(value, bytes) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
