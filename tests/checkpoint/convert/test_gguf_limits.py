"""A GGUF header at its limits is read, quickly and in little memory; one beyond them is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from orcd_jax.checkpoint.convert.gguf import open_gguf
from orcd_jax.checkpoint.convert.gguf_reader import (
    MAX_ARRAY,
    MAX_HEADER_BYTES,
    MAX_METADATA,
    MAX_NAME_BYTES,
    MAX_STRINGS,
    MAX_TENSORS,
    read_gguf,
)
from orcd_jax.checkpoint.convert.gguf_tokenizer import MAX_ADDED_TOKENS, MAX_MERGES, MAX_TOKENS
from orcd_jax.errors import OrcdError
from tests.checkpoint.convert.gguf_edits import put, sparse, string, strings, u32, written
from tests.checkpoint.convert.gguf_mutants import Parts, Tensor, again
from tests.checkpoint.convert.gguf_trial import ordeal, trial
from tests.checkpoint.convert.tiny_gguf import MERGES, TOKENS, array, header, text

pytestmark = pytest.mark.requirement("WORKER-4311")


@pytest.mark.requirement("WORKER-4310")
def test_as_many_pairs_as_the_limit_are_read_and_one_more_is_not(tmp_path: Path, valid: Parts) -> None:
    parts = again(valid)
    while len(parts.pairs) < MAX_METADATA:
        parts.pairs.append((b"k%d" % len(parts.pairs), u32(0)))
    assert len(read_gguf(written(tmp_path / "x", parts)).metadata) == 1_000
    parts.pairs.append((b"k", u32(0)))
    with pytest.raises(OrcdError, match="metadata count at byte 16: expected at most 1000, found 1001"):
        read_gguf(written(tmp_path / "x", parts))


@pytest.mark.requirement("WORKER-4310")
def test_as_many_tensors_as_the_limit_are_read_and_one_more_is_not(tmp_path: Path) -> None:
    parts = Parts([], [Tensor(b"t%d" % n, [8], 0, 32 * n) for n in range(MAX_TENSORS)], bytes(32 * (MAX_TENSORS + 1)))
    assert len(read_gguf(written(tmp_path / "x", parts)).tensors) == 10_000
    parts.tensors.append(Tensor(b"t", [8], 0, 32 * MAX_TENSORS))
    with pytest.raises(OrcdError, match="tensor count at byte 8: expected at most 10000, found 10001"):
        read_gguf(written(tmp_path / "x", parts))


@pytest.mark.requirement("WORKER-4310")
def test_a_string_of_64_kib_is_read_wherever_it_stands(tmp_path: Path, valid: Parts) -> None:
    """A chat template is one string, a vocabulary many: each may be as long, none longer."""
    longest = "x" * 65_536
    parts = again(valid)
    put("tokenizer.chat_template", string(longest))(parts)
    put("k", strings(longest, longest))(parts)
    parts.pairs.append((b"y" * 65_536, u32(0)))
    path = written(tmp_path / "x", parts)
    assert open_gguf(path, "auto").chat_template == longest
    assert list(read_gguf(path).metadata["k"]) == [longest, longest]  # type: ignore[arg-type]
    put("k", strings("", longest + "x"))(parts)
    with pytest.raises(OrcdError, match=r"k: length at byte \d+: expected at most 65536 bytes, found 65537"):
        read_gguf(written(path, parts))


@pytest.mark.requirement("WORKER-4310")
def test_all_arrays_together_hold_as_many_elements_as_the_limit(tmp_path: Path) -> None:
    half = array(0, MAX_ARRAY // 2, bytes(MAX_ARRAY // 2))
    metadata = read_gguf(written(tmp_path / "x", Parts([(b"a", half), (b"b", half)], [], b""))).metadata
    for key in "ab":
        np.testing.assert_array_equal(metadata[key], np.zeros(2**20, np.uint8))
    more = [(b"a", half), (b"b", half), (b"c", array(0, 1, b"\0"))]
    with pytest.raises(OrcdError, match=r"c at byte \d+: expected at most 0, found 1"):
        read_gguf(written(tmp_path / "x", Parts(more, [], b"")))


@pytest.mark.requirement("WORKER-4310")
def test_a_header_ends_at_its_limit_whatever_follows(tmp_path: Path) -> None:
    """Counted from the file's first byte to the last of the tensor table."""
    pairs = [(b"k%d" % n, string(bytes(60_000))) for n in range(MAX_HEADER_BYTES // 60_100)]
    left = MAX_HEADER_BYTES - len(Parts([*pairs, (b"last", array(0, 0))], [], b"").encoded().rstrip(b"\0"))
    for over in (0, 1):
        body = b"".join(text(key) + value for key, value in pairs)
        used = 24 + len(body) + len(text("last")) + 16
        fill = MAX_HEADER_BYTES - used + over
        assert abs(fill - left) < 100
        raw = header(n_metadata=len(pairs) + 1, body=body + text("last") + array(0, fill, bytes(fill)))
        assert len(raw) == MAX_HEADER_BYTES + over
        path = sparse(tmp_path / "x", 2 * MAX_HEADER_BYTES, raw)
        if over:
            with pytest.raises(OrcdError, match=r"last at byte \d+: expected a header of at most 16777216 bytes"):
                read_gguf(path)
        else:
            assert len(read_gguf(path).metadata) == len(pairs) + 1


@pytest.mark.requirement("WORKER-4310")
def test_a_vocabulary_of_control_tokens_takes_no_longer_than_another(tmp_path: Path, valid: Parts) -> None:
    """Added one by one to the library's tokenizer, each would cost as much as all before it."""
    more = [f"<|reserved_{n}|>" for n in range(8_000)]
    parts, rows = again(valid), len(TOKENS) + len(more)
    put("tokenizer.ggml.tokens", strings(*TOKENS, *more))(parts)
    kinds = [3] * 3 + [1] * (len(TOKENS) - 3) + [3, 4] * 4_000
    put("tokenizer.ggml.token_type", array(5, rows, struct.pack(f"<{rows}i", *kinds)))(parts)
    place = -(-len(parts.data) // 32) * 32
    parts.tensors[0] = Tensor(b"token_embd.weight", [32, rows], 0, place)
    parts.data = parts.data.ljust(place, b"\0") + bytes(32 * 4 * rows)
    assert trial(written(tmp_path / "x", parts)) == ""


# -- what the limits allow ---------------------------------------------------------------------------------------------


def tensor_table(name: bytes) -> bytes:
    """As many tensors as there may be, each of four dimensions and with its own bytes."""
    tensors = [Tensor(b"%05d" % n + name, [2, 2, 2, 1], 0, 32 * n) for n in range(MAX_TENSORS)]
    return Parts([], tensors, bytes(32 * MAX_TENSORS)).encoded()


def metadata_of(*values: bytes) -> bytes:
    return header(n_metadata=len(values), body=b"".join(text(f"k{n}") + value for n, value in enumerate(values)))


def everything() -> bytes:
    """Every limit in one header but that of its bytes, which the longest strings fill on their own."""
    scalars = [(b"k%d" % n, u32(n)) for n in range(MAX_METADATA - 3)]
    half = MAX_STRINGS // 2
    numbers = MAX_ARRAY - 2 * half
    arrays = [
        (b"tokens", array(8, half, text("abc") * half)),
        (b"merges", array(8, half, text("") * half)),
        (b"types", array(5, numbers, struct.pack("<i", 1) * numbers)),
    ]
    tensors = [Tensor(b"%05d" % n + b"x" * 50, [2, 2, 2, 1], 0, 32 * n) for n in range(MAX_TENSORS)]
    return Parts(scalars + arrays, tensors, bytes(32 * MAX_TENSORS)).encoded()


WIDE = "😀" + "x" * 65_532
"""64 KiB, and 256 KiB where every character has the room that its widest takes."""

LONG = (MAX_HEADER_BYTES - 1_000) // 65_560
"""As many strings of 64 KiB as a header has room for."""

HONEST = {
    "strings": lambda: metadata_of(array(8, MAX_STRINGS, text("ab" * 7) * MAX_STRINGS)),
    "empty strings": lambda: metadata_of(array(8, MAX_STRINGS, text("") * MAX_STRINGS)),
    "long strings": lambda: metadata_of(array(8, LONG, text(WIDE) * LONG)),
    "texts": lambda: metadata_of(*[string(WIDE)] * LONG),
    "keys": lambda: header(
        n_metadata=LONG, body=b"".join(text(f"{n:03}" + "x" * 65_533) + u32(n) for n in range(LONG))
    ),
    "numbers": lambda: metadata_of(array(10, MAX_ARRAY - 100, struct.pack("<Q", 2**63) * (MAX_ARRAY - 100))),
    "booleans": lambda: metadata_of(array(7, MAX_ARRAY, b"\1" * MAX_ARRAY)),
    "pairs": lambda: metadata_of(*[u32(0)] * MAX_METADATA),
    "tensors": lambda: tensor_table(b"x" * (MAX_NAME_BYTES - 5)),
    "tensors of other letters": lambda: tensor_table("😀".encode() * 14),
    "everything": everything,
}


@pytest.mark.requirement("WORKER-4310")
def test_a_header_at_any_limit_takes_half_a_second_and_48_mb(tmp_path: Path, valid_file: Path) -> None:
    """All of it is read: what is missing is the first thing that is asked of it afterwards."""
    files = []
    for name, make in HONEST.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(make())
    missing = "the GGUF model cannot be converted: general.architecture: it is missing"
    assert ordeal(valid_file, *map(str, files), mebibytes=48, seconds=0.5) == dict.fromkeys(HONEST, missing)


def model(valid: Parts, tokens: list[str], merges: list[str], kinds: list[int] | None = None) -> Parts:
    """A model with this vocabulary, whose embedding is all zeros."""
    parts, rows = again(valid), len(tokens)
    put("tokenizer.ggml.tokens", strings(*tokens))(parts)
    put("tokenizer.ggml.merges", strings(*merges))(parts)
    put("tokenizer.ggml.token_type", array(5, rows, struct.pack(f"<{rows}i", *(kinds or [1] * rows))))(parts)
    place = -(-len(parts.data) // 32) * 32
    parts.tensors[0] = Tensor(b"token_embd.weight", [32, rows], 0, place)
    parts.data = parts.data.ljust(place, b"\0")
    return parts


def with_zeros(path: Path, parts: Parts, rows: int) -> Path:
    raw = parts.encoded()
    return sparse(path, len(raw) + rows * 32 * 4, raw)


@pytest.mark.requirement("WORKER-4310")
def test_a_vocabulary_at_its_limits_is_refused_in_a_second_and_64_mb(
    tmp_path: Path, valid: Parts, valid_file: Path
) -> None:
    """Each is wrong in the last place that is looked at. So they are refused before the library is asked."""
    tokens = list(dict.fromkeys([*TOKENS, *map("{:x}".format, range(MAX_TOKENS))]))[:MAX_TOKENS]
    merges = ([f"{token[:-1]} {token[-1]}" for token in tokens[len(TOKENS) + 20 :]] * 2)[:MAX_MERGES]
    wide = [*TOKENS, *(f"{n:05x}😀{'x' * 34}" for n in range(MAX_TOKENS - len(TOKENS)))]
    more = array(8, MAX_STRINGS - MAX_TOKENS - MAX_MERGES, text("abc") * (MAX_STRINGS - MAX_TOKENS - MAX_MERGES))
    cases = {
        "token": (model(valid, [*tokens[:-1], "th"], merges), "a token stands in the vocabulary twice"),
        "merge": (model(valid, tokens, [*merges[:-1], "x q"]), "a merge is not made of two tokens that make a third"),
        "wide": (model(valid, wide, [*MERGES, "x q"]), "a merge is not made of two tokens that make a third"),
        "end": (model(valid, tokens, merges), "it must be a token id below 262144"),
    }
    put("k", more)(cases["merge"][0])
    put("tokenizer.ggml.eos_token_id", u32(MAX_TOKENS))(cases["end"][0])
    files = [with_zeros(tmp_path / name, parts, MAX_TOKENS) for name, (parts, _) in cases.items()]
    told = ordeal(valid_file, *map(str, files))
    assert {name: message.rpartition(": ")[2] for name, message in told.items()} == {
        name: problem for name, (_, problem) in cases.items()
    }


@pytest.mark.requirement("WORKER-4310")
def test_a_vocabulary_beyond_its_limits_is_refused(tmp_path: Path, valid: Parts) -> None:
    tokens = [*TOKENS, *map("t{}".format, range(MAX_TOKENS + 1 - len(TOKENS)))]
    rows = MAX_ADDED_TOKENS + 1 + len(TOKENS)
    kinds = [1] * len(TOKENS) + [3, 4] * (MAX_ADDED_TOKENS // 2) + [4]
    for parts, size, problem in (
        (model(valid, tokens, MERGES), len(tokens), "tokens: it has 262145 texts; the limit is 262144"),
        (model(valid, TOKENS, MERGES[:1] * (MAX_MERGES + 1)), len(TOKENS), "300001 texts; the limit is 300000"),
        (model(valid, tokens[:rows], MERGES, kinds), rows, "16385 tokens are control or user-defined ones; the limit"),
    ):
        assert problem in trial(with_zeros(tmp_path / "x", parts, size))


@pytest.mark.requirement("WORKER-4310")
def test_all_arrays_together_hold_as_many_strings_as_the_limit(tmp_path: Path) -> None:
    half = array(8, MAX_STRINGS // 2, text("ab") * (MAX_STRINGS // 2))
    path = written(tmp_path / "x", Parts([(b"a", half), (b"b", half)], [], b""))
    assert [len(value) for value in read_gguf(path).metadata.values()] == [350_000] * 2  # type: ignore[arg-type]
    more = [(b"a", half), (b"b", half), (b"c", strings("one more"))]
    with pytest.raises(OrcdError, match=r"c at byte \d+: expected at most 700000 strings in all arrays, found more"):
        read_gguf(written(path, Parts(more, [], b"")))


def test_every_text_of_an_array_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Among them what a length may look like: NULs, and as many bytes as a byte of it may hold."""
    texts = [
        "",
        "\0",
        "é",
        "😀" * 64,
        "x" * 128,
        "ÿ" * 100,
        "\0" * 255,
        "ab" * 32_768,
        "x" * 0x8080,
        "y" * 0xC3A9,
        "end",
    ] * 20
    value = read_gguf(written(tmp_path / "x", Parts([(b"k", strings(*texts))], [], b""))).metadata["k"]
    assert list(value) == texts  # type: ignore[arg-type]
    assert [value[n] for n in range(len(texts))] == texts  # type: ignore[index]


@pytest.mark.parametrize("wrong", [b"\xff", b"\xc3", b"\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
@pytest.mark.parametrize("place", [0, 1, 70, 139])
@pytest.mark.requirement("WORKER-4310")
def test_a_text_of_an_array_that_is_not_utf_8_is_refused_where_it_stands(
    tmp_path: Path, wrong: bytes, place: int
) -> None:
    """Cut short at its end too, where the next text might seem to go on with it. Long: not all is checked at once."""
    texts: list[str | bytes] = ["é" * 16_000] * 140
    texts[place] = b"ab" + wrong
    texts.insert(place + 1, b"\x80\x80")
    at = 24 + len(text("k")) + 16 + sum(len(text(other)) for other in texts[:place]) + 8 + 2
    with pytest.raises(OrcdError, match=f"k at byte {at}: expected UTF-8, found other bytes"):
        read_gguf(written(tmp_path / "x", Parts([(b"k", strings(*texts))], [], b"")))


@pytest.mark.parametrize("count", [1, 2, 300])
@pytest.mark.requirement("WORKER-4310")
def test_an_array_of_texts_that_goes_on_past_the_end_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x"
    whole = metadata_of(array(8, count, text("abcdefgh") * count))
    for cut in range(1, 17):
        path.write_bytes(whole[:-cut])
        with pytest.raises(OrcdError, match=r"left: the file is truncated|strings in the"):
            read_gguf(path)
