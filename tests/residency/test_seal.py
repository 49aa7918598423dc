"""The seal: what was proved at loading is known again, and nothing else passes for it."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.keys import SealKey
from orcd_jax.residency.seal import Seal, SealRecord, seal, verify

RECORD = SealRecord(
    shard_id="llama-0",
    digest="ab" * 32,
    sealed_at_ms=1_750_000_000_123,
    device_uuid="GPU-5f2c",
    executable_fingerprint="cd" * 32,
)
FIELDS = [field.name for field in dataclasses.fields(SealRecord)]
KEY = SealKey()

texts = st.text(max_size=40)
any_texts = st.text(st.characters(categories=None), max_size=40)  # lone surrogates too
times = st.integers(-1, 2**64)
records = st.builds(
    SealRecord, shard_id=texts, digest=texts, sealed_at_ms=times, device_uuid=texts, executable_fingerprint=texts
)


def refuse(key: SealKey, sealed: Seal) -> str:
    with pytest.raises(OrcdError) as caught:
        verify(key, sealed)
    assert (caught.value.code, caught.value.field) == (ErrorCode.SEAL_VERIFICATION_FAILED, "seal")
    return caught.value.message


@pytest.mark.requirement("WORKER-4120")
def test_a_seal_is_the_mac_that_its_description_says(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("07" * 32)
    path.chmod(0o600)
    text = (
        f'{{"device_uuid":"GPU-5f2c","digest":"{"ab" * 32}","executable_fingerprint":"{"cd" * 32}",'
        '"sealed_at_ms":1750000000123,"shard_id":"llama-0"}'
    )
    expected = hmac.new(b"\x07" * 32, b"orcd-seal-v1\0" + text.encode(), hashlib.sha256).digest()
    assert seal(SealKey.load(path), RECORD) == Seal(RECORD, expected)


@pytest.mark.requirement("WORKER-4120")
@settings(deadline=None)
@given(record=records)
def test_what_was_sealed_is_known_again(record: SealRecord) -> None:
    sealed = seal(KEY, record)
    verify(KEY, sealed)
    verify(KEY, Seal(dataclasses.replace(record), bytes(sealed.mac)))


@pytest.mark.requirement("WORKER-4120")
@settings(deadline=None)
@given(record=records, field=st.sampled_from(FIELDS), text=any_texts, time=times)
def test_a_change_of_any_field_is_refused(record: SealRecord, field: str, text: str, time: int) -> None:
    value: Any = time if field == "sealed_at_ms" else text
    changed = dataclasses.replace(record, **{field: value})
    if changed != record:
        refuse(KEY, Seal(changed, seal(KEY, record).mac))


@pytest.mark.requirement("WORKER-4120")
@settings(deadline=None)
@given(bit=st.integers(0, 255))
def test_a_change_of_any_bit_of_the_mac_is_refused(bit: int) -> None:
    mac = bytearray(seal(KEY, RECORD).mac)
    mac[bit // 8] ^= 1 << bit % 8
    refuse(KEY, Seal(RECORD, bytes(mac)))


@settings(deadline=None)
@given(mac=st.binary(max_size=80))
def test_no_other_mac_passes_whatever_its_length(mac: bytes) -> None:
    sealed = seal(KEY, RECORD)
    if mac != sealed.mac:
        refuse(KEY, Seal(RECORD, mac))
    for length in (0, 16, 31):
        refuse(KEY, Seal(RECORD, sealed.mac[:length]))
    refuse(KEY, Seal(RECORD, sealed.mac + b"\0"))


@pytest.mark.requirement("WORKER-4120")
def test_another_key_of_the_same_worker_does_not_open_it() -> None:
    refuse(SealKey(), seal(KEY, RECORD))


@settings(deadline=None)
@given(one=records, other=records)
def test_two_records_never_have_the_same_bytes(one: SealRecord, other: SealRecord) -> None:
    assert (one.encode() == other.encode()) == (one == other)


@pytest.mark.parametrize(("left", "right"), [("ab", "c"), ("a", "bc"), ("abc", ""), ('","', "x"), ("", '"abc')])
def test_text_that_moves_from_one_field_to_the_next_is_another_record(left: str, right: str) -> None:
    made = dataclasses.replace(RECORD, device_uuid="a", shard_id='b"c')
    refuse(KEY, Seal(dataclasses.replace(RECORD, device_uuid=left, shard_id=right), seal(KEY, made).mac))


def test_a_record_of_another_type_is_another_record() -> None:
    numbered = dataclasses.replace(RECORD, sealed_at_ms=1)
    said: object = json.loads("[true, 1.0]")
    assert isinstance(said, list)
    for value in said:
        refuse(KEY, Seal(dataclasses.replace(numbered, sealed_at_ms=value), seal(KEY, numbered).mac))


def test_an_empty_mac_of_a_record_that_cannot_be_encoded_is_refused() -> None:
    refuse(KEY, Seal(dataclasses.replace(RECORD, device_uuid="\ud800"), b""))


@pytest.mark.requirement("WORKER-4111")
def test_the_refusal_shows_neither_mac_nor_record() -> None:
    sealed = seal(KEY, RECORD)
    message = refuse(KEY, Seal(dataclasses.replace(RECORD, shard_id="other-shard"), sealed.mac))
    assert sealed.mac.hex() not in message
    assert "other-shard" not in message


@pytest.mark.requirement("WORKER-4120")
def test_macs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the time is constant is hmac.compare_digest's promise; that nothing else decides is shown here."""
    compared: list[tuple[bytes, bytes]] = []

    def note(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return True

    monkeypatch.setattr("hmac.compare_digest", note)
    verify(KEY, Seal(RECORD, b"wrong"))
    assert compared == [(seal(KEY, RECORD).mac, b"wrong")]
