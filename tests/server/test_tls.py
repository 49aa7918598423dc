"""TLS and mutual TLS, with the official client over a real socket."""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.limits import Limits
from orcd_jax.server.tls import server_context
from tests.server.fake_worker import WAIT_S, Served, serving
from tests.server.peer import Peer, failure, outcome
from tests.server.raw import Raw

DAY = datetime.timedelta(days=1)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class Authority:
    """Issues certificates, into files of one directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(self._builder(f"{name} CA", self.key, -DAY, DAY, of_authority=True))
        self.file = self._write(f"{name}-ca.pem", self.certificate.public_bytes(Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = DAY,
        password: bytes = b"",
        key: Key | None = None,
        client: bool = False,
    ) -> tuple[Path, Path]:
        """Files of a certificate for localhost and of its key."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(name, key, begins, ends, of_authority=False)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        lock: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
        return (
            self._write(f"{name}.pem", self._sign(builder).public_bytes(Encoding.PEM)),
            self._write(f"{name}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)),
        )

    def _builder(
        self, name: str, key: Key, begins: datetime.timedelta, ends: datetime.timedelta, *, of_authority: bool
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{self.name} CA")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=of_authority, path_length=None), critical=True)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        path.chmod(0o600)
        return path


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "our")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "their")


def trusting(authority: Authority, own: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    certificate, key = own or (None, None)
    return grpc.ssl_channel_credentials(
        authority.file.read_bytes(), key and key.read_bytes(), certificate and certificate.read_bytes()
    )


@pytest.fixture
def secure(ours: Authority) -> Iterator[Served]:
    with serving(tls=server_context(*ours.issue("server"))) as started:
        yield started


@pytest.fixture
def mutual(ours: Authority) -> Iterator[Served]:
    with serving(tls=server_context(*ours.issue("server"), ours.file)) as started:
        yield started


@pytest.mark.requirement("WORKER-4920")
def test_the_official_client_runs_a_job_over_tls(secure: Served, ours: Authority) -> None:
    with Peer(secure.port, trusting(ours)) as peer:
        events, error = outcome(peer.execute())
    assert error is None
    assert len(events) == 5


@pytest.mark.requirement("WORKER-4920")
def test_a_key_of_rsa_serves_too(ours: Authority) -> None:
    files = ours.issue("server", key=rsa.generate_private_key(65537, 2048))
    with serving(tls=server_context(*files)) as served, Peer(served.port, trusting(ours)) as peer:
        assert peer.unary("Ready").ready


@pytest.mark.requirement("WORKER-4920")
def test_a_client_that_trusts_somebody_else_does_not_connect(secure: Served, theirs: Authority) -> None:
    with Peer(secure.port, trusting(theirs)) as peer:
        assert failure(peer.execute()).code() is grpc.StatusCode.UNAVAILABLE
    assert secure.worker.calls == 0


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.parametrize(
    ("version", "name"), [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")]
)
def test_tls_1_2_and_1_3_are_spoken(secure: Served, ours: Authority, version: ssl.TLSVersion, name: str) -> None:
    with shake(secure, ours, version, ["h2", "http/1.1"]) as secured:
        assert secured.version() == name
        assert secured.selected_alpn_protocol() == "h2"
        assert secured.recv(1)  # its settings


def shake(
    served: Served, authority: Authority, version: ssl.TLSVersion, protocols: list[str], ciphers: str = "DEFAULT"
) -> ssl.SSLSocket:
    """A connection after the handshake."""
    context = ssl.create_default_context(cafile=authority.file)
    context.minimum_version = context.maximum_version = version
    context.set_ciphers(ciphers)
    context.set_alpn_protocols(protocols)
    plain = socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S)
    return context.wrap_socket(plain, server_hostname="localhost")


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_nothing_older_is_spoken(secure: Served, ours: Authority) -> None:
    with pytest.raises(OSError, match=r"alert|EOF|version|reset"):
        shake(secure, ours, ssl.TLSVersion.TLSv1_1, ["h2"], "ALL:@SECLEVEL=0")


@pytest.mark.requirement("WORKER-4920")
def test_the_ciphers_that_http_2_forbids_are_not_taken(secure: Served, ours: Authority) -> None:
    with pytest.raises(OSError, match=r"alert|EOF|reset"):
        shake(secure, ours, ssl.TLSVersion.TLSv1_2, ["h2"], "ECDHE-ECDSA-AES128-SHA256")


@pytest.mark.requirement("WORKER-4920")
def test_a_client_that_does_not_choose_http_2_is_sent_away(secure: Served, ours: Authority) -> None:
    with shake(secure, ours, ssl.TLSVersion.TLSv1_3, []) as secured:
        received = b""
        while part := secured.recv(4096):
            received += part
    assert b"the client did not choose h2" in received


@pytest.mark.requirement("WORKER-4920")
def test_plaintext_to_a_tls_port_is_refused_and_leaves_the_server_well(secure: Served, ours: Authority) -> None:
    with Peer(secure.port) as plain:
        assert failure(plain.execute()).code() is grpc.StatusCode.UNAVAILABLE
    with Raw(secure.port) as raw:
        raw.write(b"GET / HTTP/1.1\r\n\r\n")
        assert raw._socket.recv(4096)[:1] in (b"", b"\x15")  # at most a TLS alert
    with Peer(secure.port, trusting(ours)) as peer:
        assert peer.unary("Ready").ready
    assert secure.worker.calls == 0


@pytest.mark.requirement("WORKER-4920")
def test_a_client_that_never_ends_its_handshake_is_cut_off_and_counts_meanwhile(ours: Authority) -> None:
    limits = Limits(handshake_s=0.3, connections=1)
    with serving(tls=server_context(*ours.issue("server")), limits=limits) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as silent:
            with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as other:
                assert other.recv(1) == b"", "one more than there may be"
            assert silent.recv(1) == b""
        with Peer(served.port, trusting(ours)) as peer:
            assert peer.unary("Ready").ready


# -- mutual ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.requirement("WORKER-4921")
def test_with_a_certificate_of_the_right_authority_a_client_is_let_in(mutual: Served, ours: Authority) -> None:
    with Peer(mutual.port, trusting(ours, ours.issue("client", client=True))) as peer:
        assert peer.unary("Ready").ready


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.requirement("WORKER-4921")
@pytest.mark.parametrize("holds", ["none", "another authority's", "an expired one", "a server's"])
def test_with_any_other_or_none_it_is_not_and_no_token_helps(
    mutual: Served, ours: Authority, theirs: Authority, holds: str
) -> None:
    own: dict[str, tuple[Path, Path] | None] = {
        "none": None,
        "another authority's": theirs.issue("client", client=True),
        "an expired one": ours.issue("expired", begins=-2 * DAY, ends=-DAY, client=True),
        "a server's": ours.issue("other"),
    }
    with Peer(mutual.port, trusting(ours, own[holds])) as peer:
        assert failure(peer.execute()).code() is grpc.StatusCode.UNAVAILABLE
    assert mutual.worker.calls == 0


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.requirement("WORKER-4200")
@pytest.mark.requirement("WORKER-4921")
def test_a_certificate_does_not_replace_a_token(mutual: Served, ours: Authority) -> None:
    with Peer(mutual.port, trusting(ours, ours.issue("client", client=True))) as peer:
        assert failure(peer.execute(metadata=())).code() is grpc.StatusCode.UNAUTHENTICATED


# -- files that are not as they must be --------------------------------------------------------------------------------


def told(*files: Path) -> tuple[str | None, str]:
    with pytest.raises(OrcdError) as caught:
        server_context(*files)
    assert caught.value.code is ErrorCode.INVALID_PARAMS
    assert caught.value.message.startswith(f"--{caught.value.field}: ")
    return caught.value.field, caught.value.message


@pytest.mark.requirement("WORKER-4920")
def test_the_key_must_be_private(ours: Authority) -> None:
    certificate, key = ours.issue("server")
    key.chmod(0o640)
    field, message = told(certificate, key)
    assert field == "tls_key_file"
    assert "others can use it (mode 0640); run `chmod 600` on it" in message


@pytest.mark.requirement("WORKER-4920")
def test_a_certificate_that_has_expired_or_is_not_valid_yet_is_refused(ours: Authority) -> None:
    field, message = told(*ours.issue("old", begins=-2 * DAY, ends=-DAY))
    assert (field, "certificate 1 has expired (" in message) == ("tls_cert_file", True)
    field, message = told(*ours.issue("new", begins=DAY, ends=2 * DAY))
    assert (field, "certificate 1 is valid from " in message) == ("tls_cert_file", True)


@pytest.mark.requirement("WORKER-4920")
def test_a_key_of_another_certificate_is_refused(ours: Authority) -> None:
    certificate, _ = ours.issue("one")
    _, key = ours.issue("two")
    assert told(certificate, key) == (
        "tls_key_file",
        "--tls_key_file: it is not the key of the first certificate of --tls_cert_file",
    )


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.timeout(30)
def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(ours: Authority) -> None:
    assert "it is encrypted" in told(*ours.issue("server", password=b"secret"))[1]


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_files_that_hold_something_else_are_refused(ours: Authority, tmp_path: Path, content: bytes) -> None:
    certificate, key = ours.issue("server")
    other = tmp_path / "other"
    other.write_bytes(content)
    other.chmod(0o600)
    assert told(other, key)[0] == "tls_cert_file"
    assert told(certificate, other)[0] == "tls_key_file"
    assert told(certificate, key, other)[0] == "tls_client_ca_file"


@pytest.mark.requirement("WORKER-4920")
def test_files_that_are_not_there_are_refused(ours: Authority, tmp_path: Path) -> None:
    certificate, key = ours.issue("server")
    none = tmp_path / "none"
    for files in ((none, key), (certificate, none), (certificate, key, none)):
        assert "No such file" in told(*files)[1]
