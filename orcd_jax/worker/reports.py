"""What a worker says of itself: answers to questions, from cached state, and the milestones of its log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from orcd_jax import __version__
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.audit import AuditEvent, AuditLog, NoAudit
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.telemetry.metrics import Snapshot
from orcd_jax.worker.capability import SUPPORTED
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.types import EngineCapabilities, ReadyInfo, StatusInfo

if TYPE_CHECKING:
    from orcd_jax.worker.loader import SealedModel
    from orcd_jax.worker.worker import Worker

_STATUS_WORD = {
    State.STARTING: "starting",
    State.LOADING: "starting",
    State.READY: "ready",
    State.EXECUTING: "busy",
    State.DRAINING: "draining",
    State.STOPPED: "failed",
}


def ready(worker: Worker) -> ReadyInfo:
    """The answer to Ready (WORKER-4230)."""
    sealed = worker.sealed
    return ReadyInfo(
        ready=worker.lifecycle.serving,
        state=worker.lifecycle.state.value,
        handles=() if sealed is None else (sealed.handle,),
        capabilities=_capabilities(worker),
        last_digest_age_ms=None if sealed is None else round(sealed.guard.age_s() * 1e3),
        identity_public_key=worker.services.identity.public_bytes,
    )


def status(worker: Worker) -> StatusInfo:
    """The answer to GetStatus (WORKER-4257)."""
    config, device, sealed, serving = worker.config, worker.device, worker.sealed, worker.lifecycle.serving
    resident = None if sealed is None else sealed.resident
    model = None if resident is None else resident.manifest.model
    head = worker.services.audit.head
    return StatusInfo(
        worker_id=config.worker_id,
        pool_id=config.pool_id,
        version=__version__,
        status=_STATUS_WORD[worker.lifecycle.state],
        state=worker.lifecycle.state.value,
        resident=resident is not None and not resident.device.emulated,
        emulated=config.platform == "cpu",
        model_ref="" if model is None else model.model_id,
        digest="" if sealed is None else sealed.handle.digest,
        quant="" if model is None else model.quant,
        tokenizer="" if model is None else model.tokenizer,
        vocab_size=0 if model is None else model.vocab_size,
        max_context=0 if resident is None else resident.shape.max_context,
        slots_total=config.slots_total if resident is None else resident.shape.rows,
        slots_used=len(worker.jobs.live),
        vram_used_bytes=0 if resident is None else resident.vram_bytes,
        vram_planned_bytes=0 if resident is None or resident.device.emulated else resident.plan.memory.total_bytes,
        uptime_ms=round((time.monotonic() - worker.started_s) * 1e3),
        device="" if device is None else device.kind,
        compute_capability="" if device is None else device.compute_capability,
        load_stage="" if serving else worker.progress.stage,
        load_percent=100 if serving else worker.progress.percent,
        cuda_version="" if device is None else device.cuda_version,
        driver_version="" if device is None else device.driver_version,
        seal_age_ms=None if sealed is None else round(sealed.guard.age_s() * 1e3),
        detection_bound_ms=0 if sealed is None else round(sealed.guard.detection_bound_s * 1e3),
        metrics_port=worker.services.metrics_port,
        audit_seq=head.seq,
        audit_hash=head.hash,
    )


def snapshot(worker: Worker) -> Snapshot:
    """What a scrape of the metrics is told (WORKER-4810)."""
    sealed, health = worker.sealed, worker.services.gpu_health()
    kv_used, kv_total = (0, 0) if sealed is None else sealed.engine.kv_pages()
    jobs = len(worker.jobs.live)
    return Snapshot(
        state=worker.lifecycle.state.value,
        model="" if sealed is None else sealed.handle.model_ref,
        vram_bytes=0 if sealed is None else sealed.resident.vram_bytes,
        running=jobs,
        queued=0,
        rows_used=jobs,
        rows_total=worker.config.slots_total if sealed is None else sealed.resident.shape.rows,
        kv_pages_used=kv_used,
        kv_pages_total=kv_total,
        seal_age_s=None if sealed is None else sealed.guard.age_s(),
        detection_bound_s=None if sealed is None else sealed.guard.detection_bound_s,
        audit_records_lost=worker.services.audit.lost,
        gpu_temperature_c=health.temperature_c,
        gpu_power_w=health.power_w,
        gpu_ecc_errors=health.ecc_uncorrected,
    )


def _capabilities(worker: Worker) -> EngineCapabilities:
    """The Engine Capability Profile (WORKER-4610), derived from the code."""
    device, sealed = worker.device, worker.sealed
    return EngineCapabilities(
        worker_id=worker.config.worker_id,
        architectures=SUPPORTED.architectures,
        positional=SUPPORTED.positional,
        attention=SUPPORTED.attention,
        quant=SUPPORTED.quant,
        max_context=worker.config.max_context if sealed is None else sealed.resident.shape.max_context,
        vram_bytes=0 if device is None or device.emulated else device.memory_bytes,
        device="" if device is None else device.kind,
    )


def log_progress(progress: Progress, percent: int) -> None:
    """A quarter of a stage of loading is done."""
    get_logger().info(
        EventCode.MODEL_LOAD_PROGRESS,
        human=narration.model_load_progress(stage=progress.stage, percent=percent),
        stage=progress.stage,
        percent=percent,
    )


def log_sealed(sealed: SealedModel, *, seconds: float, audit: AuditLog | NoAudit) -> None:
    """The model is loaded, proved from the device, and sealed: for the log and for the audit."""
    resident, handle, log = sealed.resident, sealed.handle, get_logger()
    memory = resident.plan.memory
    log.info(
        EventCode.MODEL_LOAD_COMPLETE,
        human=narration.model_load_complete(
            model_ref=handle.model_ref, weights_bytes=memory.weights_bytes, seconds=seconds
        ),
        model_ref=handle.model_ref,
        digest=handle.digest,
        weights_bytes=memory.weights_bytes,
        kv_bytes=memory.kv_bytes,
        load_seconds=resident.load_seconds,
    )
    log.info(
        EventCode.SEALED,
        human=narration.sealed(model_ref=handle.model_ref, pinned=handle.pinned, emulated=handle.emulated),
        handle_id=handle.handle_id,
        digest=handle.digest,
        pinned=handle.pinned,
        emulated=handle.emulated,
        vram_bytes=handle.vram_bytes,
    )
    known = {"handle_id": handle.handle_id, "model_ref": handle.model_ref, "digest": handle.digest}
    audit.record(AuditEvent.LOAD_VERIFIED, **known)
    audit.record(AuditEvent.MEMORY_ALLOCATED, vram_bytes=resident.vram_bytes, emulated=handle.emulated)
    audit.record(AuditEvent.LOAD_COMPLETED, duration_ms=round(seconds * 1e3), **known)
    audit.record(AuditEvent.SEALED, pinned=handle.pinned, emulated=handle.emulated, **known)


def log_ready(sealed: SealedModel) -> None:
    """Jobs are taken from now on."""
    handle, resident = sealed.handle, sealed.resident
    get_logger().info(
        EventCode.READY,
        human=narration.ready(model_ref=handle.model_ref, slots=resident.shape.rows, emulated=handle.emulated),
        model_ref=handle.model_ref,
        digest=handle.digest,
        device=resident.device.kind,
        emulated=handle.emulated,
        slots_total=resident.shape.rows,
    )


def audit_breach(error: OrcdError, audit: AuditLog | NoAudit) -> None:
    """Records an error that says that weights changed, or that a rule was broken; no other."""
    if error.code is ErrorCode.SEAL_VERIFICATION_FAILED:
        audit.record(AuditEvent.VERIFICATION_FAILED, tensor=error.field, reason=error.message)
    elif error.code is ErrorCode.POLICY_VIOLATION and error.field == "model_ref":
        audit.record(AuditEvent.PATH_REFUSED, field=error.field, rule=error.message)
    elif error.code is ErrorCode.POLICY_VIOLATION:
        audit.record(AuditEvent.POLICY_VIOLATION, field=error.field, reason=error.message)
