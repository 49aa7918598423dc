"""The audit log in a process of its own: killed at work, and on a disk that is really full."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orcd_jax.telemetry.audit import AuditEvent, AuditLog, Head, verify_audit
from tests.telemetry.audit_samples import events, records

ROOT = Path(__file__).resolve().parent.parent.parent
PREAMBLE = """
import itertools, json, os, resource, signal, sys
from pathlib import Path
from orcd_jax.telemetry import log
from orcd_jax.telemetry.audit import AuditEvent, AuditLog
log.configure(worker_id="w1", pool_id="p1")
directory = Path(sys.argv[1])
"""
RECORD_UNTIL_KILLED = """
audit = AuditLog(directory, worker_id="w1", max_file_bytes=20_000)
for number in itertools.count():
    audit.record(AuditEvent.DIGEST_RECOMPUTED, count=number)
    if number % 50 == 0 and audit.flush(30):
        print(audit.head.seq, audit.head.hash, flush=True)
"""
DIE_IN_THE_MIDDLE_OF_A_LINE = """
audit = AuditLog(directory, worker_id="w1")
audit.record(AuditEvent.LOAD_STARTED)
audit.flush(30)
write = os.write
def write_half(fd, line):
    write(fd, line[:len(line) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = write_half
audit.record(AuditEvent.SEALED)
audit.flush(30)
"""
FILL_AND_FREE = """
told = []
audit = AuditLog(directory, worker_id="w1", failure_policy=sys.argv[2], on_failure=told.append)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
for number in range(30):
    audit.record(AuditEvent.DIGEST_RECOMPUTED, count=number)
    assert audit.flush(30)
while_full = audit.lost
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
audit.record(AuditEvent.WORKER_STOPPED)
audit.close()
print(json.dumps({"while_full": while_full, "lost": audit.lost, "written": audit.written, "told": told}))
"""


def command(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]


@pytest.mark.requirement("WORKER-4163")
def test_a_worker_killed_at_work_leaves_a_chain_that_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "audit"
    seen: list[Head] = []
    for _ in range(3):
        with subprocess.Popen(
            command(RECORD_UNTIL_KILLED, log), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            assert worker.stdout is not None
            for _ in range(4):
                seq, digest = worker.stdout.readline().split()
                seen.append(Head(int(seq), digest))
            worker.send_signal(signal.SIGKILL)
    audit = AuditLog(log, worker_id="w1")
    audit.record(AuditEvent.WORKER_STARTED)
    audit.close()
    assert all(verify_audit(log, head).broken is None for head in seen)  # nothing that was flushed is gone
    assert records(log)[-1]["event"] == "worker_started"


@pytest.mark.requirement("WORKER-4163")
def test_a_line_that_was_being_written_when_the_worker_was_killed_is_set_aside(tmp_path: Path) -> None:
    log = tmp_path / "audit"
    died = subprocess.run(command(DIE_IN_THE_MIDDLE_OF_A_LINE, log), cwd=ROOT, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL
    broken = verify_audit(log).broken
    assert broken is not None
    assert (broken.why, broken.line) == ("truncated", 3)
    audit = AuditLog(log, worker_id="w1")
    audit.record(AuditEvent.WORKER_STARTED)
    audit.close()
    assert verify_audit(log).broken is None
    assert events(log) == ["load_started", "log_recovered", "worker_started"]
    (aside,) = log.glob("torn-*")
    assert aside.read_bytes().startswith(b'{"event":"sealed"')


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_real_limit_on_file_size_is_a_full_disk(tmp_path: Path, policy: str) -> None:
    log = tmp_path / "audit"
    done = subprocess.run(command(FILL_AND_FREE, log, policy), cwd=ROOT, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert 0 < result["while_full"] < 30
    assert result["lost"] == result["while_full"]
    assert result["told"] == (["File too large"] if policy == "stop" else [])
    report = verify_audit(log)
    assert (report.broken, report.lost, report.records) == (None, result["lost"], result["written"])
    assert [record["event"] for record in records(log)][-2:] == ["records_lost", "worker_stopped"]
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in said] == ["error", "info"]
