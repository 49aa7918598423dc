"""A worker that does what a test tells it to, and a server over it on a real socket, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.engine.request import Ended, FinishReason, Tokens
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server import auth
from orcd_jax.server.auth import Access, Role
from orcd_jax.server.grpc_server import GuardedServer, start_server
from orcd_jax.worker.lifecycle import Lifecycle, State
from orcd_jax.worker.types import (
    AttestInfo,
    CommitEvent,
    CommitParams,
    EngineCapabilities,
    ExecuteParams,
    Handle,
    Metrics,
    PlanInfo,
    PlanParams,
    ReadyInfo,
    Started,
    StatusInfo,
    WorkerEvent,
)

TOKEN = "t" * 32
OTHER_TOKEN = "o" * 32
CONTROL_TOKEN = "c" * 32
WAIT_S = 10.0  # for what happens at once; only a failing test waits that long

Result = TypeVar("Result")

CONFIG = WorkerConfig(
    worker_id="w1",
    pool_id="p1",
    model_path=Path("/models/tiny"),
    rpc_port=50051,
    api_token_file=Path("/run/token"),
    standalone=True,
    platform="cpu",
    max_tokens=64,
    max_prompt_chars=100,
    drain_timeout_ms=20_000,
)
HANDLE = Handle(
    handle_id="h-1",
    shard_id="s-1",
    device_index=1,
    device_uuid="GPU-1",
    vram_bytes=2,
    sealed=True,
    sealed_at_ms=3,
    digest="d" * 64,
    model_ref="tiny",
    shard_index=4,
    total_shards=5,
    pinned=True,
    emulated=True,
)
CAPABILITIES = EngineCapabilities(
    worker_id="w1",
    architectures=("llama", "gpt"),
    positional=("rope_neox",),
    attention=("mha", "gqa"),
    quant=("q4_1",),
    max_context=6,
    vram_bytes=7,
    device="cpu",
)
STATUS = StatusInfo(
    worker_id="w1",
    pool_id="p1",
    version="1.2.3",
    status="busy",
    state="EXECUTING",
    resident=True,
    emulated=True,
    model_ref="tiny",
    digest="d" * 64,
    quant="q4_1",
    tokenizer="byte_level_bpe",
    vocab_size=1000,
    max_context=8,
    slots_total=9,
    slots_used=10,
    vram_used_bytes=11,
    vram_planned_bytes=12,
    uptime_ms=13,
    device="cpu",
    compute_capability="9.0",
    load_stage="compile",
    load_percent=14,
    cuda_version="",
    driver_version="",
    seal_age_ms=17,
    detection_bound_ms=18,
    metrics_port=19,
    audit_seq=20,
    audit_hash="a" * 64,
)
PLAN = PlanInfo(
    memory=None,
    reasons=(OrcdError(ErrorCode.NOT_FOUND, "there is no such model", field="model_ref"),),
    model=None,
    max_context=6,
    slots=9,
    device_index=1,
    device_uuid="GPU-1",
)
COMMITTED: tuple[CommitEvent, ...] = (Progress("digest", 1, 2), HANDLE)
STARTED = Started(job_id="job", model="tiny", started_at_ms=1_700_000_000_000, seed=2**64 - 1)
ENDED = Ended(
    finish_reason=FinishReason.STOP, tokens_in=3, tokens_out=4, decode_time_ms=5.5, time_to_first_token_ms=6.5
)
STORY: tuple[WorkerEvent, ...] = (
    STARTED,
    Tokens(0, (11, 12), "ab"),
    Metrics(tokens_out=2, decode_time_ms=1.5, vram_bytes=99),
    Tokens(2, (13, 14), "cd"),
    ENDED,
)

Script = Callable[[ExecuteParams], AsyncIterator[WorkerEvent]]


def play(*steps: WorkerEvent | Exception) -> Script:
    """A job that yields these events; an exception is raised when its turn comes."""

    async def script(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        del params
        for step in steps:
            if isinstance(step, Exception):
                raise step
            yield step

    return script


def hang_after(*events: WorkerEvent) -> Script:
    """A job that yields these events and then nothing, until it is closed."""

    async def script(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        async for event in play(*events)(params):
            yield event
        await asyncio.Event().wait()

    return script


def flood(text: str) -> Script:
    """A job that has always one more token."""

    async def script(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        del params
        yield STARTED
        index = 0
        while True:
            yield Tokens(index, (1,), text)
            index += 1
            await asyncio.sleep(0)

    return script


class FakeWorker:
    """Notes what it is asked, and answers from the constants above."""

    def __init__(self) -> None:
        self.config = CONFIG
        self.lifecycle = Lifecycle()
        self.script: Script = play(*STORY)
        self.planned: list[PlanParams] = []
        self.committed: list[CommitParams] = []
        self.attested: list[tuple[bytes, str]] = []
        self.executed: list[tuple[ExecuteParams, str]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.tokenized: list[tuple[str, bool]] = []
        self.detokenized: list[tuple[int, ...]] = []
        self.drained: list[float] = []
        self.drain_may_end = asyncio.Event()
        self.close_error: Exception | None = None
        self.question_error: Exception | None = None
        self.running = threading.Event()
        self.closed = threading.Event()

    async def plan(self, params: PlanParams) -> PlanInfo:
        self.planned.append(params)
        return PLAN

    async def commit(self, params: CommitParams) -> AsyncIterator[CommitEvent]:
        self.committed.append(params)
        for event in COMMITTED:
            yield event

    async def attest(self, nonce: bytes, handle_id: str) -> AttestInfo:
        self.attested.append((nonce, handle_id))
        return AttestInfo(
            worker_id="w1",
            pool_id="p1",
            handle=HANDLE,
            digest=HANDLE.digest,
            digest_began_at_ms=1,
            digest_ended_at_ms=2,
            nonce=nonce,
            executable_fingerprint="f" * 64,
            signature=b"s" * 64,
            public_key=b"k" * 32,
        )

    async def execute(self, params: ExecuteParams, owner: str) -> AsyncIterator[WorkerEvent]:
        self.executed.append((params, owner))
        self.running.set()
        try:
            async with aclosing(self.script(params)) as events:  # type: ignore[type-var]  # a generator
                async for event in events:
                    yield event
        finally:
            self.closed.set()
            if self.close_error is not None:
                raise self.close_error

    async def cancel(self, job_id: str, owner: str) -> bool:
        self.cancelled.append((job_id, owner))
        return any((params.job_id, of) == (job_id, owner) for params, of in self.executed)

    async def tokenize(self, text: str, add_special: bool) -> tuple[int, ...]:
        self.tokenized.append((text, add_special))
        return tuple(ord(character) for character in text)

    async def detokenize(self, ids: Sequence[int]) -> str:
        self.detokenized.append(tuple(ids))
        return "".join(chr(token_id) for token_id in ids)

    def ready(self) -> ReadyInfo:
        if self.question_error is not None:
            raise self.question_error
        return ReadyInfo(
            ready=True,
            state="EXECUTING",
            handles=(HANDLE,),
            capabilities=CAPABILITIES,
            last_digest_age_ms=15,
            identity_public_key=b"k" * 32,
        )

    def status(self) -> StatusInfo:
        return STATUS

    async def drain(self, timeout_s: float) -> None:
        self.drained.append(timeout_s)
        self.lifecycle.move(State.DRAINING)
        await self.drain_may_end.wait()

    @property
    def calls(self) -> int:
        """How often anything was asked of it that costs something."""
        models = len(self.planned) + len(self.committed) + len(self.attested)
        jobs = len(self.executed) + len(self.cancelled)
        return models + jobs + len(self.tokenized) + len(self.detokenized) + len(self.drained)


@dataclass(slots=True)
class Served:
    """A server under test.

    Attributes:
      shutdown: set by the RPC Shutdown.
    """

    port: int
    worker: FakeWorker
    server: GuardedServer
    loop: asyncio.AbstractEventLoop
    shutdown: threading.Event

    def on_loop(self, call: Callable[[], Result]) -> Result:
        """Runs ``call`` where the worker lives."""

        async def run() -> Result:
            return call()

        return self.wait(run())

    def wait(self, awaitable: Awaitable[Result]) -> Result:
        """Waits for something that the server's loop does."""

        async def run() -> Result:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(WAIT_S)

    def move(self, *states: State) -> None:
        """Moves the worker through ``states``."""
        for state in states:
            self.on_loop(lambda to=state: self.worker.lifecycle.move(to))  # type: ignore[misc]


