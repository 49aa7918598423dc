"""Bytes that are not what they should be are refused at once, and never reach the worker."""

from __future__ import annotations

import grpc
import pytest

from orcd_jax.server.limits import Limits
from tests.server.fake_worker import Served
from tests.server.peer import SERVICE, Peer, bearer_for, enum_name, error_detail, execute_request, failure, outcome
from tests.server.raw import Answer, Raw, framed

MAX_MESSAGE_BYTES = Limits().message_bytes
INVALID_ARGUMENT, UNIMPLEMENTED = grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.UNIMPLEMENTED.value[0]
VALID: bytes = execute_request().SerializeToString()
MALFORMED = {
    "noise": b"\xff",
    "a field cut off": b"\x0a\x05ab",
    "a varint without an end": b"\x80" * 11,
    "field number 0": b"\x00\x00",
    "the end of a group that never began": b"\x0c",
    "a string that is not UTF-8": b"\x0a\x01\xff",
    "a submessage cut off": b"\x4a\x02\x0a\x05",
}


def answer(served: Served, data: bytes, *, end: bool = True, method: str = "Execute") -> Answer:
    with Raw(served.port) as raw:
        raw.call(method)
        raw.send(data, end=end)
        return raw.answer()


@pytest.mark.requirement("WORKER-4300")
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_protobuf_is_an_invalid_argument(served: Served, peer: Peer, body: bytes) -> None:
    error = failure(peer.stream("Execute", body))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "malformed protobuf" in error.details()
    assert enum_name(error_detail(error), "code") == "ERROR_CODE_INVALID_PARAMS"
    assert served.worker.calls == 0


def test_malformed_protobuf_is_an_invalid_argument_for_every_method(served: Served, peer: Peer) -> None:
    for method in SERVICE.methods:
        error = peer.refusal_of(f"/{SERVICE.full_name}/{method.name}", metadata=bearer_for(method.name), body=b"\xff")
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, method.name
    assert served.worker.calls == 0
    assert not served.shutdown.is_set()


def test_a_field_of_the_wrong_wire_type_is_as_good_as_missing(peer: Peer) -> None:
    job_id_as_integer = b"\x08\x01"
    error = failure(peer.stream("Execute", job_id_as_integer + execute_request(job_id="").SerializeToString()))
    assert error_detail(error).field == "job_id"


def test_unknown_fields_are_ignored(served: Served, peer: Peer) -> None:
    field_4000 = b"\x82\xfa\x01\x03abc"
    events, error = outcome(peer.stream("Execute", VALID + field_4000))
    assert error is None
    assert len(events) == 5


def test_of_two_members_of_a_oneof_the_last_one_counts(served: Served, peer: Peer) -> None:
    ids = b"\x4a\x04\x0a\x02\x07\x08"  # prompt_token_ids { ids: [7, 8] }
    outcome(peer.stream("Execute", VALID + ids))
    outcome(peer.stream("Execute", ids + VALID))
    assert [params.prompt for params, _ in served.worker.executed] == [(7, 8), "hello"]


# -- framing -----------------------------------------------------------------------------------------------------------


def test_a_message_of_the_largest_size_passes_and_one_byte_more_does_not(served: Served, peer: Peer) -> None:
    head = VALID + b"\x82\xfa\x01"  # field 4000
    size = MAX_MESSAGE_BYTES - len(head) - 4  # and four bytes for its length
    padded = head + bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21)) + bytes(size)
    assert len(padded) == MAX_MESSAGE_BYTES
    assert outcome(peer.stream("Execute", padded))[1] is None
    error = failure(peer.stream("Execute", padded + b"\x00"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"the message has {MAX_MESSAGE_BYTES + 1} bytes; the limit is {MAX_MESSAGE_BYTES}"


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES + 1, 2**31, 2**32 - 1])
def test_a_prefix_that_claims_too_much_is_refused_before_anything_follows(served: Served, size: int) -> None:
    refused = answer(served, framed(b"", size=size), end=False)
    assert refused.status == INVALID_ARGUMENT
    assert refused.said == f"the message has {size} bytes; the limit is {MAX_MESSAGE_BYTES}"


@pytest.mark.parametrize(
    "data",
    [framed(VALID, size=len(VALID) + 1), framed(b"", size=10), framed(VALID)[:3], framed(VALID)[:-1]],
    ids=["one byte less than the prefix says", "nothing after the prefix", "within the prefix", "within the message"],
)
def test_a_call_that_ends_within_a_message_is_refused(served: Served, data: bytes) -> None:
    refused = answer(served, data)
    assert (refused.status, refused.said) == (INVALID_ARGUMENT, "the message is cut off")
    assert served.worker.calls == 0


def test_a_call_without_a_message_is_refused(served: Served) -> None:
    refused = answer(served, b"")
    assert (refused.status, refused.said) == (INVALID_ARGUMENT, "the call holds no message")


def test_an_empty_message_is_one(served: Served) -> None:
    answered = answer(served, framed(b""), method="Ready")
    assert answered.status == 0
    assert answered.data


def test_a_message_that_comes_in_pieces_is_put_together(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.call("Execute")
        for byte in framed(VALID):
            raw.send(bytes([byte]))
        raw.send(end=True)
        assert raw.answer().status == 0


def test_a_compressed_message_is_refused(served: Served) -> None:
    refused = answer(served, framed(VALID, flag=1), end=False)
    assert refused.status == UNIMPLEMENTED
    assert "compressed messages are not accepted" in refused.said
    assert served.worker.calls == 0


def test_a_job_may_begin_before_the_client_ends_its_side(served: Served) -> None:
    assert answer(served, framed(VALID), end=False).status == 0
