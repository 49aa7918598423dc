"""Builds a ``tokenizer.json`` from the vocabulary and merges inside a GGUF file (byte-level BPE).

Whatever may be wrong with them is found while they still are the file's bytes: a refusal costs a third of a tokenizer.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from orcd_jax.checkpoint.convert.gguf_metadata import GgufValue, Strings
from orcd_jax.checkpoint.manifest import TokenizerEntry
from orcd_jax.errors import ErrorCode, OrcdError

# The splitting patterns of the tokenizers published with each family; GGUF stores only their name.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|\p{N}" + _REST


@dataclass(frozen=True, slots=True)
class _Pre:
    """How one family splits text before merging.

    Attributes:
      pattern: pieces are the matches of this.
      single_digits: every digit is a piece of its own, before the pattern applies.
      ignore_merges: a piece that is a token as a whole is taken as one.
      add_bos: whether a sequence begins with BOS when the file does not say.
    """

    pattern: str
    single_digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_DIGITS_GPT2 = _Pre(_GPT2, single_digits=True)
_LLAMA3_PRE = _Pre(_LLAMA3, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS: dict[str, _Pre] = {
    "gpt-2": _Pre(_GPT2),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "qwen2": _Pre(_QWEN2, nfc=True),
}
MAX_TOKENS = 2**18  # Llama 3 has 128 256, Qwen 2 has 151 936
MAX_MERGES = 300_000  # Llama 3 has 280 147
MAX_ADDED_TOKENS = 2**14  # control and user-defined ones; the library compares each with every text
_CONTROL, _USER_DEFINED = 3, 4
# Tokens that end a turn, by the names their families give them; they end a sequence when they are control tokens.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def build_tokenizer(metadata: Mapping[str, GgufValue]) -> tuple[bytes, TokenizerEntry]:
    """The tokenizer of a GGUF file.

    Returns:
      The bytes of ``tokenizer.json``, and which ids begin and end a sequence.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when it is missing, of a kind that is not supported, or inconsistent.
    """
    model = _text(metadata, "tokenizer.ggml.model")
    if model != "gpt2":
        raise _refuse("tokenizer.ggml.model", f"{model:.32} is not supported; supported is gpt2 (byte-level BPE)")
    name = _text(metadata, "tokenizer.ggml.pre")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise _refuse(
            "tokenizer.ggml.pre", f"{name:.32} is not supported; supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    tokens = _texts(metadata, "tokenizer.ggml.tokens", MAX_TOKENS)
    merges = _texts(metadata, "tokenizer.ggml.merges", MAX_MERGES)
    types = _types(metadata, len(tokens))
    entry = _entry(metadata, pre, tokens, types)
    _check_texts(tokens, merges)
    try:
        built = _build(pre, tokens, merges, types)
        if built.get_vocab_size(with_added_tokens=True) != len(tokens):
            raise _refuse("tokenizer.ggml.tokens", "the vocabulary changes when its tokenizer is built")
        text: str = built.to_str(pretty=False)
    except OrcdError:
        raise
    except Exception:  # the library raises plain Exception, with the file's own text in it
        raise _refuse("tokenizer.ggml", "the vocabulary and merges do not make a tokenizer") from None
    return text.encode(), entry


def _check_texts(tokens: Strings, merges: Strings) -> None:
    """Each token is there once, and each merge is of two tokens that make a third."""
    known = set(tokens.raw())
    if len(known) != len(tokens):
        raise _refuse("tokenizer.ggml.tokens", "a token stands in the vocabulary twice")
    if any(map(operator.contains, known, itertools.repeat(b"\0"))):
        raise _refuse("tokenizer.ggml.tokens", "a token holds a NUL character")
    for merge in merges.raw():
        # Bytes are mapped to printable characters, so a space only separates.
        left, _, right = merge.partition(b" ")
        if left not in known or right not in known or left + right not in known:
            raise _refuse("tokenizer.ggml.merges", "a merge is not made of two tokens that make a third")


def _build(pre: _Pre, tokens: Strings, merges: Strings, types: NDArray[np.int64]) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        built.normalizer = normalizers.NFC()
    splits: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    splits.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated", invert=False))
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    built.pre_tokenizer = pre_tokenizers.Sequence(splits)
    built.decoder = decoders.ByteLevel()
    # All at once: the library goes through all added tokens again at each call.
    kinds = list(zip(vocabulary, types.tolist(), strict=True))
    built.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == _CONTROL])
    built.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in kinds if kind == _USER_DEFINED])
    return built


def _entry(metadata: Mapping[str, GgufValue], pre: _Pre, tokens: Strings, types: NDArray[np.int64]) -> TokenizerEntry:
    named = [_token_id(metadata, key, len(tokens)) for key in ("eos", "eot", "eom")]
    ends = {end for end in named if end is not None}
    ends |= {i for i in np.flatnonzero(types == _CONTROL).tolist() if tokens[i] in _END_OF_TURN}
    if not ends:
        raise _refuse("tokenizer.ggml.eos_token_id", "the file names no end-of-sequence token")
    bos = _token_id(metadata, "bos", len(tokens))
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)
    if not isinstance(add_bos, bool):
        raise _refuse("tokenizer.ggml.add_bos_token", "it must be a boolean")
    return TokenizerEntry(
        kind="bpe_byte_level", bos_id=bos, eos_ids=tuple(sorted(ends)), add_bos=add_bos and bos is not None
    )


def _token_id(metadata: Mapping[str, GgufValue], name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise _refuse(key, f"it must be a token id below {vocab_size}")
    return value


def _text(metadata: Mapping[str, GgufValue], key: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str):
        raise _refuse(key, "the file has no such text: it holds no tokenizer, or one of another kind")
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in value)


def _texts(metadata: Mapping[str, GgufValue], key: str, most: int) -> Strings:
    value = metadata.get(key)
    if not isinstance(value, Strings | np.ndarray) or not len(value):
        raise _refuse(key, "the file has no such list: it holds no tokenizer, or one of another kind")
    if not isinstance(value, Strings):
        raise _refuse(key, "it must be a list of texts")
    if len(value) > most:
        raise _refuse(key, f"it has {len(value)} texts; the limit is {most}")
    return value


def _types(metadata: Mapping[str, GgufValue], tokens: int) -> NDArray[np.int64]:
    """What kind each token is of."""
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return np.ones(tokens, np.int64)
    value = metadata[key]
    if not isinstance(value, np.ndarray) or len(value) != tokens or not np.issubdtype(value.dtype, np.integer):
        raise _refuse(key, "it must have one integer for each token")
    types = value.astype(np.int64)
    if (added := int(np.isin(types, (_CONTROL, _USER_DEFINED)).sum())) > MAX_ADDED_TOKENS:
        raise _refuse(key, f"{added} tokens are control or user-defined ones; the limit is {MAX_ADDED_TOKENS}")
    return types


def _refuse(key: str, problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"the GGUF tokenizer cannot be used: {key}: {problem}", field=key)
