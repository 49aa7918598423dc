"""What enters the engine and what leaves it: a job's request and its events, free of protobuf and of JAX."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from orcd_jax.errors import OrcdError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is chosen from the logits. Filters apply in the order of the fields, after temperature.

    Attributes:
      temperature: 0 is greedy (arg max, lowest id on a tie); else logits are divided by it.
      top_k: keep the k largest (ties with the k-th are kept); 0 is off.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 is off.
      min_p: keep tokens at least min_p times as likely as the likeliest; 0 is off.
      seed: uint64. The noise of a token is a function of (seed, sample, position, token id) alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """One validated job: what to compute and when to stop.

    Attributes:
      job_id: the caller's name for the job.
      prompt_ids: token ids, non-empty, each below the vocabulary size.
      max_tokens: most tokens to generate, at least 1.
      stop: strings that end the job; never part of its text.
      stop_ids: token ids that end the job besides the model's own end-of-sequence ids.
      ignore_eos: go on past end-of-sequence.
      deadline_s: the engine clock's (monotonic) time at which the job fails with TIMEOUT, or None.
    """

    job_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    deadline_s: float | None = None


class FinishReason(enum.StrEnum):
    """Why a job ended well."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Some consecutive tokens of one job. Over a whole job ``sum(len(ids)) == tokens_out``.

    Attributes:
      index: index of the first of ``ids`` among the job's generated tokens, from 0.
      ids: generated ids, end-of-sequence and stop ids included.
      text: what can be shown now: whole UTF-8 characters, never a part of a stop string. It may lag behind ids'
        bytes and may be empty only in a job's last Tokens event.
    """

    index: int
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The terminal event of a job that ended well.

    Attributes:
      decode_time_ms: from the first token to the last, wall time on the engine thread.
      time_to_first_token_ms: from submission to the first token.
    """

    finish_reason: FinishReason
    tokens_in: int
    tokens_out: int
    decode_time_ms: float
    time_to_first_token_ms: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The terminal event of a job that did not: cancelled, too late, or the engine failed."""

    error: OrcdError


Event = Tokens | Ended | Failed
