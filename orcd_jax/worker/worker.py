"""The worker: one model's life from start to stop, and the jobs in between. Lives on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from orcd_jax import __version__
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.engine.engine import Engine
from orcd_jax.engine.request import Ended, Failed, JobRequest, SamplingParams, Tokens
from orcd_jax.engine.stream import JobStream
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.worker.capability import SUPPORTED
from orcd_jax.worker.lifecycle import Lifecycle, State
from orcd_jax.worker.live_jobs import LiveJobs
from orcd_jax.worker.loader import ResidentModel, load_model
from orcd_jax.worker.types import (
    ChatPrompt,
    EngineCapabilities,
    ExecuteParams,
    Handle,
    Metrics,
    ReadyInfo,
    Started,
    StatusInfo,
    WorkerEvent,
)

METRICS_INTERVAL_S = 0.5  # WORKER-4240: every 250 to 1000 ms
STOP_TIMEOUT_S = 5.0  # a step takes milliseconds: a device that needs longer hangs
LAST_EVENTS_TIMEOUT_S = 1.0
Argument = TypeVar("Argument")
_STATUS_WORD = {
    State.STARTING: "starting",
    State.LOADING: "starting",
    State.READY: "ready",
    State.EXECUTING: "busy",
    State.DRAINING: "draining",
    State.STOPPED: "failed",
}


class Worker:
    """Owns the lifecycle, the resident model, the engine and the table of live jobs. Every method runs on the loop."""

    def __init__(self, config: WorkerConfig) -> None:
        """A worker that has not loaded anything; ``start`` loads."""
        self.config = config
        self.lifecycle = Lifecycle()
        self._model: ResidentModel | None = None
        self._handle: Handle | None = None
        self._engine: Engine | None = None
        self._jobs = LiveJobs(config.slots_total, self._follow_jobs)
        self._failure: asyncio.Future[OrcdError] | None = None
        self._started_s = time.monotonic()
        self._digested_s: float | None = None
        self._progress = Progress("starting", 0, 1)
        self._logged_percent: dict[str, int] = {}

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Loads the model, verifies it on the device, starts the engine and becomes READY.

        Raises:
          OrcdError: why it cannot; the worker is STOPPED then.
        """
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        log, model_ref = get_logger(), self.config.model_path.name
        self.lifecycle.move(State.LOADING)
        log.info(EventCode.MODEL_LOAD_START, human=narration.model_load_start(model_ref=model_ref), model_ref=model_ref)
        began = time.monotonic()
        try:
            model, engine = await asyncio.to_thread(self._load, loop)
        except BaseException:
            self.lifecycle.move(State.STOPPED)
            raise
        if self.lifecycle.state is not State.LOADING:
            await asyncio.to_thread(engine.stop, STOP_TIMEOUT_S)
            raise OrcdError(ErrorCode.NOT_READY, "the worker was stopped while it loaded its model")
        self._model, self._engine = model, engine
        manifest, device = model.manifest, model.device
        self._digested_s = model.digested_s
        self._handle = Handle(
            handle_id=f"h-{uuid.uuid4().hex}",
            shard_id=f"{manifest.digest[:16]}-0",
            device_index=device.index,
            device_uuid="",
            vram_bytes=0 if device.emulated else manifest.weight_bytes,
            sealed=False,
            sealed_at_ms=0,
            digest=manifest.digest,
            model_ref=manifest.model.model_id,
            shard_index=0,
            total_shards=1,
            pinned=False,
            emulated=device.emulated,
        )
        log.info(
            EventCode.MODEL_LOAD_COMPLETE,
            human=narration.model_load_complete(
                model_ref=manifest.model.model_id,
                weights_bytes=manifest.weight_bytes,
                seconds=time.monotonic() - began,
            ),
            model_ref=manifest.model.model_id,
            digest=manifest.digest,
            weights_bytes=manifest.weight_bytes,
            kv_bytes=model.kv_bytes,
            load_seconds=model.load_seconds,
        )
        self.lifecycle.move(State.READY)
        log.info(
            EventCode.READY,
            human=narration.ready(
                model_ref=manifest.model.model_id, slots=self.config.slots_total, emulated=device.emulated
            ),
            model_ref=manifest.model.model_id,
            digest=manifest.digest,
            device=device.kind,
            emulated=device.emulated,
            slots_total=self.config.slots_total,
        )

    def _load(self, loop: asyncio.AbstractEventLoop) -> tuple[ResidentModel, Engine]:
        """Runs off the loop: loads the model, and starts the engine over it."""
        model = load_model(self.config, lambda progress: _on_loop(loop, self._on_progress, progress))
        engine = Engine(
            model.programs,
            model.params,
            token_bytes=model.tokenizer.token_bytes,
            eos_ids=model.tokenizer.eos_ids,
            deliver=lambda batch: _on_loop(loop, self._jobs.deliver, batch),
            on_fatal=lambda error: _on_loop(loop, self._fail, error),
        )
        engine.start()
        return model, engine

    def _on_progress(self, progress: Progress) -> None:
        self._progress = progress
        percent = progress.percent // 25 * 25
        if self._logged_percent.get(progress.stage) != percent:
            self._logged_percent[progress.stage] = percent
            get_logger().info(
                EventCode.MODEL_LOAD_PROGRESS,
                human=narration.model_load_progress(stage=progress.stage, percent=percent),
                stage=progress.stage,
                percent=percent,
            )

    async def wait_failed(self) -> OrcdError:
        """Returns when the engine cannot go on, with the reason."""
        if self._failure is None:
            raise OrcdError(ErrorCode.INTERNAL, "the worker was not started")
        return await asyncio.shield(self._failure)

    def _fail(self, error: OrcdError) -> None:
        self.lifecycle.move(State.STOPPED)
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(error)

    async def drain(self, timeout_s: float) -> None:
        """Refuses new jobs and waits for running ones, at most ``timeout_s`` seconds. Each call waits anew."""
        if self.lifecycle.state is State.STOPPED:
            return
        self.lifecycle.move(State.DRAINING)
        jobs = len(self._jobs)
        get_logger().info(EventCode.DRAIN, human=narration.drain(jobs=jobs, timeout_s=timeout_s), jobs=jobs)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._jobs.idle.wait(), timeout_s)

    async def stop(self) -> bool:
        """Ends what still runs, lets every reader have its last event, and gives the device back. STOPPED after this.

        Returns:
          False when the device did not answer: what it holds is freed only by the end of the process.
        """
        self.lifecycle.move(State.STOPPED)
        in_order = True
        if self._engine is not None:
            in_order = await asyncio.to_thread(self._engine.stop, STOP_TIMEOUT_S)
            if not in_order:
                hung = OrcdError(ErrorCode.CUDA_ERROR, f"the device did not answer within {STOP_TIMEOUT_S:g} s")
                for live in self._jobs:
                    live.stream.abort(Failed(hung))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._jobs.idle.wait(), LAST_EVENTS_TIMEOUT_S)
        self._engine = self._model = None
        return in_order

    # -- jobs ----------------------------------------------------------------------------------------------------

    async def execute(self, params: ExecuteParams, owner: str) -> AsyncIterator[WorkerEvent]:
        """Runs one job. Closing the iterator cancels it.

        Args:
          params: the job.
          owner: the caller's identity; only it can cancel the job.

        Yields:
          Started, then Tokens and Metrics, then exactly one Ended or Failed.

        Raises:
          OrcdError: before the first event, when the job is refused: NOT_READY, NOT_FOUND, BUSY, INVALID_PARAMS,
            TIMEOUT, or CANCELLED when it was cancelled so soon.
        """
        received_s = time.monotonic()
        model, engine = self._serving()
        if params.handle_id is not None and (self._handle is None or params.handle_id != self._handle.handle_id):
            raise OrcdError(ErrorCode.NOT_FOUND, "no such handle is loaded here; Ready lists them", field="handle_id")
        live = self._jobs.admit(owner, params.job_id)
        try:
            request = await self._request(model, params, received_s)
            if live.stream.closed and isinstance(early := await live.stream.next(), Failed):
                raise early.error
            self._serving()  # it may have changed while the prompt was tokenised
            if request.deadline_s is not None and time.monotonic() >= request.deadline_s:
                raise OrcdError(
                    ErrorCode.TIMEOUT, "the deadline passed before the job could start", field="deadline_ms"
                )
            self._jobs.attach(live, engine.submit(request))
            get_logger().info(
                EventCode.EXECUTE_START,
                human=narration.execute_start(job_id=params.job_id, tokens_in=len(request.prompt_ids)),
                job_id=params.job_id,
                tokens_in=len(request.prompt_ids),
            )
            yield Started(
                job_id=params.job_id,
                model=model.manifest.model.model_id,
                started_at_ms=time.time_ns() // 1_000_000,
                seed=request.sampling.seed,
            )
            async for event in self._events(live.stream, vram_bytes=self._vram_bytes(model)):
                if isinstance(event, Ended | Failed):
                    self._jobs.release(live)
                    self._log_end(params.job_id, event)
                yield event
        finally:
            gone = Failed(OrcdError(ErrorCode.CANCELLED, "the client went away"))
            if live.job is not None and live.stream.abort(gone):
                engine.cancel(live.job)
                self._log_end(params.job_id, gone)
            self._jobs.leave(live)

    async def _events(self, stream: JobStream, vram_bytes: int) -> AsyncIterator[WorkerEvent]:
        """The stream's events, with Metrics in between."""
        tokens_out, first_s, due_s = 0, 0.0, time.monotonic() + METRICS_INTERVAL_S
        while True:
            event = await stream.next(timeout_s=max(0.0, due_s - time.monotonic()))
            if isinstance(event, Tokens):
                first_s = first_s or time.monotonic()
                tokens_out += len(event.ids)
            if event is not None:
                yield event
                if isinstance(event, Ended | Failed):
                    return
            now = time.monotonic()  # not before the yield: a slow reader may have taken a while
            if now >= due_s and not stream.closed:
                decode_time_ms = (now - first_s) * 1e3 if first_s else 0.0
                yield Metrics(tokens_out=tokens_out, decode_time_ms=decode_time_ms, vram_bytes=vram_bytes)
                due_s = time.monotonic() + METRICS_INTERVAL_S

    async def _request(self, model: ResidentModel, params: ExecuteParams, received_s: float) -> JobRequest:
        """Turns a caller's job into the engine's: prompt to ids, deadline to the clock, a seed if none was given."""
        if isinstance(params.prompt, tuple):
            prompt_ids = params.prompt
        else:
            prompt_ids = await asyncio.to_thread(self._tokenize_prompt, model, params.prompt)
        timeout_ms = min(params.timeout_ms or self.config.execution_timeout_ms, self.config.execution_timeout_ms)
        return JobRequest(
            job_id=params.job_id,
            prompt_ids=prompt_ids,
            max_tokens=params.max_tokens,
            sampling=SamplingParams(
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                seed=secrets.randbits(64) if params.seed is None else params.seed,
            ),
            stop=params.stop,
            stop_ids=params.stop_ids,
            ignore_eos=params.ignore_eos,
            deadline_s=received_s + timeout_ms / 1e3,
        )

    @staticmethod
    def _tokenize_prompt(model: ResidentModel, prompt: str | ChatPrompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return model.tokenizer.encode(prompt, add_special=True)
        if model.chat_template is None:
            raise OrcdError(
                ErrorCode.INVALID_PARAMS, "this model has no chat template; send a plain prompt", field="chat"
            )
        rendered = model.chat_template.render(prompt.messages, add_generation_prompt=prompt.add_generation_prompt)
        # The template writes the model's special tokens itself.
        return model.tokenizer.encode(rendered, add_special=False)

    async def cancel(self, job_id: str, owner: str) -> bool:
        """Ends a job of this owner: its reader sees CANCELLED next. False when it is unknown, foreign or over."""
        live = self._jobs.find(owner, job_id)
        cancelled = Failed(OrcdError(ErrorCode.CANCELLED, "the job was cancelled"))
        if live is None or not live.stream.abort(cancelled):
            return False
        if self._engine is not None and live.job is not None:
            self._engine.cancel(live.job)
        self._jobs.release(live)
        return True

    def _follow_jobs(self) -> None:
        """READY while no slot is taken, EXECUTING while one is."""
        if self.lifecycle.serving:
            self.lifecycle.move(State.EXECUTING if len(self._jobs) else State.READY)

    def _serving(self) -> tuple[ResidentModel, Engine]:
        if not self.lifecycle.serving or self._model is None or self._engine is None:
            raise OrcdError(
                ErrorCode.NOT_READY,
                f"the worker is {self.lifecycle.state}; it takes jobs when READY",
                retry_after_ms=1000,
            )
        return self._model, self._engine

    def _log_end(self, job_id: str, event: Ended | Failed) -> None:
        if isinstance(event, Ended):
            get_logger().info(
                EventCode.EXECUTE_END,
                human=narration.execute_end(
                    job_id=job_id,
                    tokens_out=event.tokens_out,
                    seconds=event.decode_time_ms / 1e3,
                    finish_reason=event.finish_reason,
                ),
                job_id=job_id,
                tokens_in=event.tokens_in,
                tokens_out=event.tokens_out,
                decode_time_ms=round(event.decode_time_ms, 3),
                time_to_first_token_ms=round(event.time_to_first_token_ms, 3),
                finish_reason=event.finish_reason.value,
            )
        else:
            get_logger().info(
                EventCode.EXECUTE_END,
                human=narration.job_failed(job_id=job_id, message=event.error.message),
                job_id=job_id,
                code=event.error.code.value,
            )

    # -- questions -----------------------------------------------------------------------------------------------

    async def tokenize(self, text: str, add_special: bool) -> tuple[int, ...]:
        """Token ids of a text."""
        model, _ = self._serving()
        return await asyncio.to_thread(model.tokenizer.encode, text, add_special=add_special)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        model, _ = self._serving()
        return await asyncio.to_thread(model.tokenizer.decode, ids)

    def ready(self) -> ReadyInfo:
        """Whether jobs are taken, and on what. Never asks the device."""
        age_ms = None if self._digested_s is None else int((time.monotonic() - self._digested_s) * 1e3)
        return ReadyInfo(
            ready=self.lifecycle.serving,
            state=self.lifecycle.state.value,
            handles=() if self._handle is None else (self._handle,),
            capabilities=self._capabilities(),
            last_digest_age_ms=age_ms,
        )

    def status(self) -> StatusInfo:
        """Everything worth knowing at a glance. Never asks the device."""
        model, serving = self._model, self.lifecycle.serving
        manifest = None if model is None else model.manifest
        planned = 0 if model is None else self._vram_bytes(model)
        return StatusInfo(
            worker_id=self.config.worker_id,
            pool_id=self.config.pool_id,
            version=__version__,
            status=_STATUS_WORD[self.lifecycle.state],
            state=self.lifecycle.state.value,
            resident=model is not None and not model.device.emulated,
            emulated=self.config.platform == "cpu",
            model_ref="" if manifest is None else manifest.model.model_id,
            digest="" if manifest is None else manifest.digest,
            quant="" if manifest is None else manifest.model.quant,
            tokenizer="" if manifest is None else manifest.model.tokenizer,
            vocab_size=0 if manifest is None else manifest.model.vocab_size,
            max_context=0 if model is None else model.shape.max_context,
            slots_total=self.config.slots_total,
            slots_used=len(self._jobs),
            vram_used_bytes=planned,
            vram_planned_bytes=planned,
            uptime_ms=int((time.monotonic() - self._started_s) * 1e3),
            device="" if model is None else model.device.kind,
            compute_capability="" if model is None else model.device.compute_capability,
            load_stage="" if serving else self._progress.stage,
            load_percent=100 if serving else self._progress.percent,
        )

    def _capabilities(self) -> EngineCapabilities:
        model = self._model
        return EngineCapabilities(
            worker_id=self.config.worker_id,
            architectures=SUPPORTED.architectures,
            positional=SUPPORTED.positional,
            attention=SUPPORTED.attention,
            quant=SUPPORTED.quant,
            max_context=self.config.max_context if model is None else model.shape.max_context,
            vram_bytes=0 if model is None else model.device.memory_bytes,
            device="" if model is None else model.device.kind,
        )

    @staticmethod
    def _vram_bytes(model: ResidentModel) -> int:
        """Device memory the weights and the KV pages hold; none on an emulated device."""
        return 0 if model.device.emulated else model.manifest.weight_bytes + model.kv_bytes


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[Argument], None], argument: Argument) -> None:
    """Runs ``call(argument)`` on the loop; drops it when the loop is gone, as at the end of the process."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, argument)
