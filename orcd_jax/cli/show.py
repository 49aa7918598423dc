"""``orcd ready`` and ``orcd status``: how a worker is, for a person or a program."""

from __future__ import annotations

import asyncio
import enum
from contextlib import suppress

import betterproto2

from orcd_jax.api.orcd.worker import v1
from orcd_jax.cli.arguments import Target
from orcd_jax.cli.connection import CallFailed, Connection
from orcd_jax.cli.terminal import Output
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.narration import count, duration, size

WAIT_PAUSE_S = 0.5
_STAGES = {
    "verify_files": "checking the files",
    "restore": "restoring onto the device",
    "compile": "compiling",
    "verify_arrays": "proving from the device",
}


async def ready(worker: Connection, output: Output, *, as_json: bool) -> ExitCode:
    """Shows whether jobs are taken; FAILED when they are not."""
    answer = await worker.ready()
    if as_json:
        output.json(ready_fields(answer))
    else:
        output.rows(ready_rows(answer))
    return ExitCode.OK if answer.ready else ExitCode.FAILED


async def wait_until_ready(target: Target, seconds: float) -> None:
    """Returns when a worker takes jobs there, when it never will (its token is refused, say), or after ``seconds``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not await _settled(target):
                await asyncio.sleep(WAIT_PAUSE_S)


async def _settled(target: Target) -> bool:
    """Whether waiting changes nothing any more."""
    try:
        async with Connection(target) as worker:
            answer = await worker.ready()
    except CallFailed as failure:
        return not failure.retriable
    return answer.ready or answer.state in (v1.WorkerState.DRAINING, v1.WorkerState.STOPPED)


async def status(worker: Connection, output: Output, *, as_json: bool) -> ExitCode:
    """Shows how the worker is."""
    answer = await worker.status()
    if as_json:
        output.json(plain(answer))
    else:
        output.rows(status_rows(answer))
    return ExitCode.OK


def ready_fields(answer: v1.ReadyResponse) -> dict[str, object]:
    """The answer to Ready as JSON shows it: what is mostly wanted on top."""
    return {
        "ready": answer.ready,
        "state": word(answer.state).upper(),
        "digest": answer.handles[0].digest if answer.handles else "",
        "model": answer.handles[0].model_ref if answer.handles else "",
        "handles": [plain(handle) for handle in answer.handles],
        "capabilities": plain(answer.capabilities or v1.EngineCapabilityProfile()),
        "last_digest_age_ms": answer.last_digest_age_ms,
        "identity_public_key": answer.identity_public_key.hex(),
    }


def ready_rows(answer: v1.ReadyResponse) -> dict[str, str]:
    """The answer to Ready as a person reads it."""
    rows = {"ready": "yes" if answer.ready else "no", "state": word(answer.state)}
    for handle in answer.handles:
        of = f" {handle.handle_id}" if len(answer.handles) > 1 else ""
        pinned = " (pinned)" if handle.pinned else " (not pinned)"
        rows[f"model{of}"] = handle.model_ref
        rows[f"digest{of}"] = f"{handle.digest}{pinned}"
        rows[f"memory{of}"] = "emulated on the CPU" if handle.emulated else f"{size(handle.vram_bytes)} in VRAM"
        rows[f"sealed{of}"] = "yes" if handle.sealed else "no"
    if answer.last_digest_age_ms is not None:
        rows["proved"] = f"every byte, within the last {duration(answer.last_digest_age_ms / 1e3)}"
    if (able := answer.capabilities) is not None:
        rows["worker"] = able.worker_id
        rows["device"] = able.device
        rows["context"] = count(able.max_context, "token")
        rows["can run"] = ", ".join(able.architectures)
    return _said(rows)


def status_rows(answer: v1.GetStatusResponse) -> dict[str, str]:
    """The answer to GetStatus as a person reads it."""
    rows = {
        "status": word(answer.status),
        "state": word(answer.state),
        "loading": f"{stage(answer.load_stage)}: {answer.load_percent} %" if answer.load_stage else "",
        "worker": answer.worker_id,
        "pool": answer.pool_id,
        "version": answer.version,
        "uptime": duration(answer.uptime_ms / 1e3),
        "jobs": f"{answer.slots_used} of {answer.slots_total}" if answer.slots_total else "",
        "model": answer.model_ref,
        "digest": answer.digest,
        "quantisation": answer.quant,
        "tokenizer": f"{answer.tokenizer}, {answer.vocab_size} entries" if answer.tokenizer else "",
        "context": count(answer.max_context, "token") if answer.max_context else "",
        "memory": _memory(answer),
        "device": answer.device,
        "compute": answer.compute_capability,
        "CUDA": answer.cuda_version,
        "driver": answer.driver_version,
        "proved": "" if answer.seal_age_ms is None else f"every byte, within the last {_ms(answer.seal_age_ms)}",
        "detection": f"a changed bit stops the worker within {_ms(answer.detection_bound_ms)}"
        if answer.detection_bound_ms and answer.seal_age_ms is not None
        else "",
        "metrics": f"http://127.0.0.1:{answer.metrics_port}/metrics, on its host" if answer.metrics_port else "",
        "audit": f"{answer.audit_seq}:{answer.audit_hash}" if answer.audit_seq else "",
    }
    return _said(rows)


def _ms(milliseconds: int) -> str:
    return duration(milliseconds / 1e3)


def _memory(answer: v1.GetStatusResponse) -> str:
    if answer.emulated:
        return "emulated on the CPU"
    if not (answer.resident or answer.vram_used_bytes or answer.vram_planned_bytes):
        return "no model is resident"
    resident = "" if answer.resident else "; no model is resident"
    return f"{size(answer.vram_used_bytes)} of {size(answer.vram_planned_bytes)} planned{resident}"


def _said(rows: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in rows.items() if value}


def stage(name: str) -> str:
    """What a load is doing, as a person says it."""
    return _STAGES.get(name, name)


def plain(message: betterproto2.Message) -> dict[str, object]:
    """All fields of a message, by their names in the contract; bytes as hex.

    Codes of errors are called as everywhere; other enumerations are lower-case words.
    """
    return {name: _plain(getattr(message, name)) for name in type(message).__annotations__}


def _plain(value: object) -> object:
    if isinstance(value, betterproto2.Message):
        return plain(value)
    if isinstance(value, v1.ErrorCode):
        return word(value).upper()
    if isinstance(value, enum.Enum):
        return word(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def word(value: enum.Enum) -> str:
    """An enumeration's value in lower case. One of a newer worker has no name here and counts as unspecified."""
    return (value.name or "unspecified").lower()
