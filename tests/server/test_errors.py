"""Every error code, on the wire: one gRPC status, one name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orcd_jax.errors import ERRORS, ErrorCode, OrcdError
from tests.server.fake_worker import Served, play
from tests.server.peer import PACKAGE, POOL, Peer, details, enum_name, failure

PROTO = Path(__file__).parents[2] / "protos" / "orcd" / "worker" / "v1" / "worker.proto"
# "(STATUS)" at the end of the comment above each value.
DOCUMENTED = {
    name: status
    for status, name in re.findall(r"\(([A-Z_]+)\)\n\s+ERROR_CODE_(\w+) = \d+;", PROTO.read_text(encoding="utf-8"))
}


@pytest.mark.requirement("WORKER-4950")
def test_the_contract_and_the_table_have_the_same_codes_without_gaps() -> None:
    values = POOL.FindEnumTypeByName(f"{PACKAGE}.ErrorCode").values
    assert [value.number for value in values] == list(range(len(ErrorCode) + 1))
    assert {value.name for value in values} == {"ERROR_CODE_UNSPECIFIED"} | {f"ERROR_CODE_{code}" for code in ErrorCode}
    assert set(ERRORS) == set(ErrorCode)


@pytest.mark.requirement("WORKER-4950")
@pytest.mark.requirement("WORKER-4951")
@pytest.mark.parametrize("code", ErrorCode)
def test_a_code_arrives_as_its_documented_status_and_under_its_name(
    served: Served, peer: Peer, code: ErrorCode
) -> None:
    served.worker.script = play(OrcdError(code, "why"))
    error = failure(peer.execute())
    assert error.code().name == ERRORS[code].grpc == DOCUMENTED[code.value]
    found = details(error)
    detail = found[f"{PACKAGE}.ErrorDetail"]
    assert enum_name(detail, "code") == f"ERROR_CODE_{code}"
    assert (detail.message, detail.retriable) == ("why", ERRORS[code].retriable)
    assert found["google.rpc.ErrorInfo"].reason == code.value


def test_a_message_beyond_ascii_arrives_as_it_is(served: Served, peer: Peer) -> None:
    served.worker.script = play(OrcdError(ErrorCode.NOT_FOUND, "no “model” here: 100 %\nnone"))
    error = failure(peer.execute())
    assert error.details() == "no “model” here: 100 %\nnone"
    assert details(error)[f"{PACKAGE}.ErrorDetail"].message == error.details()
