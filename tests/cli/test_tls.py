"""``orcd`` over TLS: whom it believes, what it sends to whom, and what it says when it does not."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orcd_jax.errors import ExitCode
from orcd_jax.server.tls import server_context
from tests.cli.conftest import Orcd, Result
from tests.server.fake_worker import TOKEN, WAIT_S, Served, serving
from tests.server.test_tls import DAY, Authority

pytestmark = pytest.mark.requirement("WORKER-4920")


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "our")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "their")


@pytest.fixture
def secure(ours: Authority, served: Served) -> Iterator[Served]:
    del served  # only for its quiet log
    with serving(tls=server_context(*ours.issue("server"))) as started:
        yield started


@pytest.fixture
def mutual(ours: Authority, served: Served) -> Iterator[Served]:
    del served
    with serving(tls=server_context(*ours.issue("server"), ours.file)) as started:
        yield started


def at(served: Served, host: str = "localhost") -> str:
    return f"--address={host}:{served.port}"


def own(files: tuple[Path, Path]) -> tuple[str, str]:
    return f"--tls_cert_file={files[0]}", f"--tls_key_file={files[1]}"


def assert_unreachable(shown: Result, *said: str) -> None:
    assert (shown.code, shown.out) == (ExitCode.UNREACHABLE, "")
    assert shown.err.startswith("error: UNREACHABLE: no worker answers at ")
    assert shown.err.count("\n") == 1
    for wanted in said:
        assert wanted in shown.err


@pytest.mark.parametrize("command", [("execute", "--max_tokens=8", "x"), ("ready",), ("status",), ("commit",)])
def test_a_worker_whose_certificate_is_of_the_authority_is_called(
    alone: Orcd, secure: Served, ours: Authority, command: tuple[str, ...]
) -> None:
    shown = alone(*command, at(secure), f"--tls_ca_file={ours.file}")
    assert (shown.code, "error" in shown.err) == (ExitCode.OK, False)


def test_the_authority_may_come_from_the_environment_and_a_flag_goes_before_it(
    alone: Orcd, secure: Served, ours: Authority, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCD_TLS_CA_FILE", str(ours.file))
    assert alone("ready", at(secure)).code is ExitCode.OK
    assert_unreachable(alone("ready", at(secure), f"--tls_ca_file={theirs.file}"), "its certificate is refused")


def test_a_worker_of_another_authority_is_not_called(alone: Orcd, secure: Served, theirs: Authority) -> None:
    shown = alone("execute", "--max_tokens=8", "x", at(secure), f"--tls_ca_file={theirs.file}")
    assert_unreachable(shown, "its certificate is refused (", "check --tls_ca_file")
    assert secure.worker.calls == 0
    shown = alone("ready", at(secure), f"--tls_ca_file={theirs.file}", "--json")
    assert json.loads(shown.out)["retriable"] is False


def test_a_worker_whose_certificate_names_another_host_is_not_called(
    alone: Orcd, secure: Served, ours: Authority
) -> None:
    shown = alone("ready", at(secure, "127.0.0.1"), f"--tls_ca_file={ours.file}")
    assert_unreachable(shown, "its certificate is refused (", "127.0.0.1", "--address is a name in the certificate")


def test_without_tls_a_worker_that_has_it_says_how_to_ask(alone: Orcd, secure: Served) -> None:
    assert_unreachable(alone("ready", at(secure)), "only over TLS (see --tls_ca_file)")


def test_with_tls_a_worker_that_has_none_is_not_called_in_plain_text(
    alone: Orcd, served: Served, ours: Authority
) -> None:
    shown = alone("ready", at(served), f"--tls_ca_file={ours.file}")
    assert_unreachable(shown, "leave out --tls_ca_file")


def test_nothing_of_the_token_is_sent_before_the_worker_has_shown_who_it_is(alone: Orcd, ours: Authority) -> None:
    got = bytearray()

    def listen() -> None:
        taken, _ = listener.accept()
        with taken:
            taken.settimeout(WAIT_S)
            while part := taken.recv(65536):
                got.extend(part)
                taken.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")  # HTTP/2 in plain text: no handshake

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        port = listener.getsockname()[1]
        assert alone("ready", f"--address=localhost:{port}", f"--tls_ca_file={ours.file}").code is ExitCode.UNREACHABLE
        thread.join(WAIT_S)
    assert got[:1] == b"\x16"  # a handshake
    assert TOKEN.encode() not in got


# -- mutual ------------------------------------------------------------------------------------------------------------


def test_a_client_with_a_certificate_is_let_in(alone: Orcd, mutual: Served, ours: Authority) -> None:
    mine = own(ours.issue("client", client=True))
    assert alone("ready", at(mutual), f"--tls_ca_file={ours.file}", *mine).code is ExitCode.OK


def test_one_without_is_told_to_give_one(alone: Orcd, mutual: Served, ours: Authority) -> None:
    shown = alone("ready", at(mutual), f"--tls_ca_file={ours.file}")
    assert_unreachable(shown, "it wants a certificate of yours: give --tls_cert_file and --tls_key_file")


def test_one_of_another_authority_is_told_which_file_it_is(
    alone: Orcd, mutual: Served, ours: Authority, theirs: Authority
) -> None:
    shown = alone("ready", at(mutual), f"--tls_ca_file={ours.file}", *own(theirs.issue("client", client=True)))
    assert_unreachable(shown, "--tls_cert_file")
    expired = own(ours.issue("old", begins=-2 * DAY, ends=-DAY, client=True))
    assert_unreachable(alone("ready", at(mutual), f"--tls_ca_file={ours.file}", *expired), "--tls_cert_file")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(30)
def test_files_that_cannot_be_used_are_refused_before_anything_is_sent(
    alone: Orcd, ours: Authority, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"no PEM")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    certificate, key = ours.issue("client", client=True)
    _, other = ours.issue("other")
    _, locked = ours.issue("locked", password=b"secret")
    ca = f"--tls_ca_file={ours.file}"
    for flags, said in (
        ((f"--tls_ca_file={tmp_path / 'none'}",), "--tls_ca_file: '"),
        ((f"--tls_ca_file={odd}",), f"--tls_ca_file: '{odd}' holds no certificate"),
        ((f"--tls_ca_file={binary}",), f"--tls_ca_file: '{binary}' holds no certificate"),
        ((ca, f"--tls_cert_file={certificate}"), "--tls_cert_file and --tls_key_file go together"),
        ((ca, f"--tls_key_file={key}"), "--tls_cert_file and --tls_key_file go together"),
        ((ca, *own((tmp_path / "none", key))), "cannot be read (No such file or directory)"),
        ((ca, *own((certificate, tmp_path / "none"))), "cannot be read (No such file or directory)"),
        ((ca, *own((certificate, other))), f"--tls_key_file: '{other}' is not the key of --tls_cert_file"),
        ((ca, *own((certificate, locked))), "--tls_key_file: it is encrypted"),
        ((ca, *own((odd, key))), "they must be PEM"),
        ((ca, *own((certificate, odd))), "they must be PEM"),
    ):
        shown = alone("ready", "--address=localhost:1", *flags)
        assert (shown.code, shown.out) == (ExitCode.USAGE, "")
        assert said in shown.err
        assert shown.err.count("\n") == 1
