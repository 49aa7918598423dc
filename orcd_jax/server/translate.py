"""Between the wire's messages and the worker's own types: the only place that knows both."""

from __future__ import annotations

from typing import assert_never

import betterproto2

from orcd_jax.api.orcd.worker import v1
from orcd_jax.checkpoint.manifest import ModelCapabilities
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.engine.request import Ended, Failed, Tokens
from orcd_jax.server import validation
from orcd_jax.server.status import error_detail
from orcd_jax.worker.types import (
    AttestInfo,
    ChatMessage,
    ChatPrompt,
    CommitEvent,
    CommitParams,
    EngineCapabilities,
    ExecuteParams,
    Handle,
    Metrics,
    PlanInfo,
    PlanParams,
    ReadyInfo,
    ShardLayout,
    Started,
    StatusInfo,
    WorkerEvent,
)


def execute_params(
    request: v1.ExecuteRequest, config: WorkerConfig, call_timeout_ms: int | None, traceparent: str = ""
) -> ExecuteParams:
    """A job as the worker understands it.

    Args:
      request: what was asked.
      config: holds the limits.
      call_timeout_ms: what is left of the call's own deadline, if it has one.
      traceparent: the call's trace context, from its metadata.

    Raises:
      OrcdError: INVALID_PARAMS, naming the first field that breaks a rule or is not supported.
    """
    _refuse_unsupported(request)
    timeouts = [timeout for timeout in (request.deadline_ms, call_timeout_ms) if timeout]
    return ExecuteParams(
        job_id=validation.identifier("job_id", request.job_id),
        handle_id=validation.optional_identifier("handle_id", request.handle_id) or None,
        tenant=validation.optional_identifier("tenant", request.tenant),
        traceparent=traceparent,
        prompt=_prompt(request, config.max_prompt_chars),
        max_tokens=validation.integer("max_tokens", request.max_tokens, least=1, most=config.max_tokens),
        temperature=validation.number("temperature", request.temperature or 0.0, least=0.0, most=2.0),
        top_p=validation.number(
            "top_p", 1.0 if request.top_p is None else request.top_p, least=0.0, most=1.0, least_excluded=True
        ),
        top_k=validation.integer("top_k", request.top_k or 0, least=0, most=validation.MAX_TOKEN_ID),
        min_p=validation.number("min_p", request.min_p or 0.0, least=0.0, most=1.0),
        seed=None if request.seed is None else validation.integer("seed", request.seed, least=0, most=2**64 - 1),
        stop=validation.stop_strings("stop", request.stop),
        stop_ids=frozenset(
            validation.token_ids("stop_token_ids", request.stop_token_ids, most=validation.MAX_STOP_IDS)
        ),
        ignore_eos=request.ignore_eos,
        timeout_ms=min(timeouts) if timeouts else None,
    )


def _refuse_unsupported(request: v1.ExecuteRequest) -> None:
    """Refuses, by name, what is in the contract and not yet in the worker. Values that mean "off" pass."""
    validation.optional_identifier("cache_salt", request.cache_salt)  # nothing is shared, so every salt is honoured
    validation.absent("min_tokens", request.min_tokens != 0)
    validation.absent("n", request.n not in (None, 1))
    validation.absent("repetition_penalty", request.repetition_penalty not in (None, 1.0))
    validation.absent("presence_penalty", request.presence_penalty not in (None, 0.0))
    validation.absent("frequency_penalty", request.frequency_penalty not in (None, 0.0))
    validation.absent("logit_bias", bool(request.logit_bias))
    validation.absent("grammar", request.grammar is not None)
    validation.absent("logprobs", request.logprobs is not None)
    validation.absent("prompt_logprobs", request.prompt_logprobs is not None)
    validation.absent("receipt", request.receipt is not None)


def _prompt(request: v1.ExecuteRequest, most_chars: int) -> str | tuple[int, ...] | ChatPrompt:
    name, value = betterproto2.which_one_of(request, "input")
    if isinstance(value, str):
        return validation.text(name, value, most=most_chars)
    if isinstance(value, v1.TokenIds):
        # A token is a character or more, but for rare scripts; so this bounds ids as it bounds text.
        return validation.token_ids(name, value.ids, least=1, most=most_chars)
    if isinstance(value, v1.Chat):
        return _chat(name, value, most_chars)
    raise validation.refusal("input", "missing; give prompt_text, prompt_token_ids or chat")


