"""``orcd attest``: a proof that holds is shown, one that is wrong in anything is refused."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orcd_jax.cli import connection, lifecycle
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.residency.attestation import Attestation, AttestedHandle, sign_attestation
from orcd_jax.residency.keys import IdentityKey
from orcd_jax.worker.types import AttestInfo
from tests.cli.conftest import Orcd, table
from tests.server.fake_worker import HANDLE, Served

Change = Callable[[Attestation], Attestation]
FINGERPRINT = "f" * 64


@dataclasses.dataclass
class Prover:
    """A worker that attests with a real key, and may be made to lie.

    Attributes:
      before: changes the statement before it is signed.
      after: changes it afterwards.
    """

    key: IdentityKey
    before: Change = lambda statement: statement
    after: Change = lambda statement: statement
    signature: bytes | None = None
    asked: list[tuple[bytes, str]] = dataclasses.field(default_factory=list)

    async def attest(self, nonce: bytes, handle_id: str) -> AttestInfo:
        self.asked.append((nonce, handle_id))
        now = time.time_ns() // 1_000_000
        stated = self.before(
            Attestation(
                handle=AttestedHandle.of(HANDLE),
                worker_id="w1",
                pool_id="p1",
                digest=HANDLE.digest,
                digest_began_at_ms=now - 1500,
                digest_ended_at_ms=now,
                nonce=nonce,
                executable_fingerprint=FINGERPRINT,
            )
        )
        signature = sign_attestation(self.key, stated) if self.signature is None else self.signature
        told = self.after(stated)
        return AttestInfo(
            handle=dataclasses.replace(HANDLE, **dataclasses.asdict(told.handle)),
            digest=told.digest,
            digest_began_at_ms=told.digest_began_at_ms,
            digest_ended_at_ms=told.digest_ended_at_ms,
            nonce=told.nonce,
            executable_fingerprint=told.executable_fingerprint,
            signature=signature,
            public_key=self.key.public_bytes,
            worker_id=told.worker_id,
            pool_id=told.pool_id,
        )


@pytest.fixture
def prover(served: Served, monkeypatch: pytest.MonkeyPatch) -> Prover:
    made = Prover(IdentityKey(Ed25519PrivateKey.generate()))
    monkeypatch.setattr(served.worker, "attest", made.attest)
    return made


def lie(**fields: object) -> Change:
    return lambda statement: dataclasses.replace(statement, **fields)  # type: ignore[arg-type]


def earlier(milliseconds: int) -> Change:
    return lambda statement: dataclasses.replace(
        statement,
        digest_began_at_ms=statement.digest_began_at_ms - milliseconds,
        digest_ended_at_ms=statement.digest_ended_at_ms - milliseconds,
    )


def unsealed(statement: Attestation) -> Attestation:
    return dataclasses.replace(statement, handle=dataclasses.replace(statement.handle, sealed=False))


@pytest.mark.requirement("WORKER-4255")
def test_a_correct_attestation_holds_and_says_what_was_not_compared(orcd: Orcd, prover: Prover) -> None:
    shown = orcd("attest")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    rows = table(shown.out)
    assert list(rows) == ["model", "digest", "proved", "handle", "memory", "programs", "worker", "key", "holds"]
    assert rows["digest"] == "d" * 64 + " (compared with none of yours; see --expected_digest)"
    assert rows["proved"].startswith("every byte, in 1.5 s, from 20")
    assert rows["worker"] == "w1 of pool p1"
    assert rows["key"] == f"{prover.key.public_bytes.hex()} (by its own word; see --identity)"
    assert rows["holds"].startswith("yes")


@pytest.mark.requirement("WORKER-4255")
def test_what_is_known_beforehand_is_compared_and_said(orcd: Orcd, prover: Prover) -> None:
    key = prover.key.public_bytes.hex()
    known = (f"--identity={key.upper()}", f"--expected_digest={'d' * 64}", "--handle_id=h-1", "--pool_id=p1")
    shown = orcd("attest", *known)
    assert shown.code is ExitCode.OK
    rows = table(shown.out)
    assert (rows["digest"], rows["key"]) == ("d" * 64 + " (as expected)", f"{key} (the one given)")
    told = json.loads(orcd("attest", "--json", *known).out)
    assert (told["holds"], told["key_was_known"], told["digest_was_known"]) == (True, True, True)
    assert told["executable_fingerprint"] == FINGERPRINT
    assert [handle for _, handle in prover.asked] == ["h-1", "h-1"]


@pytest.mark.requirement("WORKER-4255")
def test_each_call_has_a_nonce_of_its_own(orcd: Orcd, prover: Prover) -> None:
    orcd("attest")
    orcd("attest")
    nonces = {nonce for nonce, _ in prover.asked}
    assert {len(nonce) for nonce in nonces} == {32}
    assert len(nonces) == 2


OLD = lifecycle.MAX_AGE_MS + 1000


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.parametrize(
    ("before", "field"),
    [
        (lie(nonce=b"n" * 32), "nonce"),
        (lie(digest="e" * 64), "digest"),
        (unsealed, "handle.sealed"),
        (earlier(OLD), "digest_began_at_ms"),
        (earlier(-OLD), "digest_ended_at_ms"),
        (lie(digest_ended_at_ms=1), "digest_ended_at_ms"),
    ],
    ids=["another nonce", "another digest", "not sealed", "old", "of the future", "ended before it began"],
)
def test_what_is_signed_and_wrong_does_not_hold(orcd: Orcd, prover: Prover, before: Change, field: str) -> None:
    prover.before = before
    assert_refused(orcd, field)


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.parametrize(
    "change",
    [
        lie(nonce=b"n" * 32),
        lie(digest="e" * 64),
        lie(worker_id="w2"),
        lie(pool_id="p2"),
        lie(executable_fingerprint="e" * 64),
        earlier(1),
    ],
    ids=["nonce", "digest", "worker", "pool", "programs", "times"],
)
def test_what_was_changed_after_it_was_signed_does_not_hold(orcd: Orcd, prover: Prover, change: Change) -> None:
    prover.after = change
    assert_refused(orcd, "signature")


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.parametrize("signature", [b"", b"s" * 64])
def test_a_signature_that_is_none_does_not_hold(orcd: Orcd, prover: Prover, signature: bytes) -> None:
    prover.signature = signature
    assert_refused(orcd, "signature")


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.parametrize(
    ("flag", "field"),
    [
        (f"--identity={IdentityKey(Ed25519PrivateKey.generate()).public_bytes.hex()}", "signature"),
        (f"--expected_digest={'e' * 64}", "digest"),
        ("--pool_id=p2", "pool_id"),
        ("--handle_id=h-2", "handle_id"),
    ],
    ids=["identity", "digest", "pool", "handle"],
)
def test_a_good_one_of_something_else_does_not_hold(orcd: Orcd, prover: Prover, flag: str, field: str) -> None:
    assert prover.asked == []
    assert_refused(orcd, field, flag)


def assert_refused(orcd: Orcd, field: str, *flags: str) -> None:
    shown = orcd("attest", *flags)
    assert (shown.code, shown.out) == (ExitCode.FAILED, "")
    assert shown.err.startswith("error: SEAL_VERIFICATION_FAILED: the attestation does not hold: ")
    event = json.loads(orcd("attest", "--json", *flags).out)
    assert (event["event"], event["code"], event["field"]) == ("error", "SEAL_VERIFICATION_FAILED", field)


@pytest.mark.requirement("WORKER-4255")
def test_a_worker_that_does_not_attest_is_a_failure(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(nonce: bytes, handle_id: str) -> AttestInfo:
        raise OrcdError(ErrorCode.NOT_READY, "nothing is loaded", retry_after_ms=1000)

    monkeypatch.setattr(served.worker, "attest", refuse)
    shown = orcd("attest")
    assert (shown.code, shown.out) == (ExitCode.FAILED, "")
    assert shown.err == "error: NOT_READY: nothing is loaded (try again in 1.0 s)\n"


def test_a_proof_may_take_longer_than_an_answer_from_memory(
    orcd: Orcd, prover: Prover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 1e-6)
    assert orcd("ready").code is ExitCode.UNREACHABLE
    assert orcd("attest").code is ExitCode.OK
    assert prover.asked
