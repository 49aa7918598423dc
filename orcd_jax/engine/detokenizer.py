"""Token ids to text that can be shown: whole UTF-8 characters, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Turns one job's tokens into text, as they come. Owns the job's undecoded bytes and unshown text."""

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        """Starts an empty text.

        Args:
          token_bytes: what each id adds to the text.
          stop: strings that end the text; empty ones are ignored.
        """
        self._token_bytes = token_bytes
        self._stop = tuple(s for s in stop if s)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that can be shown after this token. Sets ``stopped`` when it completes a stop string."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(self._token_bytes[token_id]), final=False)

    def flush(self) -> str:
        """What was held back, at the end of the text. An unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        """Of what is held and ``new``: everything before a stop string, or all that can begin none."""
        # A match can only end in the new characters; the earliest end wins, then the earliest start.
        for end in range(len(self._held) + 1, len(self._held) + len(new) + 1):
            text = self._held + new
            matches = [end - len(s) for s in self._stop if text.endswith(s, 0, end)]
            if matches:
                self.stopped, self._held = True, ""
                return text[: min(matches)]
        text = self._held + new
        keep = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ends ``text``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
