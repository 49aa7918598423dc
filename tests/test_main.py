"""The worker's start: flags, environment, the order of things, and how each end is reported."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from orcd_jax import main
from orcd_jax.command_line import parse
from orcd_jax.config import ConfigError, WorkerConfig
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.worker import callback
from orcd_jax.worker.callback import Readiness

REQUIRED = (
    "--worker_id=w1",
    "--pool_id=p1",
    "--model_path=/models/tiny",
    "--rpc_port=50051",
    "--api_token_file=/run/token",
)
READINESS = Readiness(
    worker_id="w1", pool_id="p1", model_ref="m", digest="0" * 64, vram_bytes=0, emulated=True, uri="grpc://x"
)


def parsed(*given: str) -> WorkerConfig:
    config = parse(["orcd-worker", *REQUIRED, *given])
    assert config is not None
    return config


def test_every_problem_is_a_line_on_stderr_and_the_exit_code_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["orcd-worker", "--rpc_port=1"]) is ExitCode.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split(":")[1].strip() for line in shown.err.splitlines()] == [
        "--worker_id",
        "--pool_id",
        "--model_path",
        "--rpc_port",
        "--api_token_file",
        "--readiness_callback_url",
    ]


# -- root and environment ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4900")
def test_root_is_refused_unless_allowed() -> None:
    with pytest.raises(OrcdError, match="--allow_root") as caught:
        main.refuse_root(parsed("--standalone"), 0)
    assert caught.value.code is ErrorCode.POLICY_VIOLATION
    main.refuse_root(parsed("--standalone", "--allow_root"), 0)
    main.refuse_root(parsed("--standalone"), 1000)


def test_settings_of_jax_that_change_the_bits_are_dropped_from_the_environment() -> None:
    environment = {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "HOME": "/root"}
    main.set_environment(parsed("--standalone", "--platform=cpu"), environment)
    assert {name for name in environment if name.startswith("JAX_")} == {"JAX_PLATFORMS"}
    assert environment["HOME"] == "/root"


def test_the_platform_is_fixed_before_jax_whatever_the_environment_says() -> None:
    environment = {"JAX_PLATFORMS": "tpu"}
    main.set_environment(parsed("--standalone", "--platform=cpu"), environment)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_cuda_is_asked_for_alone_so_that_nothing_falls_back() -> None:
    environment: dict[str, str] = {}
    main.set_environment(parsed("--standalone"), environment)
    assert environment["JAX_PLATFORMS"] == "cuda"


@pytest.mark.requirement("WORKER-4020")
@pytest.mark.parametrize(
    ("outer", "index", "mask"),
    [(None, 0, "0"), (None, 3, "3"), ("2,5", 0, "2"), ("2,5", 1, "5"), ("GPU-abc, GPU-def", 1, "GPU-def")],
)
def test_the_mask_shows_one_gpu_counted_among_those_visible(outer: str | None, index: int, mask: str) -> None:
    environment = {} if outer is None else {"CUDA_VISIBLE_DEVICES": outer}
    main.set_environment(parsed("--standalone", f"--gpu_device={index}"), environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == mask


@pytest.mark.parametrize(("outer", "index"), [("", 0), ("-1", 0), ("2,5", 2)])
def test_a_gpu_beyond_the_mask_is_refused(outer: str, index: int) -> None:
    with pytest.raises(ConfigError, match=r"--gpu_device.*CUDA_VISIBLE_DEVICES"):
        main.set_environment(parsed("--standalone", f"--gpu_device={index}"), {"CUDA_VISIBLE_DEVICES": outer})


def test_compiled_code_is_kept_only_in_a_private_directory(tmp_path: Path) -> None:
    environment = {"JAX_COMPILATION_CACHE_DIR": "/tmp/anybody"}
    main.set_environment(parsed("--standalone", "--platform=cpu"), environment)
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
    cache = tmp_path / "compiled"
    main.set_environment(parsed("--standalone", "--platform=cpu", f"--compile_cache_dir={cache}"), environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o750)
    with pytest.raises(ConfigError, match=r"--compile_cache_dir: others can use it \(mode 0750\): run `chmod 700`"):
        main.set_environment(parsed("--standalone", "--platform=cpu", f"--compile_cache_dir={cache}"), environment)


def test_a_compile_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--compile_cache_dir: it cannot be made"):
        main.set_environment(parsed("--standalone", f"--compile_cache_dir={tmp_path}/file/cache"), {})


# -- the life of the process, with a worker and a server that only keep a record ---------------------------------------


class Record:
    """A worker and a server in one that note what was asked of them, in order."""

    def __init__(
        self,
        *,
        start_error: Exception | None = None,
        never_loads: bool = False,
        fails_with: OrcdError | None = None,
        in_order: bool = True,
    ) -> None:
        self._in_order = in_order
        self.calls: list[str] = []
        self.stopping = asyncio.Event()
        self._start_error, self._never_loads, self.fails_with = start_error, never_loads, fails_with
        self.failing = asyncio.Event()
        if fails_with is not None:
            self.failing.set()

    async def listen(self) -> Record:
        self.calls.append("listen")
        return self

    async def start(self) -> None:
        self.calls.append("start")
        if self._never_loads:
            self.stopping.set()
            await asyncio.Event().wait()
        if self._start_error is not None:
            raise self._start_error

    async def wait_failed(self) -> OrcdError:
        await self.failing.wait()
        assert self.fails_with is not None
        return self.fails_with

    async def drain(self, timeout_s: float) -> None:
        self.calls.append(f"drain {timeout_s:g}")

    async def stop(self) -> bool:
        self.calls.append("stop")
        return self._in_order

    def close(self) -> None:
        self.calls.append("close")

    async def wait_closed(self) -> None:
        self.calls.append("closed")

    def readiness(self) -> Readiness:
        self.calls.append("readiness")
        return READINESS


def life(config: WorkerConfig, record: Record, listen: Callable[[], Awaitable[Record]] | None = None) -> ExitCode:
    async def run() -> ExitCode:
        return await main.serve(
            config,
            worker=record,
            listen=listen or record.listen,
            readiness=record.readiness,
            callback_token="",
            stopping=record.stopping,
        )

    return asyncio.run(run())


@pytest.mark.requirement("WORKER-4970")
def test_the_order_of_a_whole_life() -> None:
    record = Record()
    start = record.start

    async def start_then_ask_to_stop() -> None:
        await start()
        asyncio.get_running_loop().call_later(0.01, record.stopping.set)

    record.start = start_then_ask_to_stop  # type: ignore[method-assign]
    assert life(parsed("--standalone", "--drain_timeout_ms=1500"), record) is ExitCode.OK
    assert record.calls == ["listen", "start", "drain 1.5", "stop", "close", "closed"]


def test_a_stop_while_loading_ends_at_once() -> None:
    record = Record(never_loads=True)
    assert life(parsed("--standalone"), record) is ExitCode.OK
    assert record.calls == ["listen", "start"]


def test_a_port_in_use_is_found_before_anything_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    record = Record()

    async def taken() -> Record:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    assert life(parsed("--standalone"), record, taken) is ExitCode.ADDRESS
    assert record.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OrcdError(ErrorCode.MODEL_LOAD_FAILED, "no manifest"), ExitCode.MODEL),
        (OrcdError(ErrorCode.CAPABILITY_MISMATCH, "needs yarn"), ExitCode.MODEL),
        (OrcdError(ErrorCode.SEAL_VERIFICATION_FAILED, "embed differs"), ExitCode.MODEL),
        (OrcdError(ErrorCode.MODEL_LOAD_FAILED, "no cuda device", field="platform"), ExitCode.NO_DEVICE),
        (OrcdError(ErrorCode.VRAM_OOM, "out of memory"), ExitCode.DEVICE),
        (OrcdError(ErrorCode.CUDA_ERROR, "the device failed"), ExitCode.DEVICE),
        (RuntimeError("a bug"), ExitCode.INTERNAL),
    ],
)
def test_a_model_that_does_not_load_ends_with_the_code_of_its_reason(error: Exception, code: ExitCode) -> None:
    assert life(parsed("--standalone"), Record(start_error=error)) is code


@pytest.mark.requirement("WORKER-4032")
def test_a_device_that_fails_while_serving_ends_the_process_with_its_code() -> None:
    record = Record(fails_with=OrcdError(ErrorCode.CUDA_ERROR, "the device failed"))
    assert life(parsed("--standalone"), record) is ExitCode.DEVICE


@pytest.mark.requirement("WORKER-4032")
def test_a_device_that_fails_while_draining_is_no_clean_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()

    async def fail_in_drain(timeout_s: float) -> None:
        record.failing.set()
        await asyncio.Event().wait()

    async def loaded() -> None:
        record.stopping.set()

    record.start, record.drain = loaded, fail_in_drain  # type: ignore[method-assign]
    record.fails_with = OrcdError(ErrorCode.CUDA_ERROR, "the device failed")
    assert life(parsed("--standalone"), record) is ExitCode.DEVICE
    assert record.calls == ["listen", "stop", "close", "closed"]


@pytest.mark.requirement("WORKER-4970")
def test_a_device_that_does_not_answer_is_no_clean_stop() -> None:
    record = Record(in_order=False)

    async def loaded() -> None:
        record.stopping.set()

    record.start = loaded  # type: ignore[method-assign]
    assert life(parsed("--standalone"), record) is ExitCode.DEVICE


class PoolManager:
    """Stands in for delivery over the network: notes what would be sent, or refuses it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, record: Record, *, reachable: bool = True) -> None:
        self.sent: list[dict[str, object]] = []

        async def deliver(url: str, message: Readiness | callback.Failure, **_: object) -> int:
            if not reachable:
                raise callback.CallbackUndelivered(ErrorCode.TIMEOUT, "nobody answers")
            self.sent.append(json.loads(message.body()))
            record.calls.append("told")
            record.stopping.set()
            return 1

        monkeypatch.setattr(main, "deliver", deliver)


