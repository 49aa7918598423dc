"""Puts the worker together: keys, audit, metrics, listeners. After the environment is set; what it uses imports JAX."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from orcd_jax import __version__
from orcd_jax.checkpoint.signature import load_public_keys, read_signature
from orcd_jax.config import WorkerConfig
from orcd_jax.device.gpu_health import GpuHealth, GpuHealthSampler, GpuProbe
from orcd_jax.device.privileges import Stage, lock_down
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.residency.keys import IdentityKey, SealKey
from orcd_jax.server.admission import AuthOutcome, AuthResult
from orcd_jax.server.auth import Access
from orcd_jax.server.credentials import Credentials, TlsFiles
from orcd_jax.server.grpc_server import GuardedServer, start_server
from orcd_jax.server.http_status import HealthSnapshot, HttpStatus, start_http_status
from orcd_jax.server.limits import Limits
from orcd_jax.server.status import report_unexpected
from orcd_jax.serving import serve
from orcd_jax.telemetry import log, narration
from orcd_jax.telemetry.audit import AuditEvent, AuditLog
from orcd_jax.telemetry.metrics import WorkerMetrics
from orcd_jax.telemetry.trace import open_tracing
from orcd_jax.worker import reports
from orcd_jax.worker.callback import Readiness
from orcd_jax.worker.pool_manager import URGENT_S, PoolManager
from orcd_jax.worker.restart_ledger import RestartLedger
from orcd_jax.worker.services import Services
from orcd_jax.worker.state_directory import StateDirectory
from orcd_jax.worker.watchdog import Watchdog
from orcd_jax.worker.worker import Worker

LEAST_STREAMS = 256
_EXIT_SLACK_S = 30.0  # beyond the drain: last words, callbacks, the device's own clean-up


async def run_worker(
    config: WorkerConfig, state: StateDirectory, watchdog: Watchdog, ledger: RestartLedger
) -> ExitCode:
    """Makes everything, serves until the end, and closes what it made in the opposite order."""
    hangup = _hangup_signal(asyncio.get_running_loop())  # before the files are read: none that comes later is missed
    pool_manager = PoolManager(config)
    pool_manager.read_token()
    stopping = _stop_signal(
        asyncio.get_running_loop(),
        on_first=lambda: watchdog.exiting(_exit_deadline_s(config)),
        on_second=lambda: ledger.end(ExitCode.INTERRUPTED),
    )
    with ExitStack() as opened:
        access = Access.from_files(config.api_token_file, config.control_token_file)
        services = opened.enter_context(_services(config, state, stopping))
        credentials = Credentials(access, _tls_files(config), services.audit)
        worker = Worker(config, services)
        services.metrics.set_gauges(lambda: reports.snapshot(worker))
        beside = [asyncio.create_task(_settle(worker)), asyncio.create_task(_read_again(hangup, credentials))]
        code = await serve(
            config,
            worker=worker,
            listen=lambda: _listen(config, worker, credentials, stopping.set),
            readiness=lambda: _readiness(config, worker),
            pool_manager=pool_manager,
            stopping=stopping,
            beat=watchdog.beat,
        )
        for task in beside:
            task.cancel()
        watchdog.exiting(_EXIT_SLACK_S)
        if code is ExitCode.OK and services.audit_failed:
            code = ExitCode.AUDIT
            error = OrcdError(ErrorCode.POLICY_VIOLATION, "the audit log cannot be written, and the policy is to stop")
            await pool_manager.tell_failure(error, code, deadline_s=URGENT_S)
        services.audit.record(AuditEvent.WORKER_STOPPED, exit_code=int(code))
    return code


async def _settle(worker: Worker) -> None:
    """Once the device works for us, nobody else may look into this process (WORKER-4902)."""
    await worker.wait_ready()
    try:
        restricted = lock_down(Stage.DEVICE_READY)
    except OrcdError as error:
        worker.fail(error)
        return
    log.get_logger().info(log.EventCode.STARTUP, human=f"This process is locked down: {restricted}.")


def _exit_deadline_s(config: WorkerConfig) -> float:
    return config.drain_timeout_ms / 1000 + _EXIT_SLACK_S


@contextmanager
def _services(config: WorkerConfig, state: StateDirectory, stopping: asyncio.Event) -> Iterator[Services]:
    """Opens what the worker works with; closes it at the end, the audit last."""
    loop = asyncio.get_running_loop()
    services = Services(
        metrics=WorkerMetrics(config.platform),
        identity=IdentityKey.load_or_create(config.identity_key_file or state.identity),
        seal_key=SealKey() if config.seal_key_file is None else SealKey.load(config.seal_key_file),
        trusted_keys=() if config.trusted_keys_file is None else load_public_keys(config.trusted_keys_file),
        signature=b"" if config.signature_file is None else read_signature(config.signature_file),
        plans_directory=state.plans,
    )

    def on_audit_failure(reason: str) -> None:
        services.audit_failed = True
        del reason  # the log has said it
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stopping.set)

    services.audit = AuditLog(
        state.audit,
        worker_id=config.worker_id,
        fsync=config.audit_fsync,
        failure_policy=config.audit_on_failure,
        on_failure=on_audit_failure,
    )
    with contextlib.closing(services.audit), ExitStack() as stack:
        services.tracing = open_tracing(config.otlp_endpoint, worker_id=config.worker_id, pool_id=config.pool_id)
        stack.callback(services.tracing.close)
        services.audit.record(AuditEvent.WORKER_STARTED, version=__version__, platform=config.platform, pid=os.getpid())
        if config.platform == "cuda":
            services.gpu_health = stack.enter_context(_gpu_health())
        yield services


@contextmanager
def _gpu_health() -> Iterator[Callable[[], GpuHealth]]:
    """The driver's view of the GPU, read every few seconds."""
    order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    probe = GpuProbe(os.environ["CUDA_VISIBLE_DEVICES"], device_order=order)
    sampler = GpuHealthSampler(probe.read)
    sampler.start()
    try:
        yield sampler.latest
    finally:
        if sampler.close():
            probe.close()


