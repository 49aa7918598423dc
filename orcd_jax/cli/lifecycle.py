"""``orcd plan``, ``commit`` and ``attest``: what a worker would load, loads, and proves."""

from __future__ import annotations

import secrets
import time
from contextlib import aclosing

from orcd_jax.api.orcd.worker import v1
from orcd_jax.cli.connection import CallFailed, Connection, failed
from orcd_jax.cli.show import plain, stage, word
from orcd_jax.cli.terminal import Output, complain
from orcd_jax.cli.wishes import AttestWish, CommitWish, PlanWish
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.residency.attestation import Attestation, AttestedHandle, verify_attestation
from orcd_jax.telemetry.narration import count, duration, size

MAX_AGE_MS = 300_000
"""Of a proof that is made while one waits: the time it takes, and clocks that differ."""

_SOURCES = {
    v1.WorkspaceSource.BOUND: " (an upper bound)",
    v1.WorkspaceSource.RECORDED: " (recorded on such a device)",
}


async def plan(worker: Connection, wish: PlanWish, output: Output, *, as_json: bool) -> ExitCode:
    """Shows whether a model would load there; FAILED when it would not."""
    answer = await worker.plan(v1.PlanRequest(model_ref=wish.model_ref, max_context=wish.max_context, slots=wish.slots))
    if as_json:
        output.json(plain(answer))
    else:
        output.rows(plan_rows(answer))
    return ExitCode.OK if answer.feasible else ExitCode.FAILED


def plan_rows(answer: v1.PlanResponse) -> dict[str, str]:
    """The answer to Plan as a person reads it; the verdict stands last, next to the prompt."""
    rows = {"model": "" if answer.model is None else answer.model.model_id}
    for shard in answer.shards:
        rows[f"device {shard.device_index}"] = shard.device_uuid
    if (need := answer.vram_required) is not None:
        source = _SOURCES.get(need.workspace_source, "")
        foreign = sum(shard.vram_foreign_bytes for shard in answer.shards)
        rows |= {
            "sizes": f"{count(answer.slots, 'slot')}, {count(answer.max_context, 'token')} each",
            "weights": size(need.weights_bytes),
            "KV cache": size(need.kv_bytes),
            "workspace": f"{size(need.workspace_bytes)}{source}",
            "reserve": f"{size(need.reserve_bytes)} for the driver and its libraries",
            "headroom": f"{size(need.headroom_bytes)} left free",
            "total": size(need.total_bytes),
            "available": size(answer.vram_available_bytes) + (f" (others hold {size(foreign)})" if foreign else ""),
        }
    rows["feasible"] = "yes" if answer.feasible else "no"
    # A reason says what would fit instead.
    for number, reason in enumerate(answer.reasons, 1):
        rows[f"why not {number}" if len(answer.reasons) > 1 else "why not"] = (
            f"{word(reason.code).upper()}: {reason.message}"
        )
    return {name: value for name, value in rows.items() if value}


async def commit(worker: Connection, wish: CommitWish, output: Output, *, as_json: bool) -> ExitCode:
    """Has a model loaded, shows how that goes, and then its handle.

    Raises:
      CallFailed: it was refused, or failed.
    """
    request = v1.CommitRequest(
        model_ref=wish.model_ref,
        shard_id=wish.shard_id,
        expected_digest=wish.expected_digest,
        signature=wish.signature,
        max_context=wish.max_context,
        slots=wish.slots,
    )
    handle: v1.ModelShardHandle | None = None
    told = ""
    async with aclosing(worker.commit(request)) as events:
        async for event in events:
            if event.error is not None:
                raise failed(event.error)
            if as_json:
                output.json(_commit_fields(event))
            elif (at := event.progress) is not None:
                line = f"{stage(at.stage)}: {at.progress_percent // 25 * 25} %"
                if line != told:
                    complain(line)
                    told = line
            handle = event.committed or handle
    if handle is None:
        raise CallFailed(ErrorCode.INTERNAL.value, "the worker ended the call without a handle")
    if not as_json:
        output.rows(handle_rows(handle))
    return ExitCode.OK


