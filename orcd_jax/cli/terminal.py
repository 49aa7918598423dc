"""What reaches the terminal: the answer and JSON on stdout, all else on stderr, and nothing that could steer it."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Mapping
from typing import TextIO

# Control, format (escapes, direction), lone surrogates, and Unicode's own line and paragraph separators.
_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Format characters that belong to words and emoji and change no direction: soft hyphen, zero-width space, non-joiner
# and joiner, word joiner.
_IN_WORDS = frozenset("\u00ad\u200b\u200c\u200d\u2060")
_LONGEST_LINE = 4096


class ReaderGone(Exception):
    """Whoever read the output closed it."""


class OutputFailed(Exception):
    """The output cannot be written; says why."""


def harmless(text: str) -> str:
    """``text`` with a replacement character for each one that could steer a terminal or turn the reading direction.

    Line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or character in _IN_WORDS or unicodedata.category(character) not in _STEERING
        else "\N{REPLACEMENT CHARACTER}"
        for character in text.replace("\r\n", "\n")
    )


def one_line(text: str) -> str:
    """``text`` harmless, on one line and of bounded length."""
    shown = text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 1]}…"
    return " ".join(harmless(shown).split())


def complain(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{one_line(message)}\n")
    sys.stderr.flush()


class Output:
    """Owns stdout. Everything is written at once: an answer is read while it is made.

    All methods raise ReaderGone or OutputFailed.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Writes to ``stream``; to stdout by default."""
        self._stream = sys.stdout if stream is None else stream
        self._within_line = False

    def text(self, text: str) -> None:
        """Some of an answer. It is untrusted: shown as it is, except for what could steer the terminal."""
        if text:
            self._write(harmless(text))
            self._within_line = not text.endswith("\n")

    def end_line(self) -> None:
        """Ends the line that was begun, if one was."""
        if self._within_line:
            self._within_line = False
            self._write("\n")

    def json(self, fields: Mapping[str, object]) -> None:
        """One JSON object on a line of its own. Escapes all but ASCII, so it holds any text exactly and harms none."""
        self._write(f"{json.dumps(fields)}\n")

    def rows(self, rows: Mapping[str, str]) -> None:
        """Names and values as two columns."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(one_line(name)), Text(one_line(value)))
        # A terminal folds at its width; a file or a pipe has none.
        console = Console(file=self._stream, highlight=False, width=None if self._stream.isatty() else _LONGEST_LINE)
        with console.capture() as captured:
            console.print(table)
        self._write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            raise OutputFailed(error.strerror or type(error).__name__) from None
