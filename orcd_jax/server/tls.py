"""TLS of the gRPC server: one context from PEM files, checked whole whenever they are read (WORKER-4920)."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from orcd_jax.config_files import read_private, read_small, refusal
from orcd_jax.errors import OrcdError

_CERTIFICATE, _KEY, _CLIENT_CA = "tls_cert_file", "tls_key_file", "tls_client_ca_file"
_MAX_KEY_BYTES = 64 * 1024
_MAX_CERTIFICATES_BYTES = 2**20
# Of TLS 1.2; HTTP/2 forbids the others. TLS 1.3 has only good ones.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server shows its clients and asks of them, as it was read from files.

    Attributes:
      context: for new connections.
      digest: SHA-256 over all certificates, those of the clients' authorities included: tells whether any changed.
      fingerprint: SHA-256 of the server's own certificate, 64 hex digits, as other tools show it.
      valid_until: of the server's own certificate.
    """

    context: ssl.SSLContext
    digest: bytes
    fingerprint: str
    valid_until: datetime


def read_tls(cert_file: Path, key_file: Path, client_ca_file: Path | None = None) -> ServerTls:
    """TLS 1.3, or 1.2 with a client that has no better, for HTTP/2 and nothing else.

    Args:
      cert_file: PEM, the server's certificate first and those of its issuers after it.
      key_file: PEM, the certificate's private key, not encrypted, usable by its owner only.
      client_ca_file: PEM, authorities; clients need a certificate of one of them (mutual TLS). None: clients need none.

    Raises:
      OrcdError: INVALID_PARAMS, saying what is wrong with which file and what to do.
    """
    certificates = _certificates(cert_file, _CERTIFICATE)
    key = _public_key(key_file)
    if _spki(key) != _spki(certificates[0].public_key()):
        raise refusal(_KEY, f"it is not the key of the first certificate of --{_CERTIFICATE}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(cert_file, key_file)
    except (ssl.SSLError, OSError) as error:
        raise refusal(_CERTIFICATE, f"OpenSSL refuses it or its key ({_reason(error)})") from None
    authorities: list[x509.Certificate] = []
    if client_ca_file is not None:
        authorities = _certificates(client_ca_file, _CLIENT_CA)
        try:
            context.load_verify_locations(client_ca_file)
        except (ssl.SSLError, OSError) as error:
            raise refusal(_CLIENT_CA, f"OpenSSL refuses it ({_reason(error)})") from None
        context.verify_mode = ssl.CERT_REQUIRED
    read = hashlib.sha256(len(certificates).to_bytes(4))
    for certificate in (*certificates, *authorities):
        read.update(certificate.fingerprint(SHA256()))
    own = certificates[0]
    return ServerTls(context, read.digest(), own.fingerprint(SHA256()).hex(), own.not_valid_after_utc)


def server_context(cert_file: Path, key_file: Path, client_ca_file: Path | None = None) -> ssl.SSLContext:
    """The context of :func:`read_tls`."""
    return read_tls(cert_file, key_file, client_ca_file).context


def _certificates(path: Path, flag: str) -> list[x509.Certificate]:
    """The certificates of a file, all valid today."""
    data = read_small(path, flag, _MAX_CERTIFICATES_BYTES)
    try:
        certificates = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise refusal(flag, "it holds no certificate, or one that is damaged; it must be PEM") from None
    now = datetime.now(UTC)
    for number, certificate in enumerate(certificates, 1):
        if certificate.not_valid_after_utc < now:
            raise refusal(
                flag,
                f"certificate {number} has expired ({certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC); renew it",
            )
        if certificate.not_valid_before_utc > now:
            raise refusal(
                flag,
                f"certificate {number} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on only",
            )
    return certificates


def _public_key(path: Path) -> PublicKeyTypes:
    """The public half of the key in a private file."""
    text = read_private(path, _KEY, _MAX_KEY_BYTES)
    try:
        return load_pem_private_key(text.encode(), password=None).public_key()
    except TypeError:
        raise refusal(_KEY, "it is encrypted; the worker asks nobody for a password: store it without one") from None
    except Exception:  # whatever it says may hold a part of the key
        raise _no_key() from None


def _no_key() -> OrcdError:
    return refusal(_KEY, "it holds no private key that can be read; it must be PEM")


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or type(error).__name__
