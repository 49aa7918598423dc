"""The worker's gRPC methods: translate, delegate, translate back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, Protocol, cast

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from orcd_jax.api.orcd.worker import v1
from orcd_jax.config import WorkerConfig
from orcd_jax.engine.request import Ended, Failed
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server import translate, validation
from orcd_jax.server.call import permitted
from orcd_jax.server.gate import current_call, internal_error, report_unexpected
from orcd_jax.server.status import error_detail
from orcd_jax.worker.lifecycle import Lifecycle, State
from orcd_jax.worker.types import (
    AttestInfo,
    CommitEvent,
    CommitParams,
    ExecuteParams,
    PlanInfo,
    PlanParams,
    ReadyInfo,
    Started,
    StatusInfo,
    WorkerEvent,
)


class ServedWorker(Protocol):
    """What is served; ``worker.worker.Worker`` is one."""

    config: WorkerConfig
    lifecycle: Lifecycle

    async def plan(self, params: PlanParams) -> PlanInfo:
        """Whether a model would load here."""
        ...

    def commit(self, params: CommitParams) -> AsyncIterator[CommitEvent]:
        """Loads a model and seals it: progress, then the handle. Raises OrcdError."""
        ...

    async def attest(self, nonce: bytes, handle_id: str) -> AttestInfo:
        """Proves the weights anew and signs it."""
        ...

    def execute(self, params: ExecuteParams, owner: str) -> AsyncIterator[WorkerEvent]:
        """Runs one job; closing the generator cancels it. Raises OrcdError before the first event when refused."""
        ...

    async def cancel(self, job_id: str, owner: str) -> bool:
        """Ends a job of this owner; False when there is none."""
        ...

    async def tokenize(self, text: str, add_special: bool) -> tuple[int, ...]:
        """Token ids of a text."""
        ...

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...

    def ready(self) -> ReadyInfo:
        """Whether jobs are taken, and on what."""
        ...

    def status(self) -> StatusInfo:
        """Everything worth knowing at a glance."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Refuses new jobs; returns when the running ones ended, at the latest after ``timeout_s``."""
        ...


