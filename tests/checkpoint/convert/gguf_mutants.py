"""Hostile GGUF files: a valid one taken apart, changed where it hurts, and put together again with or without its lies.

A valid file is taken apart by nothing of the code under test. ``MUTATORS`` change its parts, ``DAMAGES`` the bytes they
make; ``hostile`` is a numbered corpus of both, the same on every machine.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.checkpoint.convert.tiny_gguf import array, text

FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

LENGTHS = (0, 1, 2, 255, 2**16, 2**16 + 1, 2**20, 2**21 + 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
"""What a 64-bit count or size may pretend to be."""

STRINGS = (
    b"",
    b"\0",
    b"a\0b",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1b[2J\x1b]0;x\x07",
    "\u202eabc\u2066".encode(),
    b"x" * 65_537,
)
"""Nothing, NULs, no UTF-8, half a surrogate pair, terminal escapes, direction overrides, one byte too many."""

NUMBERS = (
    *(struct.pack("<If", 6, value) for value in (0.0, -1.0, 1.0, 1e-45, 3e38, float("inf"), float("nan"))),
    *(struct.pack("<Id", 12, value) for value in (1e300, -1e-300, float("-inf"))),
    *(struct.pack("<Iq", 11, value) for value in (-(2**63), -1, 0, 2**63 - 1)),
    *(struct.pack("<IQ", 10, value) for value in (1, 2**24, 2**24 + 1, 2**32, 2**63, 2**64 - 1)),
    struct.pack("<IB", 7, 1),
    struct.pack("<IB", 7, 2),
    struct.pack("<I", 13),
)
"""Typed values that few keys can take."""

KEYS = (
    b"general.alignment",
    b"general.architecture",
    b"general.name",
    b"llama.attention.head_count",
    b"llama.attention.head_count_kv",
    b"llama.attention.key_length",
    b"llama.attention.layer_norm_rms_epsilon",
    b"llama.attention.sliding_window",
    b"llama.block_count",
    b"llama.context_length",
    b"llama.embedding_length",
    b"llama.expert_count",
    b"llama.feed_forward_length",
    b"llama.rope.dimension_count",
    b"llama.rope.freq_base",
    b"llama.rope.scaling.attn_factor",
    b"llama.rope.scaling.factor",
    b"llama.rope.scaling.original_context_length",
    b"llama.rope.scaling.type",
    b"tokenizer.chat_template",
    b"tokenizer.ggml.add_bos_token",
    b"tokenizer.ggml.bos_token_id",
    b"tokenizer.ggml.eos_token_id",
    b"tokenizer.ggml.merges",
    b"tokenizer.ggml.model",
    b"tokenizer.ggml.pre",
    b"tokenizer.ggml.token_type",
    b"tokenizer.ggml.tokens",
)


@dataclass
class Tensor:
    """One entry of the tensor table. ``n_dims`` is told as it is unless it is set."""

    name: bytes
    dims: list[int]
    kind: int
    offset: int
    n_dims: int | None = None

    def encoded(self) -> bytes:
        n_dims = len(self.dims) if self.n_dims is None else self.n_dims
        dims = b"".join(struct.pack("<Q", dim) for dim in self.dims)
        return text(self.name) + struct.pack("<I", n_dims) + dims + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class Parts:
    """A file taken apart. Its counts are told as they are unless they are set.

    Attributes:
      pairs: key and encoded value, type included.
      data: what follows the header from the next multiple of 32.
    """

    pairs: list[tuple[bytes, bytes]]
    tensors: list[Tensor]
    data: bytes
    version: int = 3
    n_pairs: int | None = None
    n_tensors: int | None = None
    trailing: bytes = field(default=b"")

    def encoded(self) -> bytes:
        """The file, lies and all."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        head = b"GGUF" + struct.pack("<IQQ", self.version, n_tensors, n_pairs)
        head += b"".join(text(key) + value for key, value in self.pairs)
        head += b"".join(tensor.encoded() for tensor in self.tensors)
        return head.ljust(-(-len(head) // 32) * 32, b"\0") + self.data + self.trailing

    def place(self, key: bytes) -> int:
        """Where a key stands; it is added when it is not there."""
        for index, (name, _) in enumerate(self.pairs):
            if name == key:
                return index
        self.pairs.append((key, struct.pack("<II", 4, 0)))
        return len(self.pairs) - 1


def taken_apart(raw: bytes) -> Parts:
    """The parts of a valid file with the default alignment."""
    at = 24
    version, n_tensors, n_pairs = struct.unpack_from("<IQQ", raw, 4)

    def piece() -> bytes:
        nonlocal at
        (length,) = struct.unpack_from("<Q", raw, at)
        at += 8 + length
        return raw[at - length : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == STRING:
            piece()
        elif kind == ARRAY:
            element, count = struct.unpack_from("<IQ", raw, at)
            at += 12
            for _ in range(count):
                skip(element)
        else:
            at += struct.calcsize(FORMS[kind])

    pairs, tensors = [], []
    for _ in range(n_pairs):
        key, start = piece(), at
        at += 4
        skip(struct.unpack_from("<I", raw, start)[0])
        pairs.append((key, raw[start:at]))
    for _ in range(n_tensors):
        name = piece()
        (n_dims,) = struct.unpack_from("<I", raw, at)
        dims = list(struct.unpack_from(f"<{n_dims}Q", raw, at + 4))
        kind, offset = struct.unpack_from("<IQ", raw, at + 4 + 8 * n_dims)
        at += 16 + 8 * n_dims
        tensors.append(Tensor(name, dims, kind, offset))
    return Parts(pairs, tensors, raw[-(-at // 32) * 32 :], version)


def again(parts: Parts) -> Parts:
    """A copy to change."""
    tensors = [Tensor(t.name, list(t.dims), t.kind, t.offset, t.n_dims) for t in parts.tensors]
    return Parts(list(parts.pairs), tensors, parts.data, parts.version, parts.n_pairs, parts.n_tensors, parts.trailing)


# -- changes of parts --------------------------------------------------------------------------------------------------


def _counts(parts: Parts, rng: random.Random) -> None:
    which = rng.choice(["pairs", "tensors", "version"])
    if which == "version":
        parts.version = rng.choice([0, 1, 2, 4, 3 << 24, 2**32 - 1])
    elif which == "pairs":
        parts.n_pairs = rng.choice([*LENGTHS, len(parts.pairs) - 1, len(parts.pairs) + 1, 1000, 1001])
    else:
        parts.n_tensors = rng.choice([*LENGTHS, len(parts.tensors) - 1, len(parts.tensors) + 1, 10_000, 10_001])


def _known_value(parts: Parts, rng: random.Random) -> None:
    """A key the reader or converter knows, with a value of another type or an absurd one."""
    index = parts.place(rng.choice(KEYS))
    value = rng.choice(NUMBERS)
    if rng.random() < 0.3:
        value = struct.pack("<I", STRING) + text(rng.choice(STRINGS))
    parts.pairs[index] = (parts.pairs[index][0], value)


def _string_length(parts: Parts, rng: random.Random) -> None:
    """A text whose length is a lie."""
    content = rng.choice(STRINGS)
    value = struct.pack("<IQ", STRING, rng.choice(LENGTHS)) + content
    parts.pairs.insert(rng.randrange(len(parts.pairs) + 1), (rng.choice(KEYS), value))


def _key(parts: Parts, rng: random.Random) -> None:
    index = rng.randrange(len(parts.pairs)) if parts.pairs else parts.place(b"k")
    key = rng.choice([*STRINGS, b"general.architecture", b"llama.new_setting", rng.randbytes(9)])
    parts.pairs[index] = (key, parts.pairs[index][1])


def _pairs(parts: Parts, rng: random.Random) -> None:
    """Pairs twice, gone, or in another order."""
    what = rng.choice(["twice", "gone", "shuffled", "many"])
    if what == "shuffled":
        rng.shuffle(parts.pairs)
    elif what == "many":
        parts.pairs += [(b"k%d" % n, struct.pack("<IB", 0, 1)) for n in range(rng.choice([900, 1001]))]
    elif parts.pairs:
        pair = rng.choice(parts.pairs)
        parts.pairs.append(pair) if what == "twice" else parts.pairs.remove(pair)


def _array(parts: Parts, rng: random.Random) -> None:
    """An array whose length, element type or depth is a lie."""
    element = rng.choice([*FORMS, STRING, ARRAY, 77, 2**32 - 1])
    value = array(element, rng.choice(LENGTHS), rng.randbytes(rng.randrange(200)))
    if element == ARRAY:
        value = array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * rng.choice([1, 50, 5000]))
    index = parts.place(rng.choice(KEYS))
    parts.pairs[index] = (parts.pairs[index][0], value)


def _vocabulary(parts: Parts, rng: random.Random) -> None:
    """Well-formed arrays of the tokenizer with other lengths, repetitions, NULs or no sense."""
    key = rng.choice([b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges", b"tokenizer.ggml.token_type"])
    count = rng.choice([0, 1, 262, 263, 264, 3000])
    if key.endswith(b"token_type"):
        kind = rng.choice([0, 5, 6, 7, 10])
        number = rng.choice([0, 1, 3, 4, 6])
        element = struct.pack(FORMS[kind], min(number, 1) if kind == 7 else number)
        value = array(kind, count, element * count)
    else:
        form = rng.choice([b"%d", b"t%d h%d", b"a\0%d", b"same", b"", b" ", b"<|im_end|>", b"\xc4\xa0 %d"])
        words = [form.replace(b"%d", b"%d" % n) for n in range(count)]
        value = array(STRING, count, b"".join(map(text, words)))
    index = parts.place(key)
    parts.pairs[index] = (key, value)


def _tensor(parts: Parts, rng: random.Random) -> None:
    if not parts.tensors:
        return
    tensor = rng.choice(parts.tensors)
    what = rng.choice(["n_dims", "dim", "dims", "kind", "offset", "name", "twice", "gone", "many"])
    if what == "n_dims":
        tensor.n_dims = rng.choice([0, 1, 2, 5, 99, 2**31, 2**32 - 1])
    elif what == "dim":
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([*LENGTHS, 3, 31, 33, 64])
    elif what == "dims":
        tensor.dims = [rng.choice(LENGTHS) for _ in range(rng.randrange(6))]
    elif what == "kind":
        tensor.kind = rng.choice([*range(40), 2**31, 2**32 - 1])
    elif what == "offset":
        tensor.offset = rng.choice([*LENGTHS, tensor.offset + 1, tensor.offset + 32, len(parts.data)])
    elif what == "name":
        tensor.name = rng.choice([*STRINGS, b"rope_freqs.weight", b"output.weight", b"blk.9999.attn_q.weight"])
    elif what == "twice":
        parts.tensors.append(tensor)
    elif what == "gone":
        parts.tensors.remove(tensor)
    else:
        parts.tensors += [Tensor(b"t%d" % n, [8], 0, 0) for n in range(rng.choice([500, 10_001]))]


MUTATORS: dict[str, Callable[[Parts, random.Random], None]] = {
    "counts": _counts,
    "known value": _known_value,
    "string length": _string_length,
    "key": _key,
    "pairs": _pairs,
    "array": _array,
    "vocabulary": _vocabulary,
    "tensor": _tensor,
}


# -- changes of bytes --------------------------------------------------------------------------------------------------


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _extended(raw: bytes, rng: random.Random) -> bytes:
    return raw + rng.randbytes(rng.choice([1, 31, 5000]))


def _overwritten(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes of the header, or one aligned word of it."""
    changed, header = bytearray(raw), min(len(raw), 8000)
    if header < 16:
        return raw
    if rng.random() < 0.5:
        at = rng.randrange(header - 8)
        changed[at : at + 8] = struct.pack("<Q", rng.choice(LENGTHS))
    else:
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(header)] = rng.randrange(256)
    return bytes(changed)


def _spliced(raw: bytes, rng: random.Random) -> bytes:
    """A stretch of the header left out or there twice."""
    first, second = sorted(rng.randrange(min(len(raw), 8000) + 1) for _ in range(2))
    return raw[:first] + raw[second:] if rng.random() < 0.5 else raw[:second] + raw[first:]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "extended": _extended,
    "overwritten": _overwritten,
    "spliced": _spliced,
}


def changed(valid: Parts, steps: list[tuple[str, int]]) -> bytes:
    """A file after some steps, each the name of a change and the seed of its choices; parts first, then bytes."""
    parts = again(valid)
    for name, seed in steps:
        if name in MUTATORS:
            MUTATORS[name](parts, random.Random(seed))
    raw = parts.encoded()
    for name, seed in steps:
        if name in DAMAGES:
            raw = DAMAGES[name](raw, random.Random(seed))
    return raw


def hostile(valid: Parts, number: int) -> bytes:
    """One file of the corpus. Every change comes first once in twelve; up to three more may follow."""
    rng = random.Random(number)
    names = [*MUTATORS, *DAMAGES]
    steps = [names[number % len(names)], *rng.choices(names, k=rng.choice([0, 0, 0, 1, 2, 3]))]
    return changed(valid, [(name, rng.getrandbits(32)) for name in steps])
