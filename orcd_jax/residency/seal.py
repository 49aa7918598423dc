r"""The seal: a MAC that binds what was proved at loading, so that this process knows its own handle again.

The MAC is HMAC-SHA256, under the seal key, of

    "orcd-seal-v1\0" ‖ canonical JSON of {digest, device_uuid, executable_fingerprint, sealed_at_ms, shard_id}

Canonical JSON (``docs/checkpoint.md``) quotes every string, so no two records have the same bytes, and nothing else
that a key of this project authenticates begins with this prefix.
"""

from __future__ import annotations

import hmac
from dataclasses import asdict, dataclass

from orcd_jax.checkpoint.manifest import canonical_json
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.keys import SealKey

DOMAIN = b"orcd-seal-v1\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class SealRecord:
    """What is sealed (WORKER-4120).

    Attributes:
      shard_id: the shard's name.
      digest: of the weights, recomputed from the device: 64 hex digits.
      sealed_at_ms: milliseconds since 1970.
      device_uuid: the device's own; empty when it has none.
      executable_fingerprint: of the compiled programs and what made them: 64 hex digits.
    """

    shard_id: str
    digest: str
    sealed_at_ms: int
    device_uuid: str
    executable_fingerprint: str

    def encode(self) -> bytes:
        """The bytes that are authenticated.

        Raises:
          ValueError: a string is not Unicode.
        """
        return DOMAIN + canonical_json(asdict(self))


@dataclass(frozen=True, slots=True)
class Seal:
    """A record and the 32 bytes that authenticate it."""

    record: SealRecord
    mac: bytes


def seal(key: SealKey, record: SealRecord) -> Seal:
    """Seals ``record`` under ``key``."""
    return Seal(record, key.mac(record.encode()))


def verify(key: SealKey, sealed: Seal) -> None:
    """Checks that ``sealed`` is what :func:`seal` made under this key, in constant time.

    Raises:
      OrcdError: SEAL_VERIFICATION_FAILED, whatever part was changed.
    """
    if not _genuine(key, sealed):
        raise OrcdError(
            ErrorCode.SEAL_VERIFICATION_FAILED,
            "the seal does not fit what is loaded: the handle was changed, or another process sealed it: load it again",
            field="seal",
        )


def _genuine(key: SealKey, sealed: Seal) -> bool:
    try:
        return hmac.compare_digest(key.mac(sealed.record.encode()), sealed.mac)
    except ValueError:  # not even encodable: nothing that was sealed
        return False
