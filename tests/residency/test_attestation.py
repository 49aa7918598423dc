"""Attestations: anyone can check them from the documents alone, and every changed part is refused by its name."""

from __future__ import annotations

import dataclasses
import json
from operator import attrgetter
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.api.orcd.worker import v1
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.attestation import Attestation, AttestedHandle, sign_attestation, verify_attestation
from orcd_jax.residency.keys import IdentityKey

NOW_MS = 1_750_000_060_000
NONCE = bytes(range(16))
DIGEST = "ab" * 32
IDENTITY = IdentityKey(Ed25519PrivateKey.generate())
HANDLE = AttestedHandle(
    handle_id="h-1",
    model_ref="file:/models/llama",
    digest=DIGEST,
    shard_id="llama-0",
    shard_index=0,
    total_shards=1,
    device_index=0,
    device_uuid="GPU-5f2c",
    vram_bytes=16_060_522_496,
    sealed=True,
    sealed_at_ms=NOW_MS - 60_000,
    pinned=True,
    emulated=False,
)
STATEMENT = Attestation(
    handle=HANDLE,
    worker_id="w-1",
    pool_id="p-1",
    digest=DIGEST,
    digest_began_at_ms=NOW_MS - 1000,
    digest_ended_at_ms=NOW_MS - 900,
    nonce=NONCE,
    executable_fingerprint="cd" * 32,
)
HANDLE_FIELDS = [field.name for field in dataclasses.fields(AttestedHandle)]
OWN_FIELDS = [field.name for field in dataclasses.fields(Attestation) if field.name != "handle"]


def check(
    statement: Attestation = STATEMENT,
    signature: bytes | None = None,
    *,
    public_key: bytes = IDENTITY.public_bytes,
    nonce: bytes = NONCE,
    expected_digest: str | None = DIGEST,
    max_age_ms: int | None = 5000,
    now_ms: int = NOW_MS,
) -> None:
    verify_attestation(
        public_key,
        statement,
        sign_attestation(IDENTITY, statement) if signature is None else signature,
        nonce=nonce,
        expected_digest=expected_digest,
        max_age_ms=max_age_ms,
        now_ms=now_ms,
    )


def refused(part: str, code: ErrorCode = ErrorCode.SEAL_VERIFICATION_FAILED, **how: Any) -> str:
    with pytest.raises(OrcdError) as caught:
        check(**how)
    assert (caught.value.code, caught.value.field) == (code, part)
    return caught.value.message


def changed(name: str, value: Any) -> Attestation:
    """The statement with one field changed, of its handle if the name begins with ``handle.``."""
    of, _, bare = name.rpartition(".")
    if of:
        return dataclasses.replace(STATEMENT, handle=dataclasses.replace(HANDLE, **{bare: value}))
    return dataclasses.replace(STATEMENT, **{bare: value})


