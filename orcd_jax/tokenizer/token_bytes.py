"""What each token id adds to the text, as bytes: the table that streaming decodes from.

Bytes, because a character may span tokens; a table, because decoding a growing list again at each token is quadratic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import cast

from orcd_jax.errors import ErrorCode, OrcdError

TOKENIZER_KINDS = ("bpe_byte_level", "sentencepiece")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"  # SentencePiece's visible space


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 as itself, the rest shifted past U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(shifted)}


def tokenizer_kind(tokenizer_json: bytes) -> str:
    """Which of ``TOKENIZER_KINDS`` a tokenizer.json is, by its decoder.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when it is neither.
    """
    return _kind(_decoder_steps(_parse(tokenizer_json)))


def token_bytes(tokenizer_json: bytes, vocab_size: int) -> tuple[bytes, ...]:
    """The bytes of every id below ``vocab_size``; empty for special tokens and ids without a token.

    SentencePiece decoders strip one space from the start of a text; that is left to the caller (``strips_space``).

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when the file is not a tokenizer or its decoder is of an unknown kind.
    """
    value = _parse(tokenizer_json)
    kind = _kind(_decoder_steps(value))
    table = [b""] * vocab_size
    alphabet = byte_alphabet()
    for token, index in _vocabulary(value).items():
        if 0 <= index < vocab_size:
            table[index] = _byte_level(token, alphabet) if kind == "bpe_byte_level" else _sentencepiece(token)
    for added in cast("list[Mapping[str, object]]", value.get("added_tokens") or []):
        place, content = added.get("id"), added.get("content")
        if isinstance(place, int) and isinstance(content, str) and 0 <= place < vocab_size:
            table[place] = b"" if added.get("special") else content.encode()
    return tuple(table)


def strips_space(tokenizer_json: bytes) -> bool:
    """Whether decoding removes one space from the start of a text."""
    return any(
        step.get("type") == "Strip" and step.get("content") == " " and step.get("start")
        for step in _decoder_steps(_parse(tokenizer_json))
    )


def _byte_level(token: str, alphabet: Mapping[str, int]) -> bytes:
    if all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
    return token.encode()  # as the library does: a token outside the alphabet stands for itself


def _sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode()


def _parse(tokenizer_json: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(tokenizer_json)
    except (ValueError, RecursionError):
        raise _refuse("it is not valid JSON") from None
    if not isinstance(value, dict):
        raise _refuse("it is not a JSON object")
    return cast("Mapping[str, object]", value)


def _vocabulary(value: Mapping[str, object]) -> Mapping[str, int]:
    model = value.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not all(isinstance(i, int) for i in vocabulary.values()):
        raise _refuse("it has no vocabulary of tokens and ids (BPE)")
    return vocabulary


def _decoder_steps(value: Mapping[str, object]) -> list[Mapping[str, object]]:
    decoder = value.get("decoder")
    if not isinstance(decoder, dict):
        return []
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return [s for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []


def _kind(steps: list[Mapping[str, object]]) -> str:
    types = [step.get("type") for step in steps]
    if types == ["ByteLevel"]:
        return "bpe_byte_level"
    if types in (["Replace", "ByteFallback", "Fuse", "Strip"], ["Replace", "ByteFallback", "Fuse"]):
        return "sentencepiece"
    shown = ", ".join(str(t)[:24] for t in types[:6]) or "none"
    raise _refuse(f"its decoder ({shown}) is not supported; supported are ByteLevel, and Replace with ByteFallback")


def _refuse(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"tokenizer.json cannot be used: {problem}", field="tokenizer")
