"""Our messages hold what the official parser read, for every request there is."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]  # it ships none

from orcd_jax.api.orcd.worker import v1
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.codec import MalformedMessage, StrictCodec
from tests.server.peer import SERVICE, message

REQUESTS = [method.input_type.name for method in SERVICE.methods]
_NUMBERS = {
    FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    FieldDescriptor.CPPTYPE_DOUBLE: 0.25,
    FieldDescriptor.CPPTYPE_BOOL: True,
}


def fill(value: Any) -> Any:
    """Sets every field to something; of a oneof, the last."""
    for field in value.DESCRIPTOR.fields:
        old = getattr(value, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            old[3] = 0.5
        elif field.message_type is not None:
            fill(old.add() if hasattr(old, "add") else old)
        elif hasattr(old, "extend"):
            old.extend([example(field), example(field)])
        else:
            setattr(value, field.name, example(field))
    return value


def example(field: Any) -> object:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return b"bytes" if field.type == FieldDescriptor.TYPE_BYTES else "té"
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    return _NUMBERS.get(field.cpp_type, 7)


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_of_every_request_is_read(name: str) -> None:
    data = fill(message(name)).SerializeToString()
    expected = getattr(v1, name).FromString(data)
    read = StrictCodec().decode(data, getattr(v1, name))
    assert read == expected
    assert bytes(read) == data


@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_not_sent_is_not_set(name: str) -> None:
    assert StrictCodec().decode(b"", getattr(v1, name)) == getattr(v1, name)()


def test_a_value_that_an_enum_does_not_have_yet_is_kept() -> None:
    assert StrictCodec().decode(b"\x10\x63", v1.PlanRequest).shard_layout == 99


def test_an_empty_member_of_a_oneof_is_there() -> None:
    assert StrictCodec().decode(b"\x42\x00", v1.ExecuteRequest).prompt_text == ""
    assert StrictCodec().decode(b"\x4a\x00", v1.ExecuteRequest).prompt_token_ids == v1.TokenIds()


def test_what_is_not_a_message_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="ReadyRequest"):
        StrictCodec().decode(b"\xff", v1.ReadyRequest)


def test_a_million_token_ids_do_not_hold_the_event_loop() -> None:
    data = message("DetokenizeRequest", token_ids=[65] * 2**20).SerializeToString()
    began = time.process_time()
    StrictCodec().decode(data, v1.DetokenizeRequest)
    assert time.process_time() - began < 1.0  # 0.03 s; the generated parser takes 4 s


def test_a_million_messages_are_refused_before_they_are_copied() -> None:
    data = message("ExecuteRequest", chat={"messages": [{}] * 2**20}).SerializeToString()
    began = time.process_time()
    with pytest.raises(OrcdError, match="messages: 1048576 messages; there may be at most 16384") as caught:
        StrictCodec().decode(data, v1.ExecuteRequest)
    assert caught.value.code is ErrorCode.INVALID_PARAMS
    assert time.process_time() - began < 2.0