def another(value: object) -> list[object]:
    """Values that are near to ``value``, and of its type, but not it."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2 + 3, 0 if value else 2**63]
    if isinstance(value, bytes):
        return [value[:-1], value + b"\0", bytes(len(value))]
    assert isinstance(value, str)
    return [value.upper() if value.upper() != value else "x", value + " ", "", "\ud800"]


@pytest.mark.requirement("WORKER-4255")
def test_a_true_attestation_passes() -> None:
    check()
    check(expected_digest=None, max_age_ms=None)


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.requirement("WORKER-4110")
def test_it_can_be_checked_from_the_documents_with_an_ed25519_library_alone() -> None:
    text = (
        f'{{"digest":"{DIGEST}","digest_began_at_ms":{NOW_MS - 1000},"digest_ended_at_ms":{NOW_MS - 900},'
        f'"executable_fingerprint":"{"cd" * 32}","handle":{{"device_index":0,"device_uuid":"GPU-5f2c",'
        f'"digest":"{DIGEST}","emulated":false,"handle_id":"h-1","model_ref":"file:/models/llama","pinned":true,'
        f'"sealed":true,"sealed_at_ms":{NOW_MS - 60_000},"shard_id":"llama-0","shard_index":0,"total_shards":1,'
        '"vram_bytes":16060522496},"nonce":"000102030405060708090a0b0c0d0e0f","pool_id":"p-1","worker_id":"w-1"}'
    )
    key = Ed25519PublicKey.from_public_bytes(IDENTITY.public_bytes)
    key.verify(sign_attestation(IDENTITY, STATEMENT), b"orcd-attestation-v1\0" + text.encode())


@pytest.mark.requirement("WORKER-4110")
def test_every_field_of_the_contracts_handle_is_attested() -> None:
    message = v1.ModelShardHandle(**dataclasses.asdict(HANDLE))
    assert AttestedHandle.of(message) == HANDLE
    assert set(HANDLE_FIELDS) == set(v1.ModelShardHandle.__annotations__)
    stated = json.loads(STATEMENT.encode().partition(b"\0")[2])
    assert set(stated["handle"]) == set(HANDLE_FIELDS)
    assert set(stated) == {"handle", *OWN_FIELDS}


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.parametrize("name", [*OWN_FIELDS, *(f"handle.{name}" for name in HANDLE_FIELDS)])
def test_a_change_of_any_field_breaks_the_signature(name: str) -> None:
    signature = sign_attestation(IDENTITY, STATEMENT)
    for value in another(attrgetter(name)(STATEMENT)):
        refused("signature", statement=changed(name, value), signature=signature)


@pytest.mark.requirement("WORKER-4255")
@settings(deadline=None)
@given(bit=st.integers(0, 511))
def test_a_change_of_any_bit_of_the_signature_is_refused(bit: int) -> None:
    signature = bytearray(sign_attestation(IDENTITY, STATEMENT))
    signature[bit // 8] ^= 1 << bit % 8
    refused("signature", signature=bytes(signature))


@settings(deadline=None)
@given(signature=st.binary(max_size=130))
def test_noise_is_no_signature(signature: bytes) -> None:
    refused("signature", signature=signature)


@pytest.mark.requirement("WORKER-4120")
def test_another_workers_key_is_refused_and_what_is_no_key_is_said_to_be_none() -> None:
    refused("signature", public_key=IdentityKey(Ed25519PrivateKey.generate()).public_bytes)
    for data in (b"", IDENTITY.public_bytes[:-1], IDENTITY.public_bytes + b"\0"):
        assert "32 bytes" in refused("public_key", ErrorCode.INVALID_PARAMS, public_key=data)


def test_what_else_the_identity_signs_is_no_attestation() -> None:
    body = STATEMENT.encode().partition(b"\0")[2]
    for prefix in (b"", b"orcd-receipt-v1\0", b"orcd-checkpoint-signature-v1\0", b"orcd-attestation-v1"):
        refused("signature", signature=IDENTITY.sign(prefix + body))


# Below, the worker itself signed what is refused.


@pytest.mark.requirement("WORKER-4255")
def test_an_answer_to_another_nonce_is_refused() -> None:
    assert "another nonce" in refused("nonce", nonce=bytes(16))
    refused("nonce", nonce=NONCE + b"\0")
    check(changed("nonce", bytes(64)), nonce=bytes(64))


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.parametrize("size", [0, 1, 15, 65])
def test_a_nonce_that_could_be_guessed_or_is_too_long_is_no_nonce(size: int) -> None:
    message = refused("nonce", ErrorCode.INVALID_PARAMS, statement=changed("nonce", bytes(size)), nonce=bytes(size))
    assert f"{size} bytes; it must have 16 to 64" in message


@pytest.mark.requirement("WORKER-4255")
def test_weights_that_are_no_longer_the_sealed_ones_are_refused() -> None:
    assert "no longer" in refused("digest", statement=changed("digest", "ef" * 32), expected_digest=None)


@pytest.mark.requirement("WORKER-4255")
def test_other_weights_than_those_expected_are_refused() -> None:
    assert DIGEST in refused("digest", expected_digest="ef" * 32)


def test_a_model_that_is_not_sealed_is_refused() -> None:
    refused("handle.sealed", statement=changed("handle.sealed", False))


@pytest.mark.requirement("WORKER-4255")
def test_its_age_counts_from_the_first_byte_that_was_read() -> None:
    check(max_age_ms=1000)
    assert "1000 ms ago; the limit is 999 ms" in refused("digest_began_at_ms", max_age_ms=999)
    check(max_age_ms=None, now_ms=NOW_MS + 10**12)


def test_a_clock_that_is_far_ahead_is_refused() -> None:
    check(max_age_ms=100, now_ms=NOW_MS - 1000)
    assert "101 ms ahead" in refused("digest_ended_at_ms", max_age_ms=100, now_ms=NOW_MS - 1001)


def test_a_digest_that_ended_before_it_began_is_refused() -> None:
    check(changed("digest_ended_at_ms", NOW_MS - 1000))
    for max_age_ms in (None, 5000):
        statement = changed("digest_ended_at_ms", NOW_MS - 1001)
        refused("digest_ended_at_ms", statement=statement, max_age_ms=max_age_ms)


def test_nothing_is_believed_before_the_signature() -> None:
    """Each part is wrong; the signature is what is named."""
    wrong = dataclasses.replace(
        STATEMENT,
        digest="ef" * 32,
        nonce=bytes(16),
        digest_ended_at_ms=0,
        handle=dataclasses.replace(HANDLE, sealed=False),
    )
    refused("signature", statement=wrong, signature=bytes(64))