def _commit_fields(event: v1.CommitEvent) -> dict[str, object]:
    if event.progress is not None:
        return {"event": "progress", **plain(event.progress)}
    return {"event": "committed", **plain(event.committed or v1.ModelShardHandle())}


def handle_rows(handle: v1.ModelShardHandle) -> dict[str, str]:
    """A handle as a person reads it."""
    return {
        "model": handle.model_ref,
        "digest": f"{handle.digest} ({'pinned' if handle.pinned else 'not pinned'})",
        "memory": "emulated on the CPU" if handle.emulated else f"{size(handle.vram_bytes)} in VRAM",
        "handle": handle.handle_id,
        "sealed": _at(handle.sealed_at_ms) if handle.sealed else "no",
    }


async def attest(worker: Connection, wish: AttestWish, output: Output, *, as_json: bool) -> ExitCode:
    """Has the weights proved anew, and checks the proof: nonce, times, digest, signature, and what is known of it.

    Raises:
      CallFailed: the worker refused, or the attestation does not hold.
    """
    nonce = secrets.token_bytes(32)
    answer = await worker.attest(v1.AttestRequest(handle_id=wish.handle_id, nonce=nonce))
    try:
        _verify(answer, wish, nonce)
    except OrcdError as error:
        raise CallFailed(
            error.code.value, f"the attestation does not hold: {error.message}", field=error.field or ""
        ) from None
    if as_json:
        known = {"key_was_known": bool(wish.identity), "digest_was_known": bool(wish.expected_digest)}
        output.json({"holds": True, **known, **plain(answer)})
    else:
        output.rows(attest_rows(answer, wish))
    return ExitCode.OK


def _verify(answer: v1.AttestResponse, wish: AttestWish, nonce: bytes) -> None:
    """Raises OrcdError when an attestation is not of what was asked for, or does not hold."""
    handle = answer.handle or v1.ModelShardHandle()
    for field, wanted, told in (
        ("handle_id", wish.handle_id, handle.handle_id),
        ("pool_id", wish.pool_id, answer.pool_id),
    ):
        if wanted and told != wanted:
            raise OrcdError(
                ErrorCode.SEAL_VERIFICATION_FAILED,
                f"it is of {field} {told!r:.80}, not of the one asked for",
                field=field,
            )
    statement = Attestation(
        handle=AttestedHandle.of(handle),
        worker_id=answer.worker_id,
        pool_id=answer.pool_id,
        digest=answer.digest,
        digest_began_at_ms=answer.digest_began_at_ms,
        digest_ended_at_ms=answer.digest_ended_at_ms,
        nonce=answer.nonce,
        executable_fingerprint=answer.executable_fingerprint,
    )
    verify_attestation(
        bytes.fromhex(wish.identity) if wish.identity else answer.identity_public_key,
        statement,
        answer.signature,
        nonce=nonce,
        now_ms=time.time_ns() // 1_000_000,
        expected_digest=wish.expected_digest or None,
        max_age_ms=MAX_AGE_MS,
    )


def attest_rows(answer: v1.AttestResponse, wish: AttestWish) -> dict[str, str]:
    """An attestation that holds, as a person reads it."""
    handle = answer.handle or v1.ModelShardHandle()
    took = duration((answer.digest_ended_at_ms - answer.digest_began_at_ms) / 1e3)
    digest = "as expected" if wish.expected_digest else "compared with none of yours; see --expected_digest"
    key = wish.identity or answer.identity_public_key.hex()
    return {
        "model": handle.model_ref,
        "digest": f"{answer.digest} ({digest})",
        "proved": f"every byte, in {took}, from {_at(answer.digest_began_at_ms)}",
        "handle": handle.handle_id,
        "memory": "emulated on the CPU" if handle.emulated else f"VRAM of {handle.device_uuid or 'the device'}",
        "programs": answer.executable_fingerprint,
        "worker": f"{answer.worker_id} of pool {answer.pool_id}",
        "key": f"{key} ({'the one given' if wish.identity else 'by its own word; see --identity'})",
        "holds": "yes: signature, nonce, times and digest",
    }


def _at(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(milliseconds / 1e3))
