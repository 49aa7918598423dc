"""The model's tokenizer: Hugging Face ``tokenizers`` behind one small class."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as _Library

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.tokenizer.token_bytes import strips_space, token_bytes, tokenizer_kind

TOKENIZER_FILE = "tokenizer.json"
MAX_FILE_BYTES = 256 * 1024 * 1024


class Tokenizer:
    """Owns one loaded tokenizer. Immutable; safe to use from several threads."""

    def __init__(
        self, tokenizer_json: bytes, *, vocab_size: int, bos_id: int | None, eos_ids: Sequence[int], add_bos: bool
    ) -> None:
        """Builds it from the bytes of a tokenizer.json.

        Args:
          tokenizer_json: the file's bytes.
          vocab_size: rows of the model's embedding; ids at or above it are refused.
          bos_id: beginning of sequence, if there is one.
          eos_ids: any of these ends a sequence.
          add_bos: prepend ``bos_id`` to text, because the file's own post-processor does not.

        Raises:
          OrcdError: MODEL_LOAD_FAILED.
        """
        self.kind = tokenizer_kind(tokenizer_json)
        self.token_bytes = token_bytes(tokenizer_json, vocab_size)
        self.strips_space = strips_space(tokenizer_json)
        self.bos_id, self.eos_ids, self._add_bos = bos_id, tuple(eos_ids), add_bos
        try:
            self._library = _Library.from_str(tokenizer_json.decode())
        except Exception:  # the library raises plain Exception, with the file's own text in it
            raise OrcdError(
                ErrorCode.MODEL_LOAD_FAILED, "tokenizer.json is not one the tokenizers library reads", field="tokenizer"
            ) from None
        self._library.no_padding()
        self._library.no_truncation()

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """Token ids of a text; special tokens written in it are recognised, as upstream does.

        Args:
          text: valid UTF-8 without NUL.
          add_special: begin as the model expects (BOS); never twice.
        """
        ids = tuple(self._library.encode(text, add_special_tokens=add_special).ids)
        if add_special and self._add_bos and self.bos_id is not None and ids[:1] != (self.bos_id,):
            return (self.bos_id, *ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, undecodable bytes as U+FFFD."""
        text = b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def token(self, token_id: int | None) -> str:
        """The written form of a token, such as ``<|im_end|>``; empty for none."""
        return "" if token_id is None else self._library.id_to_token(token_id) or ""
