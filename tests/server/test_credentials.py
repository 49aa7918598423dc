"""Tokens and certificates that are read again while the server runs, over real TLS."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from orcd_jax.server.auth import Access, fingerprint
from orcd_jax.server.credentials import Credentials
from orcd_jax.telemetry.audit import AuditEvent
from orcd_jax.telemetry.audit_record import Value
from tests.server.fake_worker import STARTED, WAIT_S, Served, hang_after, serving
from tests.server.peer import Peer, bearer, outcome
from tests.server.test_access import write
from tests.server.test_tls import DAY, Authority, trusting

OLD, NEW = "a" * 32, "b" * 32
Lines = Callable[[], list[dict[str, object]]]


class Noted:
    """An audit that remembers."""

    def __init__(self) -> None:
        self.records: list[tuple[AuditEvent, dict[str, Value | None]]] = []

    def record(self, event: AuditEvent, **fields: Value | None) -> None:
        self.records.append((event, fields))

    def close(self) -> None: ...


class Kept:
    """A server with mutual TLS whose files a test exchanges."""

    def __init__(self, folder: Path, served: Served, credentials: Credentials, audit: Noted) -> None:
        self.folder, self.served, self.credentials, self.audit = folder, served, credentials, audit

    def put(self, certificate: Path, key: Path) -> None:
        """Gives the server another certificate, as its files have it."""
        for source, name in ((certificate, "cert.pem"), (key, "key.pem")):
            shutil.copy(source, self.folder / name)

    def reload(self) -> None:
        """What SIGHUP does."""
        self.served.wait(self.credentials.reload())

    def serial(self, client: tuple[Path, Path], trusted: Path) -> int:
        """Of the certificate that a new connection is shown."""
        with self.shake(client, trusted) as secured:
            if not secured.recv(1):  # with TLS 1.3 a client that is refused hears of it here
                raise ConnectionResetError("reset")
            shown = secured.getpeercert()
        assert shown is not None
        return int(str(shown["serialNumber"]), 16)

    def shake(
        self,
        client: tuple[Path, Path],
        trusted: Path,
        session: ssl.SSLSession | None = None,
        context: ssl.SSLContext | None = None,
    ) -> ssl.SSLSocket:
        """A connection after the handshake."""
        context = context or trusting_context(client, trusted)
        plain = socket.create_connection(("127.0.0.1", self.served.port), timeout=WAIT_S)
        return context.wrap_socket(plain, server_hostname="localhost", session=session)


def trusting_context(client: tuple[Path, Path], trusted: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=trusted)
    context.load_cert_chain(*client)
    context.set_alpn_protocols(["h2"])
    return context


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "our")


@pytest.fixture
def client(ours: Authority) -> tuple[Path, Path]:
    return ours.issue("client", client=True)


@pytest.fixture
def kept(tmp_path: Path, ours: Authority, all_log_lines: Lines) -> Iterator[Kept]:
    folder = tmp_path / "files"
    folder.mkdir()
    token, authorities = write(folder / "token", OLD), Path(shutil.copy(ours.file, folder / "clients.pem"))
    for source, name in zip(ours.issue("first"), ("cert.pem", "key.pem"), strict=True):
        shutil.copy(source, folder / name)
    audit = Noted()
    files = (folder / "cert.pem", folder / "key.pem", authorities)
    credentials = Credentials(Access.from_files(token), files, audit)
    with serving(access=credentials.access, tls=credentials.tls) as served:
        served.on_loop(lambda: credentials.keep(served.server))
        yield Kept(folder, served, credentials, audit)


def serial_of(certificate: Path) -> int:
    return int(ssl._ssl._test_decode_cert(str(certificate))["serialNumber"], 16)  # type: ignore[attr-defined]


# -- certificates ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4920")
def test_new_connections_get_the_new_certificate_and_those_that_are_there_go_on(
    kept: Kept, ours: Authority, client: tuple[Path, Path], all_log_lines: Lines
) -> None:
    kept.served.worker.script = hang_after(STARTED)
    with Peer(kept.served.port, trusting(ours, client)) as peer:
        job = peer.execute(metadata=bearer(OLD))
        next(job)
        first, second = ours.directory / "first.pem", ours.issue("second")
        assert kept.serial(client, ours.file) == serial_of(first)
        kept.put(*second)
        assert kept.serial(client, ours.file) == serial_of(first), "nobody has asked yet"
        kept.reload()
        assert kept.serial(client, ours.file) == serial_of(second[0])
        assert peer.unary("Ready", metadata=bearer(OLD)).ready
        assert not kept.served.worker.closed.is_set()
        job.cancel()
    events = [(event, fields) for event, fields in kept.audit.records if event is AuditEvent.TLS_ROTATED]
    ((_, fields),) = events
    assert fields["digest"] == digest_of(second[0])
    (line,) = [line for line in all_log_lines() if line["event"] == "auth" and "TLS" in str(line["human"])]
    assert f"new connections get certificate {digest_of(second[0])[:16]}, valid until " in str(line["human"])


def digest_of(certificate: Path) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest()


@pytest.mark.requirement("WORKER-4921")
def test_clients_of_an_authority_that_is_gone_are_not_let_in_nor_by_an_old_session(
    kept: Kept, ours: Authority, client: tuple[Path, Path], tmp_path: Path
) -> None:
    theirs = Authority(tmp_path, "their")
    other = theirs.issue("other", client=True)
    context = trusting_context(client, ours.file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # where a session is known after the handshake
    with kept.shake(client, ours.file, context=context) as secured:
        session = secured.session
        assert secured.recv(1)
    with kept.shake(client, ours.file, session, context) as secured:
        assert secured.session_reused, "it would do"
    with pytest.raises(OSError, match=r"alert|EOF|reset"):
        kept.serial(other, ours.file)

    shutil.copy(theirs.file, kept.folder / "clients.pem")
    kept.reload()
    assert kept.serial(other, ours.file)
    for offered in (None, session):
        with pytest.raises(OSError, match=r"alert|EOF|reset"), kept.shake(client, ours.file, offered, context):
            pass


BAD: dict[str, tuple[str, str]] = {
    "no certificate": ("tls_cert_file", "it holds no certificate"),
    "an expired one": ("tls_cert_file", "certificate 1 has expired"),
    "another key": ("tls_key_file", "it is not the key of the first certificate"),
    "a key that others can read": ("tls_key_file", "others can use it (mode 0644)"),
    "no key": ("tls_key_file", "it cannot be read (No such file or directory)"),
    "a pipe for a certificate": ("tls_cert_file", "it is not a regular file"),
    "no authorities": ("tls_client_ca_file", "it holds no certificate"),
}


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.parametrize("bad", BAD)
def test_when_a_file_is_not_as_it_must_be_the_old_certificate_stays_and_all_is_told(
    kept: Kept, ours: Authority, client: tuple[Path, Path], all_log_lines: Lines, bad: str
) -> None:
    first = ours.directory / "first.pem"
    if bad == "an expired one":
        kept.put(*ours.issue("second", begins=-2 * DAY, ends=-DAY))
    else:
        kept.put(*ours.issue("second"))
    match bad:
        case "no certificate":
            (kept.folder / "cert.pem").write_text("none")
        case "another key":
            shutil.copy(ours.issue("third")[1], kept.folder / "key.pem")
        case "a key that others can read":
            (kept.folder / "key.pem").chmod(0o644)
        case "no key":
            (kept.folder / "key.pem").unlink()
        case "a pipe for a certificate":
            (kept.folder / "cert.pem").unlink()
            os.mkfifo(kept.folder / "cert.pem")
        case "no authorities":
            (kept.folder / "clients.pem").write_text("")
    kept.reload()
    assert kept.serial(client, ours.file) == serial_of(first)
    field, problem = BAD[bad]
    (refused,) = [fields for event, fields in kept.audit.records if event is AuditEvent.ROTATION_REFUSED]
    assert refused["field"] == field
    assert problem in str(refused["reason"])
    (line,) = [line for line in all_log_lines() if line["level"] == "error"]
    assert (line["event"], line["field"]) == ("auth", field)
    assert str(line["human"]).startswith("The TLS files were not read again, new connections get the old ones: ")


@pytest.mark.requirement("WORKER-4920")
def test_certificates_that_are_the_same_are_no_event(kept: Kept) -> None:
    kept.reload()
    assert [event for event, _ in kept.audit.records] == [AuditEvent.TOKENS_ROTATED]


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4201")
@pytest.mark.requirement("WORKER-4160")
def test_the_audit_says_how_many_calls_a_rotation_ended(
    kept: Kept, ours: Authority, client: tuple[Path, Path], all_log_lines: Lines
) -> None:
    kept.served.worker.script = hang_after(STARTED)
    with Peer(kept.served.port, trusting(ours, client)) as peer:
        jobs = [peer.execute(metadata=bearer(OLD), job_id=f"job-{number}") for number in range(2)]
        for job in jobs:
            next(job)
        write(kept.folder / "token", NEW)
        kept.reload()
        errors = [outcome(job)[1] for job in jobs]
    assert [error and error.code() for error in errors] == [grpc.StatusCode.UNAUTHENTICATED] * 2
    said = f"new {fingerprint(NEW)}; gone {fingerprint(OLD)}"
    assert kept.audit.records == [(AuditEvent.TOKENS_ROTATED, {"reason": said, "count": 2})]
    (line,) = [line for line in all_log_lines() if line["event"] == "auth"]
    assert str(line["human"]).endswith("; 2 running calls were ended.")


@pytest.mark.requirement("WORKER-4201")
def test_tokens_that_are_not_as_they_must_be_stay_and_certificates_are_read_all_the_same(
    kept: Kept, ours: Authority, client: tuple[Path, Path]
) -> None:
    write(kept.folder / "token", "short")
    second = ours.issue("second")
    kept.put(*second)
    kept.reload()
    assert kept.serial(client, ours.file) == serial_of(second[0])
    with Peer(kept.served.port, trusting(ours, client)) as peer:
        assert peer.unary("Ready", metadata=bearer(OLD)).ready
    assert [event for event, _ in kept.audit.records] == [AuditEvent.ROTATION_REFUSED, AuditEvent.TLS_ROTATED]
    assert kept.audit.records[0][1]["field"] == "api_token_file"


def test_the_loop_goes_on_while_files_are_read(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that takes long to check, or a disk that takes long to answer."""
    seen: list[bool] = []

    def read(*files: object) -> None:
        asked = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), kept.served.loop)
        asked.result(WAIT_S)
        seen.append(asked.done())
        raise AssertionError("not of interest here")

    monkeypatch.setattr("orcd_jax.server.credentials.read_tls", read)
    with pytest.raises(AssertionError, match="not of interest"):
        kept.reload()
    assert seen == [True]
