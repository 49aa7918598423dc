"""Tiny tokenizers of both kinds, made with the library itself."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from orcd_jax.tokenizer.token_bytes import byte_alphabet


def byte_level(*, bos_post_processor: bool = False) -> Tokenizer:
    """All bytes, a few merges, two special tokens (``<s>`` 0, ``</s>`` 1) and one added one (``<tool>``)."""
    tokens = ["<s>", "</s>", *byte_alphabet(), "th", "the", "Ġthe"]
    built = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")])
    )
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    built.add_tokens([AddedToken("<tool>", special=False)])
    if bos_post_processor:
        built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return built


def sentencepiece() -> Tokenizer:
    """Pieces with a visible space, byte fallback, and the Llama 2 decoder."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "é", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "ab")]
    built = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return built


def raw(tokenizer: Tokenizer) -> bytes:
    """The bytes of its tokenizer.json."""
    return tokenizer.to_str().encode()