class WorkerService(v1.WorkerBase):
    """orcd.worker.v1.Worker over one worker."""

    def __init__(self, worker: ServedWorker, on_shutdown: Callable[[], None] | None = None) -> None:
        """Serves ``worker``; ``on_shutdown`` asks the process to end in good order."""
        self._worker = worker
        self._on_shutdown = on_shutdown

    async def _call_rpc_handler_server_stream(self, handler: Callable[..., Any], stream: Any, request: Any) -> None:
        """Sends what a streaming method yields. Closes it at once when the client is gone, not when it is collected."""
        async with aclosing(handler(request)) as responses:
            async for response in responses:
                await stream.send_message(response)

    async def plan(self, message: v1.PlanRequest) -> v1.PlanResponse:
        """Whether a model would load here, what it would take, and every reason why not."""
        return translate.plan_response(await self._worker.plan(translate.plan_params(message)))

    async def commit(self, message: v1.CommitRequest) -> AsyncIterator[v1.CommitEvent]:
        """Loads a model and seals it. A failure is an event, and the status."""
        load = cast("AsyncGenerator[CommitEvent, None]", self._worker.commit(translate.commit_params(message)))
        async with aclosing(permitted(load)) as events:
            try:
                async for event in events:
                    yield translate.commit_event(event)
            except Exception as error:
                if not isinstance(error, OrcdError):
                    report_unexpected(error)
                    error = internal_error()
                yield v1.CommitEvent(error=error_detail(error))
                raise error from None

    async def ready(self, message: v1.ReadyRequest) -> v1.ReadyResponse:
        """Whether jobs are taken, on what, and what could run here."""
        return translate.ready_response(self._worker.ready())

    async def execute(self, message: v1.ExecuteRequest) -> AsyncIterator[v1.ExecuteEvent]:
        """Runs one job. A failure after the first event is an event and the status."""
        call = current_call()
        params = translate.execute_params(message, self._worker.config, call.remaining_ms(), call.traceparent)
        seed: int | None = None
        job = cast("AsyncGenerator[WorkerEvent, None]", self._worker.execute(params, call.owner(params.tenant)))
        async with aclosing(permitted(job)) as events:
            try:
                async for event in events:
                    if isinstance(event, Started):
                        seed = event.seed
                    if isinstance(event, Failed):
                        raise event.error
                    yield translate.execute_event(event, seed or 0)
                    if isinstance(event, Ended):
                        return
                raise RuntimeError("a job without an end")  # exactly one of end and error, whatever the worker does
            except Exception as error:
                if not isinstance(error, OrcdError):
                    report_unexpected(error)
                    error = internal_error()
                if seed is not None:
                    yield translate.execute_event(Failed(error), seed)
                raise error from None

    async def cancel(self, message: v1.CancelRequest) -> v1.CancelResponse:
        """Ends a job of the caller; the answer never tells whether there was one."""
        job_id = validation.identifier("job_id", message.job_id)
        tenant = validation.optional_identifier("tenant", message.tenant)
        await self._worker.cancel(job_id, current_call().owner(tenant))
        return v1.CancelResponse()

    async def attest(self, message: v1.AttestRequest) -> v1.AttestResponse:
        """Proves the weights anew and signs it together with the caller's nonce."""
        nonce = validation.nonce("nonce", message.nonce)
        handle_id = validation.optional_identifier("handle_id", message.handle_id)
        return translate.attest_response(await self._worker.attest(nonce, handle_id))

    async def get_receipt(self, message: v1.GetReceiptRequest) -> v1.GetReceiptResponse:
        """Not there yet."""
        _later("GetReceipt", "no job has a receipt")

    async def tokenize(self, message: v1.TokenizeRequest) -> v1.TokenizeResponse:
        """Token ids of a text."""
        text = validation.text("text", message.text, least=0, most=self._worker.config.max_prompt_chars)
        ids = await self._worker.tokenize(text, message.add_special is not False)
        return v1.TokenizeResponse(token_ids=list(ids))

    async def detokenize(self, message: v1.DetokenizeRequest) -> v1.DetokenizeResponse:
        """Text of token ids."""
        ids = validation.token_ids(
            "token_ids",
            message.token_ids,
            most=validation.MAX_DETOKENIZE_IDS,
            vocab_size=self._worker.status().vocab_size,
        )
        return v1.DetokenizeResponse(text=await self._worker.detokenize(ids))

    async def get_status(self, message: v1.GetStatusRequest) -> v1.GetStatusResponse:
        """Everything worth knowing at a glance."""
        return translate.status_response(self._worker.status())

    async def drain(self, message: v1.DrainRequest) -> v1.DrainResponse:
        """Refuses new jobs and waits for the running ones."""
        worker, most_ms = self._worker, self._worker.config.drain_timeout_ms
        if not worker.lifecycle.serving and worker.lifecycle.state is not State.DRAINING:
            raise OrcdError(ErrorCode.NOT_READY, f"the worker is {worker.lifecycle.state}; there is nothing to drain")
        timeout_ms = most_ms if message.timeout_ms is None else min(message.timeout_ms, most_ms)
        await worker.drain(timeout_ms / 1e3)
        return v1.DrainResponse(jobs_left=worker.status().slots_used)

    async def shutdown(self, message: v1.ShutdownRequest) -> v1.ShutdownResponse:
        """Asks the process to end in good order."""
        if self._on_shutdown is None:
            _later("Shutdown", "send the process SIGTERM")
        self._on_shutdown()
        return v1.ShutdownResponse()


def _later(method: str, instead: str) -> NoReturn:
    raise GRPCError(Status.UNIMPLEMENTED, f"{method} is not implemented in this version: {instead}")
