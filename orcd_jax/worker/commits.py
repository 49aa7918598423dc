"""Plan and Commit: what would load, the load that goes on, and the one sealed model it ends with. On the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import jax

from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.device.discovery import DeviceInfo, bytes_in_use, describe, select_device
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.audit import AuditEvent
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.worker import reports
from orcd_jax.worker.lifecycle import Lifecycle, State
from orcd_jax.worker.loader import Listeners, SealedModel, load, seal_model
from orcd_jax.worker.loading import Loading
from orcd_jax.worker.planner import Planner
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import CommitEvent, CommitParams, Handle, PlanInfo, PlanParams

STOP_TIMEOUT_S = 5.0  # a step takes milliseconds: a device that needs longer hangs
RELEASE_SLACK_BYTES = 16 * 2**20  # of the device's own small change: a load that failed left no more than this
Argument = TypeVar("Argument")


class Commits:
    """Owns the device and the model on it. Every method but ``open_device`` runs on the loop.

    Attributes:
      device: None until it is open.
      sealed: the model that jobs run on; None before it is sealed and after it was released.
      progress: of the load that goes on, or went on last.
    """

    def __init__(
        self,
        config: WorkerConfig,
        services: Services,
        lifecycle: Lifecycle,
        *,
        listeners: Callable[[], Listeners],
        fail: Callable[[OrcdError], None],
        failure: Callable[[], OrcdError | None],
    ) -> None:
        """Nothing is loaded yet.

        Args:
          config: which model, where, and its limits.
          services: keys, the audit, and what the driver says.
          lifecycle: moved to LOADING, READY, and back to STARTING after a load that failed.
          listeners: makes those that a sealed model tells what it does; called on the loop.
          fail: ends the worker, when a load leaves a device behind that nothing can be loaded on.
          failure: why the worker ended, when it did by a failure.
        """
        self._config, self._services, self._lifecycle = config, services, lifecycle
        self._listeners, self._fail, self._failure = listeners, fail, failure
        self.device: DeviceInfo | None = None
        self.sealed: SealedModel | None = None
        self.progress = Progress("starting", 0, 1)
        self._jax_device: jax.Device | None = None
        self._loading: Loading | None = None
        self._logged_percent: dict[str, int] = {}

    def open_device(self) -> None:
        """Opens the device, for good. Blocks; call it off the loop.

        Raises:
          NoDevice: there is none of the platform.
        """
        config = self._config
        before = self._services.gpu_health()  # while nothing on the device is ours
        self._jax_device = device = select_device(config.platform, config.gpu_device)
        self.device = describe(device, config.gpu_device, before, emulated_memory=config.emulated_memory)

    # -- Plan ----------------------------------------------------------------------------------------------------

    async def plan(self, params: PlanParams) -> PlanInfo:
        """Whether a Commit of these wishes, and no more, would load or find its model; every reason why not.

        Allocates nothing.

        Raises:
          OrcdError: NOT_READY, while the device is being opened.
        """
        info = await self._assess(self._planner(), params)
        get_logger().info(
            EventCode.PLAN,
            human=narration.plan(model_ref=params.model_ref, feasible=info.feasible, reasons=len(info.reasons)),
            model_ref=params.model_ref,
            needed_bytes=None if info.memory is None else info.memory.total_bytes,
            available_bytes=None if info.memory is None else info.memory.available_bytes,
            reasons=len(info.reasons),
        )
        return info

    async def _assess(self, planner: Planner, params: PlanParams) -> PlanInfo:
        commit = CommitParams(plan=params)
        info = await asyncio.to_thread(planner.assess, params)
        if (sealed := self._resident()) is None:
            refusal = self._refusal(commit)
            return info if refusal is None else replace(info, reasons=(refusal, *info.reasons))
        first = await asyncio.to_thread(planner.resident_problems, commit, sealed)
        if not first:
            return await asyncio.to_thread(planner.resident_info, sealed.resident.plan)
        told = {reason.message for reason in first}
        return replace(info, reasons=(*first, *(reason for reason in info.reasons if reason.message not in told)))

    # -- Commit --------------------------------------------------------------------------------------------------

    async def commit(self, params: CommitParams) -> AsyncIterator[CommitEvent]:
        """Loads a model and seals it; asked for what is there, or on its way, it joins in (WORKER-4220).

        Leaving does not stop a load.

        Yields:
          Progress, then the handle.

        Raises:
          OrcdError: NOT_READY, BUSY, POLICY_VIOLATION (another model is here, or this one is not to be), or why the
            load failed, or would fail if the model were not here.
        """
        if (sealed := self._resident()) is not None:
            for problem in await asyncio.to_thread(self._planner().resident_problems, params, sealed):
                raise problem
            yield sealed.handle
            return
        if (refusal := self._refusal(params)) is not None:
            raise refusal
        if self._loading is None or self._loading.done:
            self._planner()
            self._lifecycle.move(State.LOADING)
            self._loading = Loading(params, self._load(params))
        async for event in self._loading.events():
            yield event

    def release(self) -> None:
        """Lets go of the model, whose engine has ended."""
        self.sealed = None

    def _resident(self) -> SealedModel | None:
        return self.sealed if self._lifecycle.serving else None

    def _refusal(self, params: CommitParams) -> OrcdError | None:
        """Why this worker, on which no model is sealed, neither begins this load nor lets it join in."""
        if self._lifecycle.state not in (State.STARTING, State.LOADING):
            return OrcdError(ErrorCode.NOT_READY, f"the worker is {self._lifecycle.state}: it loads no model any more")
        if self._loading is None or self._loading.done or self._loading.params == params:
            return None
        return OrcdError(ErrorCode.BUSY, "another model is being loaded; a worker holds one", retry_after_ms=1000)

    def _planner(self) -> Planner:
        if self.device is None:
            raise OrcdError(ErrorCode.NOT_READY, "the worker is opening its device", retry_after_ms=1000)
        return Planner(self._config, self._services, self.device)

    # -- one load ------------------------------------------------------------------------------------------------

    async def _load(self, params: CommitParams) -> Handle:
        """One attempt. A failure gives back all that was allocated and leads to STARTING, or else to STOPPED."""
        audit, log = self._services.audit, get_logger()
        model_ref = params.plan.model_ref or self._config.model_path.name
        log.info(EventCode.MODEL_LOAD_START, human=narration.model_load_start(model_ref=model_ref), model_ref=model_ref)
        audit.record(AuditEvent.LOAD_STARTED, model_ref=model_ref)
        self._logged_percent.clear()
        began = time.monotonic()
        try:
            sealed = await asyncio.to_thread(self._load_blocking, params, asyncio.get_running_loop(), self._listeners())
        except BaseException as error:
            known = error if isinstance(error, OrcdError) else OrcdError(ErrorCode.INTERNAL, "an internal error")
            audit.record(AuditEvent.LOAD_FAILED, model_ref=model_ref, code=known.code.value, field=known.field)
            reports.audit_breach(known, audit)
            if self._config.await_commit:  # else the process ends by it, and says so
                log.error(EventCode.ERROR, human=known.message, code=known.code.value, field=known.field)
            await self._give_back(error, known)
            raise
        if self._lifecycle.state is not State.LOADING:
            await asyncio.to_thread(sealed.engine.stop, STOP_TIMEOUT_S)
            stopped = OrcdError(ErrorCode.NOT_READY, "the worker was stopped while it loaded its model")
            raise self._failure() or stopped
        self.sealed = sealed
        reports.log_sealed(sealed, seconds=time.monotonic() - began, audit=audit)
        self._lifecycle.move(State.READY)
        reports.log_ready(sealed)
        return sealed.handle

    def _load_blocking(
        self, params: CommitParams, loop: asyncio.AbstractEventLoop, listeners: Listeners
    ) -> SealedModel:
        """Runs off the loop: plan, load, seal, and the engine's start."""
        assert self._jax_device is not None and self.device is not None  # noqa: S101, PT018 - ``_planner`` was called

        def on_progress(progress: Progress) -> None:
            on_loop(loop, self._advance, progress)

        resident = load(
            self._config,
            self._planner().commit_plan(params),
            self._jax_device,
            self.device,
            plans_directory=self._services.plans_directory,
            on=on_progress,
            on_file=lambda entry: self._services.audit.record(
                AuditEvent.LOAD_HASHED, file=entry.path, bytes=entry.size_bytes, digest=entry.sha256
            ),
        )
        return seal_model(
            self._config,
            resident,
            self._jax_device,
            key=self._services.seal_key,
            shard_id=params.shard_id,
            handle_id=f"h-{uuid.uuid4().hex}",
            listeners=listeners,
            on=on_progress,
        )

    async def _give_back(self, error: BaseException, known: OrcdError) -> None:
        """After a load that failed: frees what it held. STARTING when the device says so, else STOPPED."""
        if self._lifecycle.state is not State.LOADING:
            return
        if known.code is ErrorCode.CUDA_ERROR:  # nothing works on such a device any more
            self._fail(known)
            return
        for cause in _chain(error):  # their frames hold the arrays
            traceback.clear_frames(cause.__traceback__)
        held = await asyncio.to_thread(self._collect)
        if held <= RELEASE_SLACK_BYTES:
            self._services.audit.record(AuditEvent.MEMORY_RELEASED)
            self._lifecycle.move(State.STARTING)
        else:
            self._fail(OrcdError(ErrorCode.VRAM_OOM, f"a load that failed left {held} bytes on the device"))

    def _collect(self) -> int:
        gc.collect()
        return 0 if self._jax_device is None else bytes_in_use(self._jax_device)

    def _advance(self, progress: Progress) -> None:
        self.progress = progress
        if self._loading is not None:
            self._loading.advance(progress)
        percent = progress.percent // 25 * 25
        if self._logged_percent.get(progress.stage) != percent:
            self._logged_percent[progress.stage] = percent
            reports.log_progress(progress, percent)


def on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[Argument], None], argument: Argument) -> None:
    """Runs ``call(argument)`` on the loop; drops it when the loop is gone, as at the end of the process."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, argument)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and all that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
