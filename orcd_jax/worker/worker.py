"""The worker: one model's life from plan to stop. Lives on the event loop; what runs jobs is ``jobs``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import jax

from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.device.discovery import DeviceInfo, bytes_in_use, describe, select_device
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.attestation import Attestation, AttestedHandle, sign_attestation
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.audit import AuditEvent
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.worker import reports
from orcd_jax.worker.jobs import Jobs
from orcd_jax.worker.lifecycle import Lifecycle, State
from orcd_jax.worker.loader import Listeners, SealedModel, load, seal_model
from orcd_jax.worker.loading import Loading
from orcd_jax.worker.planner import Planner
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import (
    AttestInfo,
    CommitEvent,
    CommitParams,
    ExecuteParams,
    Handle,
    PlanInfo,
    PlanParams,
    ReadyInfo,
    StatusInfo,
    WorkerEvent,
)
from orcd_jax.worker.watchdog import EngineProgress

STOP_TIMEOUT_S = 5.0  # a step takes milliseconds: a device that needs longer hangs
LAST_EVENTS_TIMEOUT_S = 1.0
RELEASE_SLACK_BYTES = 16 * 2**20  # of the device's own small change: a load that failed left no more than this
Argument = TypeVar("Argument")


class Worker:
    """Owns the lifecycle, the device, the sealed model and the jobs. Every method runs on the loop."""

    def __init__(self, config: WorkerConfig, services: Services | None = None) -> None:
        """A worker that has not loaded anything; ``start`` opens the device and loads."""
        self.config = config
        self.services = services or Services()
        self.lifecycle = Lifecycle()
        self.started_s = time.monotonic()
        self.device: DeviceInfo | None = None
        self.sealed: SealedModel | None = None
        self.jobs = Jobs(config, self.services, serving=self._serving, on_change=self._follow_jobs)
        self.progress = Progress("starting", 0, 1)
        self._jax_device: jax.Device | None = None
        self._loading: Loading | None = None
        self._failure: asyncio.Future[OrcdError] | None = None
        self._logged_percent: dict[str, int] = {}
        self._ready = asyncio.Event()
        self._progress_judge = EngineProgress(config.watchdog_timeout)

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Opens the device and, unless it is to await a Commit, loads the model it was started with.

        Raises:
          OrcdError: why it cannot; the worker is STOPPED then.
        """
        self._failure = asyncio.get_running_loop().create_future()
        try:
            await asyncio.to_thread(self._open_device)
            if not self.config.await_commit:
                async for _ in self.commit(CommitParams(plan=PlanParams())):
                    pass
        except BaseException:
            self.lifecycle.move(State.STOPPED)
            raise

    def _open_device(self) -> None:
        config = self.config
        self._jax_device = device = select_device(config.platform, config.gpu_device)
        health = self.services.gpu_health()
        self.device = describe(device, config.gpu_device, health, emulated_memory=config.emulated_memory)

    async def plan(self, params: PlanParams) -> PlanInfo:
        """Whether a model would load here, and every reason why not. Allocates nothing.

        Raises:
          OrcdError: NOT_READY, while the device is being opened.
        """
        planner = self._planner()
        info = await asyncio.to_thread(planner.assess, params)
        if self.lifecycle.state in (State.DRAINING, State.STOPPED):
            ending = OrcdError(ErrorCode.NOT_READY, f"the worker is {self.lifecycle.state}: it loads no model any more")
            info = replace(info, reasons=(*info.reasons, ending))
        get_logger().info(
            EventCode.PLAN,
            human=narration.plan(model_ref=params.model_ref, feasible=info.feasible, reasons=len(info.reasons)),
            model_ref=params.model_ref,
            needed_bytes=None if info.memory is None else info.memory.total_bytes,
            available_bytes=None if info.memory is None else info.memory.available_bytes,
            reasons=len(info.reasons),
        )
        return info

    async def commit(self, params: CommitParams) -> AsyncIterator[CommitEvent]:
        """Loads a model and seals it; asked for what is there, or on its way, it joins in (WORKER-4220).

        Leaving does not stop a load.

        Yields:
          Progress, then the handle.

        Raises:
          OrcdError: NOT_READY, BUSY, POLICY_VIOLATION (another model is here, or this one is not to be), or why the
            load failed.
        """
        if self.sealed is not None and self.lifecycle.serving:
            yield await self._committed(self.sealed, params)
            return
        if self._loading is not None and not self._loading.done:
            if self._loading.params != params:
                raise OrcdError(
                    ErrorCode.BUSY, "another model is being loaded; a worker holds one", retry_after_ms=1000
                )
        elif self.lifecycle.state is State.STARTING:
            self._planner()
            self.lifecycle.move(State.LOADING)
            self._loading = Loading(params, self._load(params))
        else:
            raise OrcdError(ErrorCode.NOT_READY, f"the worker is {self.lifecycle.state}: it loads no model any more")
        async for event in self._loading.events():
            yield event

    async def _committed(self, sealed: SealedModel, params: CommitParams) -> Handle:
        """The handle that is there, if it is what was asked for."""
        handle, other = (
            sealed.handle,
            "a worker holds one model for its life, and this one holds another: start another",
        )
        if params.expected_digest and params.expected_digest != handle.digest:
            raise OrcdError(ErrorCode.POLICY_VIOLATION, other, field="expected_digest")
        if params.shard_id and params.shard_id != handle.shard_id:
            raise OrcdError(ErrorCode.POLICY_VIOLATION, other, field="shard_id")
        if not params.expected_digest:
            directory = await asyncio.to_thread(self._planner().find, params.plan)
            if directory.resolve() != sealed.resident.plan.directory.resolve():
                raise OrcdError(ErrorCode.POLICY_VIOLATION, other, field="model_ref")
        shape = sealed.resident.shape
        held = (("max_context", params.plan.max_context, shape.max_context), ("slots", params.plan.slots, shape.rows))
        for field, wanted, there in held:
            if wanted is not None and wanted != there:
                raise OrcdError(
                    ErrorCode.POLICY_VIOLATION, f"{field}: the model was loaded for {there}, not {wanted}", field=field
                )
        return handle

    async def _load(self, params: CommitParams) -> Handle:
        """One attempt. A failure gives back all that was allocated and leads to STARTING, or else to STOPPED."""
        loop = asyncio.get_running_loop()
        audit, log = self.services.audit, get_logger()
        model_ref = params.plan.model_ref or self.config.model_path.name
        log.info(EventCode.MODEL_LOAD_START, human=narration.model_load_start(model_ref=model_ref), model_ref=model_ref)
        audit.record(AuditEvent.LOAD_STARTED, model_ref=model_ref)
        self._logged_percent.clear()
        began = time.monotonic()
        try:
            sealed = await asyncio.to_thread(self._load_blocking, params, loop)
        except BaseException as error:
            known = error if isinstance(error, OrcdError) else OrcdError(ErrorCode.INTERNAL, "an internal error")
            audit.record(AuditEvent.LOAD_FAILED, model_ref=model_ref, code=known.code.value, field=known.field)
            self._audit_breach(known)
            if self.config.await_commit:  # else the process ends by it, and says so
                log.error(EventCode.ERROR, human=known.message, code=known.code.value, field=known.field)
            await self._give_back(error, known)
            raise
        if self.lifecycle.state is not State.LOADING:
            await asyncio.to_thread(sealed.engine.stop, STOP_TIMEOUT_S)
            if self._failure is not None and self._failure.done():
                raise self._failure.result()
            raise OrcdError(ErrorCode.NOT_READY, "the worker was stopped while it loaded its model")
        self.sealed = sealed
        reports.log_sealed(sealed, seconds=time.monotonic() - began, audit=audit)
        self.lifecycle.move(State.READY)
        self._ready.set()
        reports.log_ready(sealed)
        return sealed.handle

    def _load_blocking(self, params: CommitParams, loop: asyncio.AbstractEventLoop) -> SealedModel:
        """Runs off the loop: plan, load, seal, and the engine's start."""
        assert self._jax_device is not None and self.device is not None  # noqa: S101, PT018 - ``_planner`` was called

        def on_progress(progress: Progress) -> None:
            _on_loop(loop, self._advance, progress)

        plan = self._planner().commit_plan(params)
        resident = load(
            self.config,
            plan,
            self._jax_device,
            self.device,
            plans_directory=self.services.plans_directory,
            on=on_progress,
            on_file=lambda entry: self.services.audit.record(
                AuditEvent.LOAD_HASHED, file=entry.path, bytes=entry.size_bytes, digest=entry.sha256
            ),
        )
        listeners = Listeners(
            deliver=lambda batch: _on_loop(loop, self.jobs.deliver, batch),
            on_fatal=lambda error: _on_loop(loop, self.fail, error),
            on_pass=self._on_pass,
            on_late=self._on_late,
        )
        return seal_model(
            self.config,
            resident,
            self._jax_device,
            key=self.services.seal_key,
            shard_id=params.shard_id,
            handle_id=f"h-{uuid.uuid4().hex}",
            listeners=listeners,
            on=on_progress,
        )

    async def _give_back(self, error: BaseException, known: OrcdError) -> None:
        """After a load that failed: frees what it held. STARTING when the device says so, else STOPPED."""
        if self.lifecycle.state is not State.LOADING:
            return
        if known.code is ErrorCode.CUDA_ERROR:  # nothing works on such a device any more
            self.fail(known)
            return
        for cause in _chain(error):  # their frames hold the arrays
            traceback.clear_frames(cause.__traceback__)
        held = await asyncio.to_thread(self._collect)
        if held <= RELEASE_SLACK_BYTES:
            self.services.audit.record(AuditEvent.MEMORY_RELEASED)
            self.lifecycle.move(State.STARTING)
        else:
            self.fail(OrcdError(ErrorCode.VRAM_OOM, f"a load that failed left {held} bytes on the device"))

    def _collect(self) -> int:
        gc.collect()
        return 0 if self._jax_device is None else bytes_in_use(self._jax_device)

    def _planner(self) -> Planner:
        if self.device is None:
            raise OrcdError(ErrorCode.NOT_READY, "the worker is opening its device", retry_after_ms=1000)
        return Planner(self.config, self.services, self.device)

    def _advance(self, progress: Progress) -> None:
        self.progress = progress
        if self._loading is not None:
            self._loading.advance(progress)
        percent = progress.percent // 25 * 25
        if self._logged_percent.get(progress.stage) != percent:
            self._logged_percent[progress.stage] = percent
            reports.log_progress(progress, percent)

    async def wait_ready(self) -> None:
        """Returns when jobs are taken."""
        await self._ready.wait()

    async def wait_failed(self) -> OrcdError:
        """Returns when the worker cannot go on, with the reason."""
        if self._failure is None:
            raise OrcdError(ErrorCode.INTERNAL, "the worker was not started")
        return await asyncio.shield(self._failure)

    def fail(self, error: OrcdError) -> None:
        """The worker cannot go on: every job ends with ``error``, and nothing unread is delivered any more."""
        self.lifecycle.move(State.STOPPED)
        self.jobs.abort(error)
        if error.code in (ErrorCode.CUDA_ERROR, ErrorCode.VRAM_OOM, ErrorCode.HOST_OOM):
            self.services.metrics.device_error(error.code)
        self._audit_breach(error)
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(error)

    def check_progress(self) -> None:
        """Fails the worker when its engine makes no step for ``--watchdog_timeout``. Called every second."""
        if self.sealed is None or self.lifecycle.state is State.STOPPED:
            return
        if (hung := self._progress_judge.poll(self.sealed.engine.stalled_s())) is not None:
            self.fail(hung)

    async def drain(self, timeout_s: float) -> None:
        """Refuses new jobs and waits for running ones, at most ``timeout_s`` seconds. Each call waits anew."""
        if self.lifecycle.state is State.STOPPED:
            return
        self.lifecycle.move(State.DRAINING)
        jobs = len(self.jobs.live)
        get_logger().info(EventCode.DRAIN, human=narration.drain(jobs=jobs, timeout_s=timeout_s), jobs=jobs)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.jobs.live.idle.wait(), timeout_s)

    async def stop(self) -> bool:
        """Ends what still runs, lets every reader have its last event, and gives the device back. STOPPED after this.

        Returns:
          False when the device did not answer: what it holds is freed only by the end of the process.
        """
        self.lifecycle.move(State.STOPPED)
        in_order = True
        if self.sealed is not None:
            in_order = await asyncio.to_thread(self.sealed.engine.stop, STOP_TIMEOUT_S)
            if not in_order:
                self.jobs.abort(
                    OrcdError(ErrorCode.CUDA_ERROR, f"the device did not answer within {STOP_TIMEOUT_S:g} s")
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.jobs.live.idle.wait(), LAST_EVENTS_TIMEOUT_S)
            if in_order:
                self.services.audit.record(AuditEvent.MEMORY_RELEASED, vram_bytes=self.sealed.resident.vram_bytes)
        self.sealed = None
        return in_order

    # -- jobs ----------------------------------------------------------------------------------------------------

    def execute(self, params: ExecuteParams, owner: str) -> AsyncIterator[WorkerEvent]:
        """Runs one job; see :meth:`Jobs.execute`."""
        return self.jobs.execute(params, owner)

    async def cancel(self, job_id: str, owner: str) -> bool:
        """Ends a job of this owner; see :meth:`Jobs.cancel`."""
        return await self.jobs.cancel(job_id, owner)

    def _follow_jobs(self) -> None:
        """READY while no slot is taken, EXECUTING while one is."""
        if self.lifecycle.serving:
            self.lifecycle.move(State.EXECUTING if len(self.jobs.live) else State.READY)

    def _serving(self) -> SealedModel:
        if not self.lifecycle.serving or self.sealed is None:
            raise OrcdError(
                ErrorCode.NOT_READY,
                f"the worker is {self.lifecycle.state}; it takes jobs when READY",
                retry_after_ms=1000,
            )
        return self.sealed

    # -- proofs --------------------------------------------------------------------------------------------------

    async def attest(self, nonce: bytes, handle_id: str) -> AttestInfo:
        """Proves the weights anew, from the device, and signs what was found together with ``nonce`` (WORKER-4255).

        Raises:
          OrcdError: NOT_READY; NOT_FOUND; SEAL_VERIFICATION_FAILED, and the worker stops.
        """
        sealed = self._serving()
        if handle_id and handle_id != sealed.handle.handle_id:
            raise OrcdError(ErrorCode.NOT_FOUND, "no such handle is loaded here; Ready lists them", field="handle_id")
        loop = asyncio.get_running_loop()
        proved: asyncio.Future[OrcdError | None] = loop.create_future()

        def settle(error: OrcdError | None) -> None:
            if not proved.done():
                proved.set_result(error)

        began_ms = _now_ms()
        sealed.engine.prove(lambda error: _on_loop(loop, settle, error))
        if (error := await proved) is not None:
            raise error
        statement = Attestation(
            handle=AttestedHandle.of(sealed.handle),
            worker_id=self.config.worker_id,
            pool_id=self.config.pool_id,
            digest=sealed.handle.digest,  # the pass compared every tensor that this is the digest of
            digest_began_at_ms=began_ms,
            digest_ended_at_ms=_now_ms(),
            nonce=nonce,
            executable_fingerprint=sealed.resident.fingerprint,
        )
        took_ms = statement.digest_ended_at_ms - began_ms
        get_logger().info(
            EventCode.ATTESTED,
            human=narration.attested(seconds=took_ms / 1e3),
            handle_id=sealed.handle.handle_id,
            digest=statement.digest,
            duration_ms=took_ms,
        )
        return AttestInfo(
            handle=sealed.handle,
            digest=statement.digest,
            digest_began_at_ms=statement.digest_began_at_ms,
            digest_ended_at_ms=statement.digest_ended_at_ms,
            nonce=nonce,
            executable_fingerprint=statement.executable_fingerprint,
            signature=sign_attestation(self.services.identity, statement),
            public_key=self.services.identity.public_bytes,
            worker_id=statement.worker_id,
            pool_id=statement.pool_id,
        )

    def _on_pass(self, seconds: float) -> None:
        """A whole proof is complete. Runs on the engine thread: counts, and writes into a buffer."""
        self.services.metrics.digest_pass(seconds)
        if self.sealed is not None:
            handle = self.sealed.handle
            self.services.audit.record(
                AuditEvent.DIGEST_RECOMPUTED,
                handle_id=handle.handle_id,
                digest=handle.digest,
                duration_ms=round(seconds * 1e3),
            )

    def _on_late(self, age_s: float) -> None:
        """Tokens wait for a proof. Runs on the engine thread."""
        get_logger().warning(
            EventCode.SEAL_AT_RISK, human=narration.proof_overdue(age_s=age_s), age_ms=round(age_s * 1e3)
        )

    def _audit_breach(self, error: OrcdError) -> None:
        if error.code is ErrorCode.SEAL_VERIFICATION_FAILED:
            self.services.audit.record(AuditEvent.VERIFICATION_FAILED, tensor=error.field, reason=error.message)
        elif error.code is ErrorCode.POLICY_VIOLATION and error.field == "model_ref":
            self.services.audit.record(AuditEvent.PATH_REFUSED, field=error.field, rule=error.message)
        elif error.code is ErrorCode.POLICY_VIOLATION:
            self.services.audit.record(AuditEvent.POLICY_VIOLATION, field=error.field, reason=error.message)

    # -- questions -----------------------------------------------------------------------------------------------

    async def tokenize(self, text: str, add_special: bool) -> tuple[int, ...]:
        """Token ids of a text."""
        tokenizer = self._serving().resident.tokenizer
        return await asyncio.to_thread(tokenizer.encode, text, add_special=add_special)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        tokenizer = self._serving().resident.tokenizer
        return await asyncio.to_thread(tokenizer.decode, ids)

    def ready(self) -> ReadyInfo:
        """Whether jobs are taken, and on what. Never asks the device."""
        return reports.ready(self)

    def status(self) -> StatusInfo:
        """Everything worth knowing at a glance. Never asks the device."""
        return reports.status(self)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and all that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[Argument], None], argument: Argument) -> None:
    """Runs ``call(argument)`` on the loop; drops it when the loop is gone, as at the end of the process."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, argument)
