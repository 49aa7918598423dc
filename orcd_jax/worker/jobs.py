"""Jobs of a worker that serves: from a caller's parameters to the engine, and its events back. Lives on the loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable

from orcd_jax.config import WorkerConfig
from orcd_jax.engine.engine import Delivery
from orcd_jax.engine.request import Ended, Failed, JobRequest, SamplingParams, Tokens
from orcd_jax.engine.stream import JobStream
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.audit import AuditEvent
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.telemetry.trace import JobSpan
from orcd_jax.worker.live_jobs import LiveJob, LiveJobs
from orcd_jax.worker.loader import ResidentModel, SealedModel
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import ChatPrompt, ExecuteParams, Metrics, Started, WorkerEvent

METRICS_INTERVAL_S = 0.5  # WORKER-4240: every 250 to 1000 ms


class Jobs:
    """Owns the table of live jobs and what happens to each."""

    def __init__(
        self,
        config: WorkerConfig,
        services: Services,
        *,
        serving: Callable[[], SealedModel],
        on_change: Callable[[], None],
    ) -> None:
        """No jobs yet.

        Args:
          config: holds the limits.
          services: the metrics that count, the audit and the traces that tell.
          serving: the model that jobs run on; raises NOT_READY while there is none.
          on_change: called when slots are taken or freed.
        """
        self._config, self._services, self._serving = config, services, serving
        self._metrics = services.metrics
        self.live = LiveJobs(config.slots_total, on_change)

    def deliver(self, batch: list[Delivery]) -> None:
        """Takes the engine's events of one step. When the seal is broken, nothing unread is delivered any more."""
        broken = next((e for _, e in batch if isinstance(e, Failed) and e.error.code in _BROKEN), None)
        if broken is not None:
            self.abort(broken.error)
        else:
            self.live.deliver(batch)

    def abort(self, error: OrcdError) -> None:
        """Ends every job now; its reader sees the error next, whatever is unread."""
        for live in self.live:
            live.stream.abort(Failed(error))

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
        try:
            live, sealed = self._admit(params, owner)
        except OrcdError as error:
            self._metrics.job_failed(error.code)
            raise
        ended: Ended | Failed | None = None
        span = JobSpan()
        try:
            request = await self._request(sealed.resident, params, received_s)
            if live.stream.closed and isinstance(early := await live.stream.next(), Failed):
                raise early.error
            self._serving()  # it may have changed while the prompt was tokenised
            if request.deadline_s is not None and time.monotonic() >= request.deadline_s:
                raise OrcdError(
                    ErrorCode.TIMEOUT, "the deadline passed before the job could start", field="deadline_ms"
                )
            span = self._span(params, sealed)
            self.live.attach(live, sealed.engine, sealed.engine.submit(request))
            self._metrics.job_started(len(request.prompt_ids))
            get_logger().info(
                EventCode.EXECUTE_START,
                human=narration.execute_start(job_id=params.job_id, tokens_in=len(request.prompt_ids)),
                job_id=params.job_id,
                tokens_in=len(request.prompt_ids),
            )
            yield Started(
                job_id=params.job_id,
                model=sealed.handle.model_ref,
                started_at_ms=time.time_ns() // 1_000_000,
                seed=request.sampling.seed,
            )
            async for event in self._events(live.stream, received_s, sealed.resident.vram_bytes):
                if isinstance(event, Ended | Failed):
                    self.live.release(live)
                    ended = event
                    self._end(params.job_id, event, received_s, span)
                yield event
        except OrcdError as error:
            if ended is None:
                self._metrics.job_failed(error.code)
            raise
        finally:
            gone = Failed(OrcdError(ErrorCode.CANCELLED, "its call was closed"))
            if live.job is not None and live.stream.abort(gone):
                live.cancel()
                self._end(params.job_id, gone, received_s, span)
            self.live.leave(live)

    def _span(self, params: ExecuteParams, sealed: SealedModel) -> JobSpan:
        """The job's span; and the audit hears how old the proof is that it begins on."""
        age_ms = round(sealed.guard.age_s() * 1e3)
        self._services.audit.record(AuditEvent.DIGEST_AGE_CHECKED, handle_id=sealed.handle.handle_id, age_ms=age_ms)
        return self._services.tracing.job(
            operation="chat" if isinstance(params.prompt, ChatPrompt) else "text_completion",
            job_id=params.job_id,
            model=sealed.handle.model_ref,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            traceparent=params.traceparent,
        )

    def _admit(self, params: ExecuteParams, owner: str) -> tuple[LiveJob, SealedModel]:
        sealed = self._serving()
        if params.handle_id is not None and params.handle_id != sealed.handle.handle_id:
            raise OrcdError(ErrorCode.NOT_FOUND, "no such handle is loaded here; Ready lists them", field="handle_id")
        return self.live.admit(owner, params.job_id), sealed

    async def _events(self, stream: JobStream, received_s: float, vram_bytes: int) -> AsyncIterator[WorkerEvent]:
        """The stream's events, with Metrics in between."""
        tokens_out, first_s, last_s, due_s = 0, 0.0, 0.0, time.monotonic() + METRICS_INTERVAL_S
        while True:
            event = await stream.next(timeout_s=max(0.0, due_s - time.monotonic()))
            now = time.monotonic()
            if isinstance(event, Tokens):
                if tokens_out:
                    self._metrics.tokens(len(event.ids), now - last_s)
                else:
                    self._metrics.first_tokens(len(event.ids), now - received_s)
                    first_s = now
                last_s = now
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
            prompt_ids = await asyncio.to_thread(_tokenize_prompt, model, params.prompt)
        most_ms = self._config.execution_timeout_ms
        timeout_ms = min(params.timeout_ms or most_ms, most_ms)
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

    async def cancel(self, job_id: str, owner: str) -> bool:
        """Ends a job of this owner: its reader sees CANCELLED next. False when it is unknown, foreign or over."""
        live = self.live.find(owner, job_id)
        cancelled = Failed(OrcdError(ErrorCode.CANCELLED, "the job was cancelled"))
        if live is None or not live.stream.abort(cancelled):
            return False
        live.cancel()
        self.live.release(live)
        return True

    def _end(self, job_id: str, event: Ended | Failed, received_s: float, span: JobSpan) -> None:
        """Tells the log, the metrics and the trace how a job ended."""
        if isinstance(event, Ended):
            span.ended(tokens_in=event.tokens_in, tokens_out=event.tokens_out, finish_reason=event.finish_reason.value)
            duration_s = time.monotonic() - received_s
            self._metrics.job_succeeded(duration_s=duration_s, finish_reason=event.finish_reason.value)
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
            span.failed(event.error.code)
            self._metrics.job_failed(event.error.code)
            get_logger().info(
                EventCode.EXECUTE_END,
                human=narration.job_failed(job_id=job_id, message=event.error.message),
                job_id=job_id,
                code=event.error.code.value,
            )


_BROKEN = frozenset({ErrorCode.SEAL_VERIFICATION_FAILED, ErrorCode.POLICY_VIOLATION})


def _tokenize_prompt(model: ResidentModel, prompt: str | ChatPrompt) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt, add_special=True)
    if model.chat_template is None:
        raise OrcdError(ErrorCode.INVALID_PARAMS, "this model has no chat template; send a plain prompt", field="chat")
    rendered = model.chat_template.render(prompt.messages, add_generation_prompt=prompt.add_generation_prompt)
    # The template writes the model's special tokens itself.
    return model.tokenizer.encode(rendered, add_special=False)
