"""One hostile file before the converter: it loads, or it is refused with an error that can be shown.

Run as a command, it tries many under a limit on the process's memory, and prints what became of them as JSON:

    python -W error -m tests.checkpoint.convert.gguf_trial VALID MEBIBYTES (COUNT | FILE...)
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orcd_jax.checkpoint.convert.gguf import open_gguf
from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.tokenizer.tokenizer import Tokenizer
from tests.checkpoint.convert.gguf_mutants import hostile, taken_apart

SECONDS = 3.0
"""Processor time that one file may take: three times what it should on a machine that does nothing else."""

FORMAT = re.compile(r"not a valid GGUF file: .+ at byte \d+: expected .+, found .+")
CONTENT = re.compile(r"the GGUF (model cannot be converted|tokenizer cannot be used): [^:]+: .+")
"""A broken format is told by field, offset, expectation and finding; a model that cannot be by its field."""


def trial(path: Path) -> str:
    """Opens a file, and what it is made of if it opens, as a conversion does.

    Returns:
      What it was refused with; empty when it was not.

    Raises:
      AssertionError: it was refused in a way it should not be, or took too long.
    """
    before, refusal = time.process_time(), ""
    try:
        _use(path)
    except OrcdError as error:  # it is not kept: it would keep alive all that was in use when it was raised
        refusal = _checked(error)
    seconds = time.process_time() - before
    assert seconds < SECONDS, f"{seconds:.1f} s"
    return refusal


def _checked(error: OrcdError) -> str:
    """The message of an error that can be shown."""
    message = error.message
    assert error.code is ErrorCode.MODEL_LOAD_FAILED, message
    assert message.isprintable(), ascii(message)
    assert message.isascii(), ascii(message)
    assert len(message) < 400, message
    assert FORMAT.fullmatch(message) or CONTENT.fullmatch(message), message
    assert error.field, message
    assert error.field.isprintable(), ascii(error.field)
    assert error.field in message, message
    return message


def _use(path: Path) -> None:
    source = open_gguf(path, "auto")
    assert source.config.vocab_size == len(source.file.metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    size = path.stat().st_size
    assert all(0 < t.offset <= t.offset + t.n_bytes <= size for t in source.file.tensors.values())
    for leaf in leaves(source.config).values():
        for name, shape in leaf.sources.items():
            if name in source.names() and source.shape(name) == shape:
                assert source.tensor(name).shape == shape
    entry = source.tokenizer
    vocab_size = source.config.vocab_size
    tokenizer = Tokenizer(
        source.tokenizer_json,
        vocab_size=vocab_size,
        bos_id=entry.bos_id,
        eos_ids=entry.eos_ids,
        add_bos=entry.add_bos,
    )
    assert all(0 <= i < vocab_size for i in tokenizer.encode("<|im_start|>the cat 42\n\u0000é", add_special=True))


def _files(valid: Path, given: list[str]) -> Iterator[tuple[str, Path]]:
    """Name and place of each file; those of the corpus follow each other in one place."""
    if not given[0].isdecimal():
        yield from ((Path(name).name, Path(name)) for name in given)
        return
    parts, path = taken_apart(valid.read_bytes()), valid.with_suffix(".mutant")
    for number in range(int(given[0])):
        path.write_bytes(hostile(parts, number))
        yield str(number), path


def main(valid: Path, mebibytes: int, given: list[str]) -> None:
    """Tries each file; see the module."""
    assert trial(valid) == ""  # whatever a first time loads and keeps is not the next file's
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    messages: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, path in _files(valid, given):
        try:
            messages[name] = trial(path)
        except BaseException as error:  # MemoryError and RecursionError too: nothing but an OrcdError may come out
            wrong[name] = f"{type(error).__name__}: {error}"[:400]
    print(json.dumps({"messages": messages, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
