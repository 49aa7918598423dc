"""TLS towards a worker: one context from PEM files, checked before anything is sent."""

from __future__ import annotations

import ssl
from typing import NoReturn

from orcd_jax.cli.values import UsageError, content

_CA, _CERTIFICATE, _KEY = "tls_ca_file", "tls_cert_file", "tls_key_file"
_MAX_BYTES = 2**20
WANTS_CERTIFICATE = f"it wants a certificate of yours: give --{_CERTIFICATE} and --{_KEY}"


def client_context(ca_file: str, cert_file: str | None = None, key_file: str | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer, for HTTP/2, with a worker whose certificate names its host and is of one of our authorities.

    Args:
      ca_file: PEM, the authorities, and no others.
      cert_file: PEM, the client's own certificate, for a worker that wants one (mutual TLS).
      key_file: PEM, the private key of that, not encrypted.

    Raises:
      UsageError: a file cannot be used.
    """
    if (cert_file is None) != (key_file is None):
        raise UsageError(f"--{_CERTIFICATE} and --{_KEY} go together: a certificate is of use with its key only")
    authorities = content(_CA, ca_file, _MAX_BYTES, "name the PEM file of the authority that signs for the worker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=authorities.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise UsageError(f"--{_CA}: {ca_file[:200]!r} holds no certificate, or a damaged one; it must be PEM") from None
    if cert_file is not None and key_file is not None:
        _load_own(context, cert_file, key_file)
    return context


def _load_own(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    content(_CERTIFICATE, cert_file, _MAX_BYTES, "name the PEM file of your own certificate")
    content(_KEY, key_file, _MAX_BYTES, f"name the PEM file of the key of --{_CERTIFICATE}")
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise UsageError(f"--{_KEY}: {key_file[:200]!r} is not the key of --{_CERTIFICATE}") from None
        raise UsageError(
            f"--{_CERTIFICATE} {cert_file[:200]!r} and --{_KEY} {key_file[:200]!r} hold no certificate and its key; "
            "they must be PEM"
        ) from None


def _no_password() -> NoReturn:
    """Instead of OpenSSL's own question at the terminal."""
    raise UsageError(f"--{_KEY}: it is encrypted; store it without a password, for its owner alone")


def reason(error: ssl.SSLError) -> str:
    """Why a handshake failed, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message.rstrip(".")
        return f"its certificate is refused ({said}): check --{_CA}, and that --address is a name in the certificate"
    said = error.reason or "no reason given"
    if "CERTIFICATE_REQUIRED" in said:
        return WANTS_CERTIFICATE
    if "ALERT" in said and ("CERTIFICATE" in said or "CA" in said.split("_")):
        return f"it refuses the certificate of --{_CERTIFICATE} ({said}): give one that it trusts"
    return f"TLS fails ({said}): if the worker has none, leave out --{_CA} and ORCD_TLS_CA_FILE"
