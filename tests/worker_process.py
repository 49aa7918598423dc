"""``orcd-worker`` as a process of its own, and the official gRPC client connected to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PLATFORM
from tests.server.peer import Peer, bearer

ROOT = Path(__file__).parent.parent
TOKEN = "0123456789abcdef" * 4
CONTROL_TOKEN = "fedcba9876543210" * 4
WAIT_S = 120

# A prelude: each step takes 10 ms at least, so that a job lasts for as long as a test looks at it.
SLOW = """
import time
import orcd_jax.main as main
start = main.Watchdog.start
def then_slow_down(**given):
    watchdog = start(**given)
    from orcd_jax.engine.engine import Engine  # which imports JAX: its environment is set by now
    dispatch = Engine._dispatch
    def slowly(engine, step):
        time.sleep(0.01)
        return dispatch(engine, step)
    Engine._dispatch = slowly
    return watchdog
main.Watchdog.start = then_slow_down
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Worker:
    """``orcd-worker`` on the tiny model, as a process; its log is read line by line.

    Standalone, unless a flag says whom it tells. ``prelude`` is run before anything of the worker is imported.
    """

    def __init__(self, checkpoint: Path, folder: Path, *flags: str, prelude: str = "") -> None:
        self.port, self.state = free_port(), folder / "state"
        self.token_file, self.control_token_file = folder / "token", folder / "control_token"
        for path, token in ((self.token_file, TOKEN), (self.control_token_file, CONTROL_TOKEN)):
            path.touch(mode=0o600)
            path.write_text(token)
        command = [sys.executable, "-c", f"{prelude}\nfrom orcd_jax.main import run; run()"]
        command += [] if any(flag.startswith("--readiness_callback_url") for flag in flags) else ["--standalone"]
        command += [
            f"--platform={PLATFORM}",
            "--worker_id=w",
            "--pool_id=p",
            f"--model_path={checkpoint}",
            f"--rpc_port={self.port}",
        ]
        command += [f"--api_token_file={self.token_file}", f"--control_token_file={self.control_token_file}"]
        command += [f"--state_dir={self.state}", "--allow_root", *flags]
        command += ["--allow_shared_gpu"] if PLATFORM == "cuda" else []  # the test's own process may hold a context
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        self.peer = Peer(self.port)
        self.lines: list[str] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        """Reads the log up to the first line of this event."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            fields: dict[str, Any] = json.loads(line)
            if fields["event"] == event:
                return fields
        pytest.fail(f"the worker ended with {self.process.wait(WAIT_S)} before {event}")

    def execute(self, **fields: Any) -> Any:
        return self.peer.execute(metadata=bearer(TOKEN), **{"prompt_text": "in the", "ignore_eos": True, **fields})

    def ask(self, method: str, request: Any = None) -> Any:
        """The answer of a method that needs the execute token."""
        return self.peer.unary(method, request, metadata=bearer(TOKEN))

    def control(self, method: str, request: Any = None) -> Any:
        """The answer of a method that needs the control token."""
        return self.peer.unary(method, request, metadata=bearer(CONTROL_TOKEN))

    def orcd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from orcd_jax.cli import run; run()", arguments[0]]
        command += [f"--address=127.0.0.1:{self.port}", *arguments[1:]]
        tokens = {
            "ORCD_TOKEN_FILE": str(self.token_file),
            "ORCD_CONTROL_TOKEN_FILE": str(self.control_token_file),
        }
        environment = {**os.environ, **tokens}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT, env=environment
        )

    def watch(self, service: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.server.official_client", "watch", str(self.port), service]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def end(self) -> int:
        """Stops the process if it still runs; its exit code."""
        self.peer.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self.lines += self.process.stderr
            self.process.stderr.close()
        return self.process.wait(WAIT_S)