def _chat(field: str, chat: v1.Chat, most_chars: int) -> ChatPrompt:
    if not 1 <= len(chat.messages) <= validation.MAX_CHAT_MESSAGES:
        limit = validation.MAX_CHAT_MESSAGES
        raise validation.refusal(field, f"{len(chat.messages)} messages; there must be 1 to {limit}")
    chars = sum(len(message.content) for message in chat.messages)
    if not 1 <= chars <= most_chars:
        raise validation.refusal(field, f"{chars} characters in all messages; there must be 1 to {most_chars}")
    return ChatPrompt(
        messages=tuple(
            ChatMessage(
                role=validation.identifier("chat.messages.role", message.role),
                content=validation.text("chat.messages.content", message.content, least=0, most=most_chars),
            )
            for message in chat.messages
        ),
        add_generation_prompt=chat.add_generation_prompt is not False,
    )


def execute_event(event: WorkerEvent, seed: int) -> v1.ExecuteEvent:
    """One event of a job, with the seed that the job runs with."""
    match event:
        case Started():
            return v1.ExecuteEvent(
                started=v1.JobStarted(
                    job_id=event.job_id, model=event.model, started_at_ms=event.started_at_ms, seed=event.seed
                )
            )
        case Tokens():
            return v1.ExecuteEvent(token=v1.TokenEvent(text=event.text, index=event.index, token_ids=list(event.ids)))
        case Metrics():
            return v1.ExecuteEvent(
                metrics=v1.JobMetrics(
                    tokens_out=event.tokens_out, decode_time_ms=event.decode_time_ms, vram_bytes=event.vram_bytes
                )
            )
        case Ended():
            return v1.ExecuteEvent(
                end=v1.JobEnd(
                    finish_reason=v1.FinishReason[event.finish_reason.name],
                    tokens_in=event.tokens_in,
                    tokens_out=event.tokens_out,
                    decode_time_ms=event.decode_time_ms,
                    time_to_first_token_ms=event.time_to_first_token_ms,
                    seed=seed,
                )
            )
        case Failed():
            return v1.ExecuteEvent(error=error_detail(event.error))
        case _:
            assert_never(event)


def ready_response(info: ReadyInfo) -> v1.ReadyResponse:
    """The answer to Ready."""
    return v1.ReadyResponse(
        ready=info.ready,
        state=v1.WorkerState[info.state],
        handles=[_handle(handle) for handle in info.handles],
        capabilities=_capabilities(info.capabilities),
        last_digest_age_ms=info.last_digest_age_ms,
        identity_public_key=info.identity_public_key,
    )


def plan_params(request: v1.PlanRequest) -> PlanParams:
    """What Plan is asked.

    Raises:
      OrcdError: INVALID_PARAMS, naming the first field that breaks a rule.
    """
    return _plan_params(request, layout=request.shard_layout, tp_degree=request.tp_degree)


def _plan_params(
    request: v1.PlanRequest | v1.CommitRequest, *, layout: v1.ShardLayout, tp_degree: int | None
) -> PlanParams:
    layouts: dict[v1.ShardLayout, ShardLayout] = {
        v1.ShardLayout.UNSPECIFIED: "single",
        v1.ShardLayout.SINGLE: "single",
        v1.ShardLayout.TENSOR_PARALLEL: "tensor_parallel",
    }
    if layout not in layouts:
        raise validation.refusal("shard_layout", "it is not known here; give single or tensor_parallel")
    sizes = {"max_context": request.max_context, "slots": request.slots}
    for field, value in sizes.items():
        if value is not None:
            validation.integer(field, value, least=1, most=2**31 - 1)
    return PlanParams(
        model_ref=validation.optional_model_ref("model_ref", request.model_ref),
        layout=layouts[layout],
        tp_degree=validation.integer("tp_degree", 1 if tp_degree is None else tp_degree, least=1, most=1024),
        **sizes,
    )


def commit_params(request: v1.CommitRequest) -> CommitParams:
    """What Commit is asked.

    Raises:
      OrcdError: INVALID_PARAMS, naming the first field that breaks a rule.
    """
    shards = 1 if request.total_shards is None else request.total_shards
    total_shards = validation.integer("total_shards", shards, least=1, most=1024)
    return CommitParams(
        plan=_plan_params(request, layout=request.shard_layout, tp_degree=total_shards),
        shard_id=validation.optional_identifier("shard_id", request.shard_id),
        shard_index=validation.integer("shard_index", request.shard_index, least=0, most=total_shards - 1),
        total_shards=total_shards,
        expected_digest=validation.optional_digest("expected_digest", request.expected_digest),
        signature=request.signature,
    )


