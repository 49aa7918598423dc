"""What a worker gives up, as the kernel shows it. Each test is a process of its own: none of it can be undone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orcd_jax.device.privileges import Restrictions, Stage, lock_down
from tests.conftest import PLATFORM

ROOT = Path(__file__).parent.parent.parent
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the means")

_PRELUDE = """
import json, os, resource, subprocess, sys, threading
from pathlib import Path
from orcd_jax.device.privileges import Stage, lock_down

def status(of="self"):
    lines = Path(f"/proc/{of}/status").read_text().splitlines()
    return dict(line.split(":\\t", 1) for line in lines if line.startswith(("Cap", "NoNewPrivs")))
"""


def told(script: str, *arguments: str) -> Any:
    """What a new process prints, as JSON."""
    command = [sys.executable, "-c", _PRELUDE + script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def holds_nothing(status: dict[str, str]) -> bool:
    """No capability in any set that counts, and no way to gain one."""
    sets = ("CapInh", "CapPrm", "CapEff", "CapAmb")
    return status["NoNewPrivs"] == "1" and all(int(status[name], 16) == 0 for name in sets)


@pytest.mark.requirement("WORKER-4901")
@on_linux
def test_the_first_stage_leaves_no_capability_and_no_way_to_gain_one() -> None:
    before, after, said = told("b = status(); r = lock_down(Stage.START); print(json.dumps([b, status(), str(r)]))")
    assert before["NoNewPrivs"] == "0"
    assert holds_nothing(after)
    assert said.startswith("no new privileges, no capabilities")
    privileged = int(before["CapEff"], 16) & (1 << 8)  # CAP_SETPCAP
    assert int(after["CapBnd"], 16) == (0 if privileged else int(before["CapBnd"], 16))
    assert ("none to be had" in said) == (int(after["CapBnd"], 16) == 0)


@pytest.mark.requirement("WORKER-4901")
@on_linux
def test_a_process_without_privileges_gives_up_the_rest() -> None:
    after, said = told("""
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
r = lock_down(Stage.START)
print(json.dumps([status(), str(r)]))""")
    assert holds_nothing(after)
    assert said.startswith("no new privileges, no capabilities")
    assert ("none to be had" in said) == (int(after["CapBnd"], 16) == 0)


@pytest.mark.requirement("WORKER-4901")
@on_linux
def test_threads_and_programs_that_are_started_later_have_none_either() -> None:
    thread, program = told("""
lock_down(Stage.START)
found = []
thread = threading.Thread(target=lambda: found.append(status(f"self/task/{threading.get_native_id()}")))
thread.start(); thread.join()
found.append(json.loads(subprocess.run([sys.executable, "-I", "-S", "-c", '''
import json
lines = open("/proc/self/status").read().splitlines()
print(json.dumps(dict(l.split(":\\t", 1) for l in lines if l.startswith(("Cap", "NoNewPrivs")))))
'''], capture_output=True, check=True).stdout))
print(json.dumps(found))""")
    assert holds_nothing(thread)
    assert holds_nothing(program)


@pytest.mark.requirement("WORKER-4901")
@on_linux
def test_files_are_made_private_and_nothing_is_dumped(tmp_path: Path) -> None:
    core = told(
        """
lock_down(Stage.START)
Path(sys.argv[1]).touch()
print(json.dumps(resource.getrlimit(resource.RLIMIT_CORE)))""",
        str(tmp_path / "made"),
    )
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600
    assert core == [0, 0]


@pytest.mark.requirement("WORKER-4902")
@on_linux
def test_the_second_stage_hides_the_memory_from_other_processes() -> None:
    first, second, owner = told("""
first = lock_down(Stage.START).dumpable
second = lock_down(Stage.DEVICE_READY).dumpable
print(json.dumps([first, second, Path("/proc/self/mem").stat().st_uid]))""")
    assert (first, second) == (True, False)
    assert owner == 0  # whoever runs it: root's, so closed to others of the same user


@pytest.mark.requirement("WORKER-4901")
@on_linux
def test_the_first_stage_refuses_to_come_after_threads() -> None:
    code, message, after = told("""
from orcd_jax.errors import OrcdError
wait = threading.Event()
thread = threading.Thread(target=wait.wait)
thread.start()
try:
    lock_down(Stage.START)
except OrcdError as error:
    print(json.dumps([error.code, error.message, status()]))
wait.set()""")
    assert code == "POLICY_VIOLATION"
    assert "several threads" in message
    assert after["NoNewPrivs"] == "0"


@pytest.mark.requirement("WORKER-4901")
@on_linux
def test_a_system_that_refuses_is_a_policy_violation() -> None:
    code, message = told("""
import ctypes
from orcd_jax.errors import OrcdError
real = ctypes.CDLL
class Refusing:
    def __init__(self, *args, **kwargs): self.libc = real(*args, **kwargs)
    def __getattr__(self, name): return getattr(self.libc, name)
    def capset(self, *args):
        ctypes.set_errno(1)
        return -1
ctypes.CDLL = Refusing
try:
    lock_down(Stage.START)
except OrcdError as error:
    print(json.dumps([error.code, error.message]))""")
    assert code == "POLICY_VIOLATION"
    assert (
        message
        == "privileges cannot be given up: the system refuses to drop the capabilities (Operation not permitted)"
    )


@pytest.mark.requirement("WORKER-4901")
@on_linux
def test_what_the_worker_imports_before_it_starts_no_thread() -> None:
    threads = told("import orcd_jax.main; print(len(os.listdir('/proc/self/task')))")
    assert threads == 1


@pytest.mark.requirement("WORKER-4901")
@pytest.mark.requirement("WORKER-4902")
@on_linux
def test_jax_compiles_and_runs_between_the_stages_and_after_and_none_of_its_threads_has_more() -> None:
    threads, first, second = told(
        """
lock_down(Stage.START)
os.environ["JAX_PLATFORMS"] = sys.argv[1]
import jax, jax.numpy as jnp
first = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
lock_down(Stage.DEVICE_READY)
second = float(jax.jit(lambda x: (x * x).sum())(jnp.ones((64, 64))))
print(json.dumps([[status(f"self/task/{task}") for task in os.listdir("/proc/self/task")], first, second]))""",
        PLATFORM,
    )
    assert len(threads) > 1
    assert all(holds_nothing(thread) for thread in threads)
    assert (first, second) == (64**3, 64**2)


def test_elsewhere_nothing_is_done_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert lock_down(Stage.START) == Restrictions(supported=False)
    assert str(lock_down(Stage.DEVICE_READY)) == "not restricted: only Linux has the means"
