"""What a worker is asked and what it answers, free of protobuf: the domain side of the gRPC face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orcd_jax.checkpoint.manifest import ModelCapabilities
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.engine.request import Ended, Failed, Tokens
from orcd_jax.errors import OrcdError
from orcd_jax.residency.budget import MemoryPlan


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
      traceparent: W3C trace context of the call; empty: none.
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
    traceparent: str = ""


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
      last_digest_age_ms: since the oldest proof of any byte of the weights on the device; None before the first.
      identity_public_key: 32 bytes of the Ed25519 key that signs attestations.
    """

    ready: bool
    state: str
    handles: tuple[Handle, ...]
    capabilities: EngineCapabilities
    last_digest_age_ms: int | None
    identity_public_key: bytes


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
    cuda_version: str
    driver_version: str
    seal_age_ms: int | None
    detection_bound_ms: int
    metrics_port: int
    audit_seq: int
    audit_hash: str


ShardLayout = Literal["single", "tensor_parallel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanParams:
    """What Plan is asked, and the part of Commit that decides what is loaded.

    Attributes:
      model_ref: validated in form; empty: the model the worker was started with.
      max_context, slots: None: the worker's own.
    """

    model_ref: str = ""
    layout: ShardLayout = "single"
    tp_degree: int = 1
    max_context: int | None = None
    slots: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInfo:
    """The answer to Plan (WORKER-4210).

    Attributes:
      memory: None when the model could not be read.
      reasons: every reason why not; empty when feasible.
      model: what the model declares, when it could be read.
      max_context, slots: the sizes planned for.
    """

    memory: MemoryPlan | None
    reasons: tuple[OrcdError, ...]
    model: ModelCapabilities | None
    max_context: int
    slots: int
    device_index: int
    device_uuid: str

    @property
    def feasible(self) -> bool:
        """Whether a Commit with the same wishes would load."""
        return not self.reasons


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitParams:
    """What Commit is asked.

    Attributes:
      shard_id: the caller's name for the shard; empty: made from the digest.
      expected_digest: 64 hex digits, or empty.
      signature: bytes of a signature over the model, or empty.
    """

    plan: PlanParams
    shard_id: str = ""
    shard_index: int = 0
    total_shards: int = 1
    expected_digest: str = ""
    signature: bytes = b""


CommitEvent = Progress | Handle
"""What Commit streams: progress, then exactly one handle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestInfo:
    """The answer to Attest (WORKER-4255).

    Attributes:
      digest: recomputed from the device between the two times (milliseconds since 1970).
      signature, public_key: Ed25519.
    """

    handle: Handle
    digest: str
    digest_began_at_ms: int
    digest_ended_at_ms: int
    nonce: bytes
    executable_fingerprint: str
    signature: bytes
    public_key: bytes
    worker_id: str
    pool_id: str
