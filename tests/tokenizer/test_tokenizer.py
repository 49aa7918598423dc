"""Ids to text and back exactly as the library does it, and never a doubled BOS."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.tokenizer.token_bytes import token_bytes, tokenizer_kind
from orcd_jax.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.tiny import byte_level, raw, sentencepiece

BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()


def wrap(library: Library, *, add_bos: bool = False, bos_id: int = 0) -> Tokenizer:
    return Tokenizer(
        raw(library), vocab_size=library.get_vocab_size(), bos_id=bos_id, eos_ids=(bos_id + 1,), add_bos=add_bos
    )


WRAPPED = {"byte_level": (wrap(BYTE_LEVEL), BYTE_LEVEL), "sentencepiece": (wrap(SENTENCEPIECE), SENTENCEPIECE)}


@pytest.mark.parametrize("kind", WRAPPED)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_the_library_decodes_them(kind: str, data: st.DataObject) -> None:
    ours, library = WRAPPED[kind]
    ids = data.draw(st.lists(st.integers(0, library.get_vocab_size() - 1), max_size=40))
    if kind == "sentencepiece":
        # The library decodes a run of byte tokens at once, to one U+FFFD for each byte when any of it is invalid.
        ids = [i for i in ids if not 3 + 0x80 <= i < 3 + 0x100]
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["the the\n\n  42", "naïve 👩‍💻", "  lead", "<tool>x</s>"])
def test_a_text_survives_the_round_trip(text: str) -> None:
    ours = wrap(BYTE_LEVEL)
    assert ours.decode(ours.encode(text, add_special=False)) == text.replace("</s>", "")


def test_a_character_of_several_byte_tokens_is_decoded_whole() -> None:
    ours = wrap(SENTENCEPIECE)
    assert ours.decode([3 + b for b in "😀é".encode()]) == "😀é"


def test_special_tokens_in_a_text_are_recognised() -> None:
    assert wrap(BYTE_LEVEL).encode("a</s>", add_special=False)[-1] == 1


def test_bos_is_added_once_when_the_model_wants_it() -> None:
    plain = wrap(BYTE_LEVEL, add_bos=True)
    assert plain.encode("the", add_special=True).count(0) == 1
    assert plain.encode("<s>the", add_special=True).count(0) == 1
    assert plain.encode("the", add_special=False).count(0) == 0


def test_a_post_processor_that_adds_bos_is_not_doubled() -> None:
    ours = wrap(byte_level(bos_post_processor=True))
    assert ours.encode("the", add_special=True).count(0) == 1
    assert ours.encode("the", add_special=False).count(0) == 0


def test_the_table_has_an_entry_for_every_row_of_the_embedding() -> None:
    size = BYTE_LEVEL.get_vocab_size()
    table = token_bytes(raw(BYTE_LEVEL), size + 10)
    assert len(table) == size + 10
    assert table[size:] == (b"",) * 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", r"its decoder \(none\) is not supported"),
        (b'{"decoder": {"type": "ByteLevel"}}', "no vocabulary"),
        (b'{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": 0}}}', "not one the tokenizers library reads"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_a_typed_error(content: bytes, message: str) -> None:
    with pytest.raises(OrcdError, match=message) as caught:
        Tokenizer(content, vocab_size=4, bos_id=None, eos_ids=(1,), add_bos=False)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED


def test_an_unknown_decoder_is_named() -> None:
    other = byte_level()
    other.decoder = decoders.WordPiece()
    with pytest.raises(OrcdError, match="WordPiece"):
        tokenizer_kind(raw(other))
