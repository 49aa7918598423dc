"""What a worker is asked and what it answers, free of protobuf: the domain side of the gRPC face."""

from __future__ import annotations

from dataclasses import dataclass

from orcd_jax.engine.request import Ended, Failed, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation to be rendered with the model's own template."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecuteParams:
    """A job as a caller asks for it, validated in form but not against the model.

    Attributes:
      handle_id: the handle the job must run on, or None for whatever is loaded.
      prompt: text, token ids or a conversation.
      seed: uint64, or None: the worker chooses one and says which.
      timeout_ms: the earlier of the request's deadline and the call's own, or None for the worker's limit.
      tenant: the caller's word for whom it acts; part of the job's identity.
    """

    job_id: str
    prompt: str | tuple[int, ...] | ChatPrompt
    max_tokens: int
    handle_id: str | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    timeout_ms: int | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The first event of a job that was admitted."""

    job_id: str
    model: str
    started_at_ms: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """How a running job goes; sent a few times a second."""

    tokens_out: int
    decode_time_ms: float
    vram_bytes: int


WorkerEvent = Started | Tokens | Metrics | Ended | Failed
"""A job's events: Started, then Tokens and Metrics, then exactly one Ended or Failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """A model resident on a device (WORKER-4110).

    Attributes:
      digest: model digest, 64 hex digits, recomputed from the device after loading.
      pinned: the digest was given from outside.
      emulated: the CPU backend stands in for a GPU, and no VRAM is claimed.
    """

    handle_id: str
    shard_id: str
    device_index: int
    device_uuid: str
    vram_bytes: int
    sealed: bool
    sealed_at_ms: int
    digest: str
    model_ref: str
    shard_index: int
    total_shards: int
    pinned: bool
    emulated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """The Engine Capability Profile (ECP): what this worker can run (WORKER-4610)."""

    worker_id: str
    architectures: tuple[str, ...]
    positional: tuple[str, ...]
    attention: tuple[str, ...]
    quant: tuple[str, ...]
    max_context: int
    vram_bytes: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyInfo:
    """The answer to Ready.

    Attributes:
      last_digest_age_ms: since the last full digest of the weights on the device; None before the first.
    """

    ready: bool
    state: str
    handles: tuple[Handle, ...]
    capabilities: EngineCapabilities
    last_digest_age_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusInfo:
    """The answer to GetStatus, from cached state (WORKER-4257).

    Attributes:
      status: starting, ready, busy, draining or failed.
      load_progress: (stage, percent) while loading.
    """

    worker_id: str
    pool_id: str
    version: str
    status: str
    state: str
    resident: bool
    emulated: bool
    model_ref: str
    digest: str
    quant: str
    tokenizer: str
    vocab_size: int
    max_context: int
    slots_total: int
    slots_used: int
    vram_used_bytes: int
    vram_planned_bytes: int
    uptime_ms: int
    device: str
    compute_capability: str
    load_stage: str
    load_percent: int
