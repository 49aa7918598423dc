"""SIGHUP to a worker that serves: new tokens and certificates, and an end for what the old ones had begun."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from orcd_jax.errors import ExitCode
from orcd_jax.server.auth import fingerprint
from tests.server.peer import Peer, bearer, execute_request, outcome
from tests.server.test_tls import Authority, trusting
from tests.tiny_checkpoint import tiny_checkpoint
from tests.worker_process import CONTROL_TOKEN, SLOW, TOKEN, WAIT_S, Worker

__all__ = ["tiny_checkpoint"]

pytestmark = pytest.mark.slow

FRESH, KEPT = "a" * 64, "b" * 64
LONG = 300  # tokens: three seconds of them


class Served:
    """A worker with TLS, its files, and the official client of whoever trusts its authority."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.folder, self.ours = folder, Authority(folder, "our")
        self.put(self.ours.issue("first"))
        flags = (f"--tls_cert_file={folder / 'cert.pem'}", f"--tls_key_file={folder / 'key.pem'}", "--slots_total=2")
        self.worker = Worker(checkpoint, folder, *flags, "--connections_per_peer=3", prelude=SLOW)
        self.peer = Peer(self.worker.port, trusting(self.ours))

    def put(self, files: tuple[Path, Path]) -> None:
        for source, name in zip(files, ("cert.pem", "key.pem"), strict=True):
            shutil.copy(source, self.folder / name)

    def hang_up(self) -> dict[str, Any]:
        """Sends SIGHUP; the first line that the worker logs about it."""
        self.worker.process.send_signal(signal.SIGHUP)
        return self.worker.wait_for("auth")

    def job(self, token: str, job_id: str) -> Any:
        request = execute_request(job_id=job_id, prompt_text="in the", ignore_eos=True, max_tokens=LONG)
        return self.peer.stream("Execute", request, metadata=bearer(token), timeout=WAIT_S)

    def certificate(self) -> bytes:
        """What a new connection is shown."""
        with self.shake() as secured:
            return secured.getpeercert(binary_form=True) or b""

    def shake(self) -> ssl.SSLSocket:
        """A connection after the handshake."""
        context = ssl.create_default_context(cafile=self.ours.file)
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", self.worker.port), WAIT_S)
        return context.wrap_socket(plain, server_hostname="localhost")

    def of(self, name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert((self.folder / f"{name}.pem").read_text())


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One worker; the tests of this file run in order and share its life."""
    made = Served(tiny_checkpoint, tmp_path_factory.mktemp("rotation"))
    try:
        made.worker.wait_for("ready")
        yield made
    finally:
        made.peer.channel.close()
        made.worker.end()


@pytest.mark.requirement("WORKER-4201")
def test_a_job_of_a_token_that_is_gone_ends_and_one_of_a_token_that_stays_does_not(served: Served) -> None:
    served.worker.token_file.write_text(f"{TOKEN}\n{KEPT}\n")
    assert str(served.hang_up()["human"]).endswith("; 0 running calls were ended.")
    gone, kept = served.job(TOKEN, "gone"), served.job(KEPT, "kept")
    for job in (gone, kept):
        assert next(job).WhichOneof("event") == "started"
    served.worker.token_file.write_text(f"{FRESH}\n{KEPT}\n")
    assert served.hang_up()["human"] == (
        f"The token files were read again: new {fingerprint(FRESH)}, gone {fingerprint(TOKEN)}; "
        "1 running calls were ended."
    )
    events, error = outcome(gone)
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert events[-1].WhichOneof("event") == "error"
    events, error = outcome(kept)
    assert error is None
    assert events[-1].end.tokens_out == LONG
    status = served.peer.unary("GetStatus", metadata=bearer(CONTROL_TOKEN))
    assert status.slots_used == 0, "the job was not cancelled"
    assert served.peer.unary("Ready", metadata=bearer(FRESH)).ready


@pytest.mark.requirement("WORKER-4920")
def test_new_connections_get_a_new_certificate_and_a_bad_one_is_not_taken(served: Served) -> None:
    assert served.certificate() == served.of("first")
    served.put(served.ours.issue("second"))
    served.hang_up()
    assert str(served.worker.wait_for("auth")["human"]).startswith("The TLS files were read again: ")
    assert served.certificate() == served.of("second")
    (served.folder / "key.pem").write_text("no key")
    served.hang_up()
    refused = served.worker.wait_for("auth")
    assert (refused["level"], refused["field"]) == ("error", "tls_key_file")
    assert served.certificate() == served.of("second")
    assert served.peer.unary("Ready", metadata=bearer(FRESH)).ready, "a connection that is there goes on"


@pytest.mark.requirement("WORKER-4420")
def test_one_address_is_bounded_by_its_flag_and_counted(served: Served) -> None:
    with contextlib.ExitStack() as opened:

        def taken() -> bool:
            try:
                opened.enter_context(served.shake())
            except OSError:
                return False
            return True

        outcomes = [taken() for _ in range(4)]
    assert (outcomes[0], outcomes[-1]) == (True, False)  # the official client has one of the three
    port = served.peer.unary("GetStatus", metadata=bearer(CONTROL_TOKEN)).metrics_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    assert float(lines['worker_connections_refused_total{reason="full"}']) == 0
    assert float(lines['worker_connections_refused_total{reason="peer"}']) == outcomes.count(False)


@pytest.mark.requirement("WORKER-4160")
@pytest.mark.requirement("WORKER-4423")
def test_who_guesses_tokens_does_not_fill_the_audit(served: Served) -> None:
    """The records are counted when the worker has ended."""
    with Peer(served.worker.port, trusting(served.ours)) as guesser:
        for _ in range(40):
            guesser.refusal_of("/orcd.worker.v1.Worker/Ready", metadata=bearer("x" * 32))


@pytest.mark.requirement("WORKER-4160")
def test_the_audit_has_it_all(served: Served) -> None:
    """Runs last: it ends the worker."""
    assert served.worker.end() == ExitCode.OK
    folder = next(served.worker.state.glob("*/audit"))
    records = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    rotations = [
        record for record in records if record["event"] in ("tokens_rotated", "tls_rotated", "rotation_refused")
    ]
    assert [record["event"] for record in rotations] == [
        "tokens_rotated",
        "tokens_rotated",
        "tokens_rotated",
        "tls_rotated",
        "tokens_rotated",
        "rotation_refused",
    ]
    assert [record.get("count") for record in rotations[:2]] == [0, 1]
    assert rotations[-1]["field"] == "tls_key_file"
    assert 1 <= sum(record["event"] == "auth_failed" for record in records) <= 20
    assert sum(record["event"] == "auth_limited" for record in records) == 1
    assert not any(token in json.dumps(records) for token in (TOKEN, FRESH, KEPT))


@pytest.mark.requirement("WORKER-4201")
def test_a_hangup_before_anything_is_there_is_survived(tiny_checkpoint: Path, tmp_path: Path) -> None:
    worker = Worker(tiny_checkpoint, tmp_path, "--await_commit")
    try:
        while not list(worker.state.glob("*/restarts.json")):
            assert worker.process.poll() is None
        worker.process.send_signal(signal.SIGHUP)
        worker.wait_for("startup")
        assert worker.control("GetStatus").version
    finally:
        assert worker.end() == ExitCode.OK
