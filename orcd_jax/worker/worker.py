"""The worker: one model's life from start to stop, and the jobs in between. Lives on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orcd_jax import __version__
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.engine.engine import Delivery, Engine, Job
from orcd_jax.engine.request import Ended, Failed, JobRequest, SamplingParams, Tokens
from orcd_jax.engine.stream import JobStream
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.worker.capability import SUPPORTED
from orcd_jax.worker.lifecycle import Lifecycle, State
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
RETRY_AFTER_MS = 250
STOP_TIMEOUT_S = 5.0
Argument = TypeVar("Argument")
_STATUS_WORD = {
    State.STARTING: "starting",
    State.LOADING: "starting",
    State.READY: "ready",
    State.EXECUTING: "busy",
    State.DRAINING: "draining",
    State.STOPPED: "failed",
}


@dataclass(slots=True, eq=False)
class _LiveJob:
    """A job between admission and its terminal event."""

    owner: str
    job: Job
    stream: JobStream


class Worker:
    """Owns the lifecycle, the resident model, the engine and the table of live jobs. Every method runs on the loop."""

    def __init__(self, config: WorkerConfig) -> None:
        """A worker that has not loaded anything; ``start`` loads."""
        self.config = config
        self.lifecycle = Lifecycle()
        self._model: ResidentModel | None = None
        self._handle: Handle | None = None
        self._engine: Engine | None = None
        self._live: dict[tuple[str, str], _LiveJob] = {}
        self._stream_of: dict[Job, tuple[tuple[str, str], JobStream]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
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
        self._model, self._engine = model, engine
        manifest, device = model.manifest, model.device
        self._digested_s = time.monotonic()
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
                seconds=self._digested_s - began,
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
            deliver=lambda batch: _on_loop(loop, self._deliver, batch),
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
        get_logger().info(
            EventCode.DRAIN, human=narration.drain(jobs=len(self._live), timeout_s=timeout_s), jobs=len(self._live)
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def stop(self) -> None:
        """Ends what still runs and gives the device back. The worker is STOPPED after this."""
        self.lifecycle.move(State.STOPPED)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, STOP_TIMEOUT_S)
            await asyncio.sleep(0)  # terminal events of the last jobs are delivered by now
        self._engine = self._model = None

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
            TIMEOUT.
        """
        received_s = time.monotonic()
        model, engine = self._serving()
        if params.handle_id is not None and (self._handle is None or params.handle_id != self._handle.handle_id):
            raise OrcdError(ErrorCode.NOT_FOUND, "no such handle is loaded here; Ready lists them", field="handle_id")
        key = (owner, params.job_id)
        self._refuse_duplicate_or_full(key)
        request = await self._request(model, params, received_s)
        self._serving()
        self._refuse_duplicate_or_full(key)  # others may have come while the prompt was tokenised
        if request.deadline_s is not None and time.monotonic() >= request.deadline_s:
            raise OrcdError(ErrorCode.TIMEOUT, "the deadline passed before the job could start", field="deadline_ms")
        job, stream = engine.submit(request), JobStream()
        self._live[key] = _LiveJob(owner, job, stream)
        self._stream_of[job] = (key, stream)
        self._busy()
        try:
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
            async for event in self._events(stream, vram_bytes=self._vram_bytes(model)):
                if isinstance(event, Ended | Failed):
                    self._forget(key, job)
                    self._log_end(params.job_id, event)
                yield event
        finally:
            if not stream.closed:
                gone = OrcdError(ErrorCode.CANCELLED, "the client went away")
                self._abort(key, job, stream, gone)
                self._log_end(params.job_id, Failed(gone))

    async def _events(self, stream: JobStream, vram_bytes: int) -> AsyncIterator[WorkerEvent]:
        """The stream's events, with Metrics in between."""
        tokens_out, first_s, due_s = 0, 0.0, time.monotonic() + METRICS_INTERVAL_S
        while True:
            event = await stream.next(timeout_s=max(0.0, due_s - time.monotonic()))
            now = time.monotonic()
            if isinstance(event, Tokens):
                first_s = first_s or now
                tokens_out += len(event.ids)
            if event is not None:
                yield event
                if isinstance(event, Ended | Failed):
                    return
            if now >= due_s and not stream.closed:
                due_s = now + METRICS_INTERVAL_S
                decode_time_ms = (now - first_s) * 1e3 if first_s else 0.0
                yield Metrics(tokens_out=tokens_out, decode_time_ms=decode_time_ms, vram_bytes=vram_bytes)

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
        """Ends a job of this owner. False for a job that is unknown, foreign or over; harmless when repeated."""
        live = self._live.get((owner, job_id))
        if live is None:
            return False
        error = OrcdError(ErrorCode.CANCELLED, "the job was cancelled")
        self._abort((owner, job_id), live.job, live.stream, error)
        return True

    def _abort(self, key: tuple[str, str], job: Job, stream: JobStream, error: OrcdError) -> None:
        """Ends a job from this side: its reader sees ``error`` next, the engine drops it at its next step."""
        stream.abort(Failed(error))
        if self._engine is not None:
            self._engine.cancel(job)
        self._forget(key, job)

    def _deliver(self, batch: list[Delivery]) -> None:
        for job, event in batch:
            entry = self._stream_of.get(job)
            if entry is not None:
                entry[1].put(event)

    def _forget(self, key: tuple[str, str], job: Job) -> None:
        self._stream_of.pop(job, None)
        if self._live.get(key) is not None and self._live[key].job is job:
            del self._live[key]
        if not self._live:
            self._idle.set()
            if self.lifecycle.state is State.EXECUTING:
                self.lifecycle.move(State.READY)

    def _busy(self) -> None:
        self._idle.clear()
        if self.lifecycle.state is State.READY:
            self.lifecycle.move(State.EXECUTING)

    def _serving(self) -> tuple[ResidentModel, Engine]:
        if not self.lifecycle.serving or self._model is None or self._engine is None:
            raise OrcdError(
                ErrorCode.NOT_READY,
                f"the worker is {self.lifecycle.state}; it takes jobs when READY",
                retry_after_ms=1000,
            )
        return self._model, self._engine

    def _refuse_duplicate_or_full(self, key: tuple[str, str]) -> None:
        if key in self._live:
            raise OrcdError(
                ErrorCode.INVALID_PARAMS, "a job with this job_id is running; choose another", field="job_id"
            )
        if len(self._live) >= self.config.slots_total:
            raise OrcdError(
                ErrorCode.BUSY,
                f"all {self.config.slots_total} slots are taken; retry later or use another worker",
                retry_after_ms=RETRY_AFTER_MS,
            )

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
            slots_used=len(self._live),
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