class _Listeners:
    """The gRPC server and the listener for metrics and health, as one."""

    def __init__(self, server: GuardedServer, status: HttpStatus | None) -> None:
        self._server, self._status = server, status

    async def drain(self, timeout_s: float) -> None:
        """Takes no more calls; the metrics stay to the end."""
        await self._server.drain(timeout_s)

    def close(self) -> None:
        """Ends both."""
        self._server.close()
        if self._status is not None:
            self._status.close()

    async def wait_closed(self) -> None:
        """Returns when the last connection ended."""
        await self._server.wait_closed()
        if self._status is not None:
            await self._status.wait_closed()


def _tls_files(config: WorkerConfig) -> TlsFiles | None:
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    return config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file


async def _listen(
    config: WorkerConfig, worker: Worker, credentials: Credentials, on_shutdown: Callable[[], None]
) -> _Listeners:
    """Starts the listeners. Raises OSError when an address cannot be bound."""
    metrics = worker.services.metrics
    server = await start_server(
        worker,
        host=config.bind_address,
        port=config.rpc_port,
        tokens=credentials.access,
        on_shutdown=on_shutdown,
        tls=credentials.tls,
        on_auth=lambda outcome: _on_auth(worker.services, outcome),
        on_refused=lambda refusal: metrics.connection_refused(refusal.value),
        open_ready=config.open_ready,
        limits=Limits(
            connections_per_peer=config.connections_per_peer, streams=max(LEAST_STREAMS, 2 * config.slots_total)
        ),
    )
    credentials.keep(server)
    if config.metrics_port < 0:
        return _Listeners(server, None)
    try:
        status = await start_http_status(metrics, lambda: _health(worker), port=config.metrics_port)
    except OSError:
        server.close()
        raise
    worker.services.metrics_port = status.port
    human = f"Metrics and health are at http://127.0.0.1:{status.port}/metrics, /livez, /readyz and /healthz."
    log.get_logger().info(log.EventCode.METRICS, human=human, port=status.port)
    return _Listeners(server, status)


def _health(worker: Worker) -> HealthSnapshot:
    sealed = worker.sealed
    return HealthSnapshot(
        state=worker.lifecycle.state.value,
        ready=worker.lifecycle.serving,
        model="" if sealed is None else sealed.handle.model_ref,
        seal_age_s=None if sealed is None else sealed.guard.age_s(),
    )


# Of those that are refused unseen one stands for many: they are as many as a stranger likes.
_AUTH_EVENTS = {AuthResult.OK: AuditEvent.AUTH_SUCCEEDED, AuthResult.LIMITED: AuditEvent.AUTH_LIMITED}


def _on_auth(services: Services, outcome: AuthOutcome) -> None:
    """Counts and audits an authentication."""
    if outcome.result is not AuthResult.OK:
        services.metrics.auth_failed()
    services.audit.record(
        _AUTH_EVENTS.get(outcome.result, AuditEvent.AUTH_FAILED),
        method=outcome.method,
        peer=outcome.peer,
        token_fingerprint=outcome.fingerprint or None,
        correlation_id=outcome.correlation_id,
        reason=None if outcome.result is AuthResult.OK else outcome.result.value,
    )


def _hangup_signal(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that each SIGHUP sets."""
    asked = asyncio.Event()
    # Ignored by the parent (nohup), it is not ours to take.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, asked.set)
    return asked


async def _read_again(hangup: asyncio.Event, credentials: Credentials) -> None:
    """Reads the credentials again whenever it is asked for; once for all that was asked meanwhile."""
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await credentials.reload()
        except Exception as error:  # the next time may be better
            report_unexpected(error)


def _readiness(config: WorkerConfig, worker: Worker) -> Readiness:
    """What the pool manager is told of a worker that is ready."""
    info = worker.ready()
    (handle,) = info.handles
    scheme = "grpc" if config.tls_cert_file is None else "grpcs"
    return Readiness(
        worker_id=config.worker_id,
        pool_id=config.pool_id,
        model_ref=handle.model_ref,
        handle_id=handle.handle_id,
        digest=handle.digest,
        pinned=handle.pinned,
        vram_bytes=handle.vram_bytes,
        emulated=handle.emulated,
        uri=f"{scheme}://{config.address}",
        metrics_port=worker.services.metrics_port,
        identity_public_key=info.identity_public_key.hex(),
        capabilities=asdict(info.capabilities),
    )


def _stop_signal(
    loop: asyncio.AbstractEventLoop,
    on_first: Callable[[], None] = lambda: None,
    on_second: Callable[[], None] = lambda: None,
) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets. The second ends the process at once (WORKER-4970)."""
    asked, signals = asyncio.Event(), itertools.count()

    def on_signal() -> None:
        if next(signals):  # not whether it was asked: the RPC Shutdown asks too
            human = narration.shutdown(exit_code=ExitCode.INTERRUPTED)
            log.get_logger().warning(log.EventCode.SHUTDOWN, human=human, exit_code=int(ExitCode.INTERRUPTED))
            on_second()
            os._exit(ExitCode.INTERRUPTED)
        on_first()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        # One that the parent ignores (a shell's background job, nohup) is not ours to take.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal)
    return asked
