"""Runs whole jobs through the engine: its thread, its schedule, its compiled programs, several jobs at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from orcd_jax.engine.engine import Delivery, Engine, warm_up
from orcd_jax.engine.programs import Programs
from orcd_jax.engine.request import Ended, Failed, JobRequest, Tokens
from orcd_jax.engine.state import EngineShape
from orcd_jax.errors import OrcdError
from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import Params
from tests.engine.guards import Unguarded
from tests.engine.tiny import LogitsDriver

WAIT_S = 280.0


def greedy_tokens(
    config: LlamaConfig,
    shape: EngineShape,
    params: Params,
    device: jax.Device,
    prompts: Sequence[Sequence[int]],
    steps: int,
) -> list[list[int]]:
    """The greedy continuation of each prompt, all submitted at once; end of sequence is ignored."""
    got: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    failures: list[OrcdError] = []
    left, done = set(got), threading.Event()

    def deliver(batch: list[Delivery]) -> None:
        for job, event in batch:
            name = job.request.job_id
            match event:
                case Tokens():
                    got[name].extend(event.ids)
                case Failed():
                    failures.append(event.error)
            if isinstance(event, Ended | Failed):
                left.discard(name)
        if not left:
            done.set()

    def fatal(error: OrcdError) -> None:
        failures.append(error)
        done.set()

    silent = (b".",) * config.vocab_size
    programs = Programs(config, shape, device)
    engine = Engine(programs, params, Unguarded(), token_bytes=silent, eos_ids=(), deliver=deliver, on_fatal=fatal)
    engine.start(warm_up(programs, params))
    try:
        for name, prompt in zip(got, prompts, strict=True):
            engine.submit(JobRequest(job_id=name, prompt_ids=tuple(prompt), max_tokens=steps, ignore_eos=True))
        assert done.wait(WAIT_S), f"{len(left)} jobs did not end in {WAIT_S} s"
    finally:
        engine.stop(WAIT_S)
    if failures:
        raise failures[0]
    return list(got.values())


def forced_logits(driver: LogitsDriver, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """The logits that decide each of ``tokens`` after ``prompt``, had all before been chosen: ``[steps, vocab]``."""
    whole, length = [*prompt, *tokens[:-1]], driver.shape.block_tokens
    pages = range(-(-len(whole) // driver.shape.page_tokens))
    blocks = [(whole[start : start + length], start, list(pages)) for start in range(0, len(whole), length)]
    rows: list[NDArray[np.float32]] = []
    for first in range(0, len(blocks), driver.shape.prefill_blocks):
        rows += driver.prefill(blocks[first : first + driver.shape.prefill_blocks])
    return np.concatenate(rows)[len(prompt) - 1 :]