@pytest.mark.requirement("WORKER-4023")
def test_the_pool_manager_is_told_after_the_server_listens_and_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Record()
    PoolManager(monkeypatch, record)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.OK
    assert record.calls[:4] == ["listen", "start", "readiness", "told"]


@pytest.mark.requirement("WORKER-4023")
def test_a_worker_nobody_accounts_for_drains_and_exits_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()
    PoolManager(monkeypatch, record, reachable=False)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.CALLBACK
    assert record.calls == ["listen", "start", "readiness", "drain 30", "stop", "close", "closed"]


@pytest.mark.requirement("WORKER-4023")
def test_the_pool_manager_is_told_of_a_failure_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(start_error=OrcdError(ErrorCode.MODEL_LOAD_FAILED, "no manifest"))
    pool = PoolManager(monkeypatch, record)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.MODEL
    assert [(sent["status"], sent["code"]) for sent in pool.sent] == [("failed", "MODEL_LOAD_FAILED")]


def test_an_unexpected_error_is_told_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(start_error=RuntimeError("pointer 0x7f00"))
    pool = PoolManager(monkeypatch, record)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.INTERNAL
    assert "0x7f00" not in json.dumps(pool.sent)


# -- the real command --------------------------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("t" * 40)
    return path


def start(tmp_path: Path, token: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, in a process of its own."""
    command = [sys.executable, "-c", "from orcd_jax.main import run; run()", "--worker_id=w", "--pool_id=p"]
    command += [f"--api_token_file={token}", f"--model_path={tmp_path / 'model'}", "--standalone", *given]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def errors_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    return [line for line in lines if line["event"] == "error"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_gpu_is_one_error_that_names_the_way_out(tmp_path: Path, token_file: Path) -> None:
    done = start(tmp_path, token_file, "--allow_root", f"--rpc_port={free_port()}")
    assert done.returncode == ExitCode.NO_DEVICE
    (error,) = errors_of(done)
    assert "--platform=cpu" in str(error["human"])


def test_a_model_that_is_not_there_is_one_error(tmp_path: Path, token_file: Path) -> None:
    done = start(tmp_path, token_file, "--allow_root", "--platform=cpu", f"--rpc_port={free_port()}")
    assert done.returncode == ExitCode.MODEL
    assert len(errors_of(done)) == 1


def test_a_port_in_use_is_one_error(tmp_path: Path, token_file: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = start(tmp_path, token_file, "--allow_root", "--platform=cpu", f"--rpc_port={port}")
    assert done.returncode == ExitCode.ADDRESS
    (error,) = errors_of(done)
    assert str(port) in str(error["human"])


@pytest.mark.requirement("WORKER-4910")
def test_a_token_file_that_others_can_read_is_one_error(tmp_path: Path, token_file: Path) -> None:
    token_file.chmod(0o644)
    done = start(tmp_path, token_file, "--allow_root", "--platform=cpu", f"--rpc_port={free_port()}")
    assert done.returncode == ExitCode.USAGE
    (error,) = errors_of(done)
    assert "600" in str(error["human"])


SIGNALS = """
import asyncio
from orcd_jax.main import _stop_signal

async def run():
    stopping = _stop_signal(asyncio.get_running_loop())
    print("up", flush=True)
    await stopping.wait()
    print("asked", flush=True)
    await asyncio.Event().wait()

asyncio.run(run())
"""
# The RPC Shutdown asks by the same event; it is no signal.
ASKED_BY_CALL = SIGNALS.replace('print("up", flush=True)', "stopping.set()")


@pytest.mark.requirement("WORKER-4970")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_aborts(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SIGNALS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == ExitCode.INTERRUPTED


@pytest.mark.requirement("WORKER-4970")
def test_the_first_signal_after_a_shutdown_call_does_not_abort() -> None:
    with subprocess.Popen([sys.executable, "-c", ASKED_BY_CALL], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == ExitCode.INTERRUPTED


def test_an_interrupt_that_the_parent_ignores_is_not_taken() -> None:
    script = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SIGNALS}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        assert process.poll() is None
        process.kill()
