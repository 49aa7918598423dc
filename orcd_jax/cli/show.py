"""``orcd ready`` and ``orcd status``: how a worker is, for a person or a program."""

from __future__ import annotations

import enum

import betterproto2

from orcd_jax.api.orcd.worker import v1
from orcd_jax.cli.connection import Connection
from orcd_jax.cli.terminal import Output
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.narration import count, duration, size


async def ready(worker: Connection, output: Output, *, as_json: bool) -> ExitCode:
    """Shows whether jobs are taken; FAILED when they are not."""
    answer = await worker.ready()
    if as_json:
        output.json(ready_fields(answer))
    else:
        output.rows(ready_rows(answer))
    return ExitCode.OK if answer.ready else ExitCode.FAILED


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
    }


def ready_rows(answer: v1.ReadyResponse) -> dict[str, str]:
    """The answer to Ready as a person reads it."""
    rows = {"ready": "yes" if answer.ready else "no", "state": word(answer.state)}
    for handle in answer.handles:
        of = f" {handle.handle_id}" if len(answer.handles) > 1 else ""
        pinned = "" if handle.pinned else " (not pinned)"
        rows[f"model{of}"] = handle.model_ref
        rows[f"digest{of}"] = f"{handle.digest}{pinned}"
        rows[f"memory{of}"] = "emulated on the CPU" if handle.emulated else f"{size(handle.vram_bytes)} in VRAM"
    if answer.last_digest_age_ms is not None:
        rows["proved"] = f"{duration(answer.last_digest_age_ms / 1e3)} ago"
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
        "loading": f"{answer.load_stage}: {answer.load_percent} %" if answer.load_stage else "",
        "worker": answer.worker_id,
        "pool": answer.pool_id,
        "version": answer.version,
        "uptime": duration(answer.uptime_ms / 1e3),
        "jobs": f"{answer.slots_used} of {answer.slots_total}",
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
    }
    return _said(rows)


def _memory(answer: v1.GetStatusResponse) -> str:
    if answer.emulated:
        return "emulated on the CPU"
    resident = "" if answer.resident else "; no model is resident"
    return f"{size(answer.vram_used_bytes)} of {size(answer.vram_planned_bytes)} planned{resident}"


def _said(rows: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in rows.items() if value}


def plain(message: betterproto2.Message) -> dict[str, object]:
    """All fields of a message, by their names in the contract; enumerations as lower-case words, bytes as hex."""
    return {name: _plain(getattr(message, name)) for name in type(message).__annotations__}


def _plain(value: object) -> object:
    if isinstance(value, betterproto2.Message):
        return plain(value)
    if isinstance(value, enum.Enum):
        return word(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def word(value: enum.Enum) -> str:
    """An enumeration's value in lower case. One of a newer worker has no name here and counts as unspecified."""
    return (value.name or "unspecified").lower()