def plan_response(info: PlanInfo) -> v1.PlanResponse:
    """The answer to Plan."""
    memory = info.memory
    required, available, foreign = None, 0, 0
    if memory is not None:
        available, foreign = memory.available_bytes, memory.foreign_bytes
        required = v1.VramPlan(
            weights_bytes=memory.weights_bytes,
            kv_bytes=memory.kv_bytes,
            workspace_bytes=memory.workspace_bytes,
            headroom_bytes=memory.headroom_bytes,
            total_bytes=memory.total_bytes,
            reserve_bytes=memory.reserve_bytes,
            workspace_source=v1.WorkspaceSource[memory.workspace.upper()],
        )
    shard = v1.ShardPlan(
        shard_index=0,
        device_index=info.device_index,
        device_uuid=info.device_uuid,
        vram_required=required,
        vram_available_bytes=available,
        vram_foreign_bytes=foreign,
    )
    return v1.PlanResponse(
        feasible=info.feasible,
        vram_required=required,
        vram_available_bytes=available,
        shards=[] if memory is None else [shard],
        reasons=[error_detail(reason) for reason in info.reasons],
        model=None if info.model is None else _model(info.model),
        suggestions=[]
        if memory is None
        else [v1.Suggestion(flag=one.flag, value=str(one.value)) for one in memory.suggestions],
        max_context=info.max_context,
        slots=info.slots,
    )


def _model(model: ModelCapabilities) -> v1.ModelCapabilityDescriptor:
    return v1.ModelCapabilityDescriptor(
        model_id=model.model_id,
        architecture=model.architecture,
        positional=model.positional,
        attention=model.attention,
        quant=model.quant,
        context_max=model.context_max,
        vocab_size=model.vocab_size,
        tokenizer=model.tokenizer,
    )


def commit_event(event: CommitEvent) -> v1.CommitEvent:
    """One event of a load."""
    match event:
        case Progress():
            progress = v1.CommitProgress(
                stage=event.stage, done_bytes=event.done, total_bytes=event.total, progress_percent=event.percent
            )
            return v1.CommitEvent(progress=progress)
        case Handle():
            return v1.CommitEvent(committed=_handle(event))
        case _:
            assert_never(event)


def attest_response(info: AttestInfo) -> v1.AttestResponse:
    """The answer to Attest."""
    return v1.AttestResponse(
        handle=_handle(info.handle),
        digest=info.digest,
        digest_began_at_ms=info.digest_began_at_ms,
        digest_ended_at_ms=info.digest_ended_at_ms,
        nonce=info.nonce,
        executable_fingerprint=info.executable_fingerprint,
        signature=info.signature,
        identity_public_key=info.public_key,
        worker_id=info.worker_id,
        pool_id=info.pool_id,
    )


def _handle(handle: Handle) -> v1.ModelShardHandle:
    return v1.ModelShardHandle(
        handle_id=handle.handle_id,
        model_ref=handle.model_ref,
        digest=handle.digest,
        shard_id=handle.shard_id,
        shard_index=handle.shard_index,
        total_shards=handle.total_shards,
        device_index=handle.device_index,
        device_uuid=handle.device_uuid,
        vram_bytes=handle.vram_bytes,
        sealed=handle.sealed,
        sealed_at_ms=handle.sealed_at_ms,
        pinned=handle.pinned,
        emulated=handle.emulated,
    )


def _capabilities(profile: EngineCapabilities) -> v1.EngineCapabilityProfile:
    return v1.EngineCapabilityProfile(
        worker_id=profile.worker_id,
        architectures=list(profile.architectures),
        positional=list(profile.positional),
        attention=list(profile.attention),
        quant=list(profile.quant),
        max_context=profile.max_context,
        vram_bytes=profile.vram_bytes,
        device=profile.device,
    )


def status_response(info: StatusInfo) -> v1.GetStatusResponse:
    """The answer to GetStatus."""
    return v1.GetStatusResponse(
        worker_id=info.worker_id,
        pool_id=info.pool_id,
        version=info.version,
        status=v1.WorkerStatus[info.status.upper()],
        state=v1.WorkerState[info.state],
        uptime_ms=info.uptime_ms,
        resident=info.resident,
        emulated=info.emulated,
        model_ref=info.model_ref,
        digest=info.digest,
        quant=info.quant,
        tokenizer=info.tokenizer,
        vocab_size=info.vocab_size,
        max_context=info.max_context,
        slots_total=info.slots_total,
        slots_used=info.slots_used,
        vram_used_bytes=info.vram_used_bytes,
        vram_planned_bytes=info.vram_planned_bytes,
        device=info.device,
        compute_capability=info.compute_capability,
        load_stage=info.load_stage,
        load_percent=info.load_percent,
        cuda_version=info.cuda_version,
        driver_version=info.driver_version,
        seal_age_ms=info.seal_age_ms,
        detection_bound_ms=info.detection_bound_ms,
        metrics_port=info.metrics_port,
        audit_seq=info.audit_seq,
        audit_hash=info.audit_hash,
    )
