"""One hostile file before the converter: it loads, or it is refused with an error that can be shown.

Run as a command, it tries many under a limit on the process's memory, and prints what became of them as JSON:

    python -W error -m tests.checkpoint.convert.gguf_trial VALID MEBIBYTES SECONDS (COUNT | FILE...)
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orcd_jax.checkpoint.convert.gguf import open_gguf
from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.tokenizer.tokenizer import Tokenizer
from tests.checkpoint.convert.gguf_mutants import hostile, taken_apart

ROOT = Path(__file__).parents[3]
MEBIBYTES, SECONDS = 64, 1.0
"""What one file may take: memory, and processor time of a machine that does ``known_work`` in ``KNOWN_SECONDS``."""

KNOWN_SECONDS = 0.18
TRIES = 3

FORMAT = re.compile(r"not a valid GGUF file: .+ at byte \d+: expected .+, found .+")
CONTENT = re.compile(r"the GGUF (model cannot be converted|tokenizer cannot be used): [^:]+: .+")
"""A broken format is told by field, offset, expectation and finding; a model that cannot be by its field."""


def trial(path: Path, limit: float = SECONDS) -> str:
    """Opens a file, and what it is made of if it opens, as a conversion does.

    Args:
      path: the file.
      limit: seconds of processor time, of a machine as fast as that of ``KNOWN_SECONDS``.

    Returns:
      What it was refused with; empty when it was not.

    Raises:
      AssertionError: it was refused in a way it should not be, or took too long.
    """
    for _ in range(TRIES):
        before, refusal = time.process_time(), ""
        try:
            _use(path)
        except OrcdError as error:  # it is not kept: it would keep alive all that was in use when it was raised
            refusal = _checked(error)
        seconds = time.process_time() - before
        if seconds < limit or seconds < limit * slowness():
            return refusal
    raise AssertionError(f"{seconds:.2f} s")


def slowness() -> float:
    """How much longer this machine takes at this moment: neither a slow one nor what else it does is a file's fault."""
    before = time.process_time()
    known_work()
    return max(1.0, (time.process_time() - before) / KNOWN_SECONDS)


def known_work() -> None:
    """What reading a file is made of: small pieces cut out of bytes, and looked up."""
    raw = random.Random(0).randbytes(200_008)
    known = {raw[at : at + 8] for at in range(200_000)}
    assert all(raw[at : at + 8] in known for at in range(200_000))


def ordeal(valid_file: Path, *given: str, mebibytes: int = MEBIBYTES, seconds: float = SECONDS) -> dict[str, str]:
    """Tries files in a process that may take so much more memory; what each was refused with, by name."""
    command = [sys.executable, "-W", "error", "-m", "tests.checkpoint.convert.gguf_trial"]
    done = subprocess.run(
        [*command, str(valid_file), str(mebibytes), str(seconds), *given],
        cwd=ROOT,
        # One arena, as each reserves 64 MB of addresses, and large blocks given back at once: no file pays for another.
        env=os.environ
        | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["wrong"] == {}
    messages: dict[str, str] = told["messages"]
    return messages


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


def main(valid: Path, mebibytes: int, seconds: float, given: list[str]) -> None:
    """Tries each file; see the module."""
    slowness()
    assert trial(valid) == ""  # whatever a first time loads and keeps is not the next file's
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    messages: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, path in _files(valid, given):
        try:
            messages[name] = trial(path, seconds)
        except BaseException as error:  # MemoryError and RecursionError too: nothing but an OrcdError may come out
            wrong[name] = f"{type(error).__name__}: {error}"[:400]
    print(json.dumps({"messages": messages, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
