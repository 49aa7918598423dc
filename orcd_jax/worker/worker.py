"""The worker: its life from start to stop, and whatever it is asked. Lives on the event loop.

What loads a model is ``commits``; what runs jobs is ``jobs``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.device.discovery import DeviceInfo
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.attestation import Attestation, AttestedHandle, sign_attestation
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.audit import AuditEvent
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.worker import reports
from orcd_jax.worker.commits import STOP_TIMEOUT_S, Commits, on_loop
from orcd_jax.worker.jobs import Jobs
from orcd_jax.worker.lifecycle import Lifecycle, State
from orcd_jax.worker.loader import Listeners, SealedModel
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import (
    AttestInfo,
    CommitEvent,
    CommitParams,
    ExecuteParams,
    PlanInfo,
    PlanParams,
    ReadyInfo,
    StatusInfo,
    WorkerEvent,
)
from orcd_jax.worker.watchdog import EngineProgress

LAST_EVENTS_TIMEOUT_S = 1.0


class Worker:
    """Owns the lifecycle and its end, the commits and the jobs. Every method runs on the loop."""

    def __init__(self, config: WorkerConfig, services: Services | None = None) -> None:
        """A worker that has not loaded anything; ``start`` opens the device and loads."""
        self.config = config
        self.services = services or Services()
        self.lifecycle = Lifecycle()
        self.started_s = time.monotonic()
        self.jobs = Jobs(config, self.services, serving=self._serving, on_change=self._follow_jobs)
        self.commits = Commits(
            config,
            self.services,
            self.lifecycle,
            listeners=self._listeners,
            fail=self.fail,
            failure=self._failed_by,
        )
        self._failure: asyncio.Future[OrcdError] | None = None
        self._ready = asyncio.Event()
        self.lifecycle.subscribe(lambda state: self._ready.set() if state is State.READY else None)
        self._progress_judge = EngineProgress(config.watchdog_timeout)

    @property
    def device(self) -> DeviceInfo | None:
        """The device; None until it is open."""
        return self.commits.device

    @property
    def sealed(self) -> SealedModel | None:
        """The model that jobs run on; None while there is none."""
        return self.commits.sealed

    @property
    def progress(self) -> Progress:
        """Of the load that goes on, or went on last."""
        return self.commits.progress

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Opens the device and, unless it is to await a Commit, loads the model it was started with.

        Raises:
          OrcdError: why it cannot; the worker is STOPPED then.
        """
        self._failure = asyncio.get_running_loop().create_future()
        try:
            await asyncio.to_thread(self.commits.open_device)
            if not self.config.await_commit:
                async for _ in self.commit(CommitParams(plan=PlanParams())):
                    pass
        except BaseException:
            self.lifecycle.move(State.STOPPED)
            raise

    async def plan(self, params: PlanParams) -> PlanInfo:
        """Whether a model would load here; see :meth:`Commits.plan`."""
        return await self.commits.plan(params)

    def commit(self, params: CommitParams) -> AsyncIterator[CommitEvent]:
        """Loads a model and seals it; see :meth:`Commits.commit`."""
        return self.commits.commit(params)

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
        reports.audit_breach(error, self.services.audit)
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(error)

    def _failed_by(self) -> OrcdError | None:
        return self._failure.result() if self._failure is not None and self._failure.done() else None

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
        if (sealed := self.sealed) is None:
            return True
        in_order = await asyncio.to_thread(sealed.engine.stop, STOP_TIMEOUT_S)
        if not in_order:
            self.jobs.abort(OrcdError(ErrorCode.CUDA_ERROR, f"the device did not answer within {STOP_TIMEOUT_S:g} s"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.jobs.live.idle.wait(), LAST_EVENTS_TIMEOUT_S)
        if in_order:
            self.services.audit.record(AuditEvent.MEMORY_RELEASED, vram_bytes=sealed.resident.vram_bytes)
        self.commits.release()
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

        began_ms, began_s = time.time_ns() // 1_000_000, time.monotonic()
        sealed.engine.prove(lambda error: on_loop(loop, settle, error))
        if (error := await proved) is not None:
            raise error
        took_ms = round((time.monotonic() - began_s) * 1e3)  # whatever the wall clock did meanwhile
        statement = Attestation(
            handle=AttestedHandle.of(sealed.handle),
            worker_id=self.config.worker_id,
            pool_id=self.config.pool_id,
            digest=sealed.handle.digest,  # the pass compared every tensor that this is the digest of
            digest_began_at_ms=began_ms,
            digest_ended_at_ms=began_ms + took_ms,
            nonce=nonce,
            executable_fingerprint=sealed.resident.fingerprint,
        )
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

    def _listeners(self) -> Listeners:
        loop = asyncio.get_running_loop()
        return Listeners(
            deliver=lambda batch: on_loop(loop, self.jobs.deliver, batch),
            on_fatal=lambda error: on_loop(loop, self.fail, error),
            on_pass=self._on_pass,
            on_late=self._on_late,
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