def everybody() -> Access:
    """The tokens above, in their roles."""
    return Access({Role.EXECUTE: auth.Tokens([TOKEN, OTHER_TOKEN]), Role.CONTROL: auth.Tokens([CONTROL_TOKEN])})


@contextlib.contextmanager
def serving(
    *, with_shutdown: bool = True, access: Access | auth.Tokens | None = None, **options: Any
) -> Iterator[Served]:
    """A server over a fake worker, in a thread of its own, so that any client can be used, blocking ones too.

    Args:
      with_shutdown: whether the RPC Shutdown has somebody to ask.
      access: who has which role; without it the tokens above.
      options: of ``start_server``.
    """
    up, found = threading.Event(), list[Served]()
    stop = asyncio.Event()

    async def serve() -> None:
        worker, shutdown = FakeWorker(), threading.Event()
        server = await start_server(
            worker,
            host="127.0.0.1",
            port=0,
            tokens=access or everybody(),
            on_shutdown=shutdown.set if with_shutdown else None,
            **options,
        )
        found.append(Served(server.port, worker, server, asyncio.get_running_loop(), shutdown))
        up.set()
        await stop.wait()
        server.close()
        await server.wait_closed()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(WAIT_S)
    (served,) = found
    try:
        yield served
    finally:
        served.loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server did not close"
