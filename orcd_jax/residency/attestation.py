r"""The attestation: what a worker states about its loaded weights when asked with a nonce, signed with its own key.

The signature is Ed25519 over

    "orcd-attestation-v1\0" ‖ canonical JSON of {handle, worker_id, pool_id, digest, digest_began_at_ms,
                                                digest_ended_at_ms, nonce, executable_fingerprint}

with the field names of the contract, ``handle`` as an object of its 13 fields and ``nonce`` in hex
(``docs/signatures.md``). It shows that a worker with this key read these weights from its device after the nonce was
chosen. The worker made the digest itself: it shows corruption and swapped weights, not a malicious host.

Nothing here needs a worker or a device, so that a client can verify.
"""

from __future__ import annotations

import hmac
from dataclasses import asdict, dataclass, fields

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from orcd_jax.checkpoint.manifest import canonical_json
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.keys import IdentityKey

DOMAIN = b"orcd-attestation-v1\0"
MIN_NONCE_BYTES = 16
MAX_NONCE_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestedHandle:
    """A handle as it is attested: the fields of the contract's ``ModelShardHandle`` (WORKER-4110)."""

    handle_id: str
    model_ref: str
    digest: str
    shard_id: str
    shard_index: int
    total_shards: int
    device_index: int
    device_uuid: str
    vram_bytes: int
    sealed: bool
    sealed_at_ms: int
    pinned: bool
    emulated: bool

    @classmethod
    def of(cls, handle: object) -> AttestedHandle:
        """The same fields of a worker's handle, or of the contract's message."""
        return cls(**{field.name: getattr(handle, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """One statement.

    Attributes:
      digest: of the weights, recomputed from the device for this statement: 64 hex digits.
      digest_began_at_ms, digest_ended_at_ms: when, by the worker's clock, in milliseconds since 1970.
      nonce: 16 to 64 bytes, chosen by who asked.
      executable_fingerprint: of the compiled programs and what made them: 64 hex digits.
    """

    handle: AttestedHandle
    worker_id: str
    pool_id: str
    digest: str
    digest_began_at_ms: int
    digest_ended_at_ms: int
    nonce: bytes
    executable_fingerprint: str

    def encode(self) -> bytes:
        """The bytes that are signed.

        Raises:
          ValueError: a string is not Unicode.
        """
        return DOMAIN + canonical_json({**asdict(self), "nonce": self.nonce.hex()})


def sign_attestation(identity: IdentityKey, statement: Attestation) -> bytes:
    """The worker's signature of ``statement``: 64 bytes."""
    return identity.sign(statement.encode())


def verify_attestation(
    public_key: bytes,
    statement: Attestation,
    signature: bytes,
    *,
    nonce: bytes,
    now_ms: int,
    expected_digest: str | None = None,
    max_age_ms: int | None = None,
) -> None:
    """Checks an attestation: that the worker made it, for this nonce, lately, and of the weights that are wanted.

    Args:
      public_key: the worker's, 32 raw bytes, from a source that is trusted: Ready, the callback or a list of one's own.
        One that came with the attestation shows nothing.
      statement: what is stated.
      signature: over it.
      nonce: the one that was sent with the request.
      now_ms: the verifier's clock, in milliseconds since 1970.
      expected_digest: the weights' digest, if it is known.
      max_age_ms: longest time since the worker began to read the weights; also how far its clock may be ahead.

    Raises:
      OrcdError: SEAL_VERIFICATION_FAILED; ``field`` names the part that is wrong. INVALID_PARAMS: ``public_key`` or
        ``nonce`` cannot be one.
    """
    if not MIN_NONCE_BYTES <= len(nonce) <= MAX_NONCE_BYTES:
        raise OrcdError(
            ErrorCode.INVALID_PARAMS,
            f"the nonce has {len(nonce)} bytes; it must have {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES} random ones",
            field="nonce",
        )
    if not _signed(public_key, statement, signature):
        raise _refused("signature", "it was not signed with the worker's key, or was changed since")
    if not hmac.compare_digest(statement.nonce, nonce):
        raise _refused("nonce", "it answers another nonce: it may be an old one, played again")
    if not statement.handle.sealed:
        raise _refused("handle.sealed", "the model is not sealed")
    if statement.digest != statement.handle.digest:
        raise _refused("digest", "the weights on the device are no longer those that were sealed")
    if expected_digest is not None and statement.digest != expected_digest:
        raise _refused("digest", f"the weights have the digest {statement.digest:.64}, not the one expected")
    _check_times(statement, now_ms, max_age_ms)


def _signed(public_key: bytes, statement: Attestation, signature: bytes) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError:
        raise OrcdError(
            ErrorCode.INVALID_PARAMS, "the public key is not one of Ed25519: 32 bytes", field="public_key"
        ) from None
    try:
        key.verify(signature, statement.encode())
    except (InvalidSignature, ValueError):  # the latter: a string that cannot have been signed
        return False
    return True


def _check_times(statement: Attestation, now_ms: int, max_age_ms: int | None) -> None:
    began, ended = statement.digest_began_at_ms, statement.digest_ended_at_ms
    if ended < began:
        raise _refused("digest_ended_at_ms", "the digest ended before it began: the worker's clock was set back")
    if max_age_ms is None:
        return
    if now_ms - began > max_age_ms:
        raise _refused(
            "digest_began_at_ms",
            f"the weights were read {now_ms - began} ms ago; the limit is {max_age_ms} ms (or the clocks differ)",
        )
    if ended - now_ms > max_age_ms:
        raise _refused(
            "digest_ended_at_ms",
            f"the worker's clock is {ended - now_ms} ms ahead; the limit is {max_age_ms} ms: set the clocks",
        )


def _refused(part: str, problem: str) -> OrcdError:
    return OrcdError(ErrorCode.SEAL_VERIFICATION_FAILED, f"the attestation's {part} is refused: {problem}", field=part)
