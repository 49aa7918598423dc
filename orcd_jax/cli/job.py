"""The job of ``orcd execute``, as it is asked for on the command line."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from orcd_jax.cli.values import UINT32, UINT64, UsageError, number, seconds, whole

# What the worker takes in one message, and so the longest prompt that can be sent.
MAX_PROMPT_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it was asked for. None leaves the choice to the worker."""

    prompt: str
    chat: bool
    system: str | None
    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    timeout_s: float | None
    job_id: str | None


def add_job(execute: argparse.ArgumentParser) -> None:
    """Flags of ``orcd execute``."""
    execute.add_argument("prompt", metavar="PROMPT", help="what to continue or answer; - reads it from stdin as it is")
    add = execute.add_argument_group("the job").add_argument
    add("--chat", action="store_true", help="ask a chat model: PROMPT is the user's turn of a conversation")
    add("--system", metavar="TEXT", help="the system's turn before it; with --chat")
    add("--max_tokens", metavar="N", type=whole(UINT32), default=256, help="most tokens of the answer; default 256")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given repeatedly")
    add("--ignore_eos", action="store_true", help="go on when the model would end")
    add("--timeout", metavar="SECONDS", type=seconds, help="give up after this time; default: the worker's limit")
    add("--job_id", metavar="ID", help="name of the job; default: a random one")
    add = execute.add_argument_group("sampling").add_argument
    add("--temperature", metavar="X", type=number, help="0 to 2; above 0 tokens are drawn at random; default 0")
    add("--top_p", metavar="X", type=number, help="draw among the likeliest that sum up to this, above 0 to 1")
    add("--top_k", metavar="N", type=whole(UINT32), help="draw among this many of the likeliest; 0: all")
    add("--min_p", metavar="X", type=number, help="draw among those this likely relative to the likeliest, 0 to 1")
    add("--seed", metavar="N", type=whole(UINT64), help="the same seed draws the same tokens; default: a random one")


def job_of(given: argparse.Namespace) -> Job:
    """The job of a parsed call, with its prompt read.

    Raises:
      UsageError: it cannot be sent.
    """
    if given.system is not None and not given.chat:
        raise UsageError("--system goes with --chat: without it there is no conversation; add --chat")
    return Job(
        prompt=_prompt(given.prompt),
        chat=given.chat,
        system=given.system,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        seed=given.seed,
        stop=tuple(given.stop),
        ignore_eos=given.ignore_eos,
        timeout_s=given.timeout,
        job_id=given.job_id,
    )


def _prompt(given: str) -> str:
    if given != "-":
        if not given:
            raise UsageError("PROMPT is empty: give some text")
        return given
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if not data:
        raise UsageError("PROMPT is empty: nothing came from stdin")
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"PROMPT is too long: more than {MAX_PROMPT_BYTES} bytes came from stdin")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"PROMPT is not valid UTF-8 at byte {error.start} of stdin; convert it first") from None
