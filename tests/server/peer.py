"""An independent peer: the official gRPC client, with messages made from nothing but the published descriptors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import grpc
from google.protobuf import (  # type: ignore[import-untyped]  # it ships none
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

from orcd_jax.api.descriptors import FILE_DESCRIPTOR_SET
from tests.server.fake_worker import CONTROL_TOKEN, TOKEN, WAIT_S

PACKAGE = "orcd.worker.v1"

CONTROL_METHODS = frozenset({"Plan", "Commit", "Attest", "GetStatus", "Drain", "Shutdown"})

Metadata = Sequence[tuple[str, str]]


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(FILE_DESCRIPTOR_SET).file:
        pool.Add(file)
    return pool


POOL = _pool()
SERVICE = POOL.FindServiceByName(f"{PACKAGE}.Worker")


def descriptor(name: str) -> Any:
    """The descriptor of a message: ``ExecuteRequest``, or with its package."""
    return POOL.FindMessageTypeByName(name if "." in name else f"{PACKAGE}.{name}")


def message(name: str, /, **fields: Any) -> Any:
    """A message of the official library."""
    return message_factory.GetMessageClass(descriptor(name))(**fields)


def as_json(value: Any) -> dict[str, Any]:
    """Field name to value of a message, fields without presence included."""
    return {
        field.name: getattr(value, field.name)
        for field in value.DESCRIPTOR.fields
        if not field.has_presence or value.HasField(field.name)
    }


def bearer(token: str = TOKEN) -> Metadata:
    """The metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


def bearer_for(method: str) -> Metadata:
    """The metadata that carries a token of the method's role."""
    return bearer(CONTROL_TOKEN if method in CONTROL_METHODS else TOKEN)


def enum_name(value: Any, field: str) -> str:
    """Name of the value that an enum field has."""
    return str(value.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(value, field)].name)


def details(error: grpc.RpcError) -> dict[str, Any]:
    """Full name to message of everything in a status's rich details."""
    status = message("google.rpc.Status")
    (raw,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    status.ParseFromString(raw)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found = {}
    for packed in status.details:
        name = packed.type_url.removeprefix("type.googleapis.com/")
        found[name] = message(name)
        assert packed.Unpack(found[name])
    return found


def error_detail(error: grpc.RpcError) -> Any:
    """The ErrorDetail of a failed call."""
    return details(error)[f"{PACKAGE}.ErrorDetail"]


class Peer:
    """A channel to the server, and calls over it."""

    def __init__(self, port: int, credentials: grpc.ChannelCredentials | None = None) -> None:
        # Not one of another test's: a library shares connections among channels that are configured alike.
        options = [("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        else:
            self.channel = grpc.secure_channel(f"localhost:{port}", credentials, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def unary(
        self, method: str, request: Any = None, *, metadata: Metadata | None = None, timeout: float | None = WAIT_S
    ) -> Any:
        """Calls a method that answers once; raises grpc.RpcError."""
        of = SERVICE.methods_by_name[method]
        assert not of.server_streaming
        call = self.channel.unary_unary(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=lambda value: value if isinstance(value, bytes) else value.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(of.output_type).FromString,
        )
        given = message(of.input_type.full_name) if request is None else request
        return call(given, metadata=bearer_for(method) if metadata is None else metadata, timeout=timeout)

    def stream(
        self, method: str, request: Any = None, *, metadata: Metadata | None = None, timeout: float | None = WAIT_S
    ) -> Any:
        """Begins a call of a method that streams; iterate for its events, ``cancel()`` to close it."""
        of = SERVICE.methods_by_name[method]
        assert of.server_streaming
        call = self.channel.unary_stream(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=lambda value: value if isinstance(value, bytes) else value.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(of.output_type).FromString,
        )
        given = message(of.input_type.full_name) if request is None else request
        return call(given, metadata=bearer_for(method) if metadata is None else metadata, timeout=timeout)

    def execute(self, *, metadata: Metadata | None = None, timeout: float | None = WAIT_S, **fields: Any) -> Any:
        """Begins a job: a valid one, but for ``fields``."""
        return self.stream("Execute", execute_request(**fields), metadata=metadata, timeout=timeout)

    def refusal_of(self, path: str, *, metadata: Metadata, body: bytes = b"") -> grpc.RpcError:
        """How a call of any path fails, its answer taken as bytes."""
        call = self.channel.stream_stream(path)(iter([body]), metadata=metadata, timeout=WAIT_S)
        return failure(call)


def execute_request(**fields: Any) -> Any:
    """A valid job, but for ``fields``; None leaves one out."""
    values: dict[str, Any] = {"job_id": "job", "max_tokens": 8}
    if not {"prompt_text", "prompt_token_ids", "chat"} & fields.keys():
        values["prompt_text"] = "hello"
    given = {**values, **fields}
    return message("ExecuteRequest", **{name: value for name, value in given.items() if value is not None})


def failure(call: Iterable[Any]) -> grpc.RpcError:
    """The error that a streaming call ends with before it answers anything."""
    events, error = outcome(call)
    assert events == []
    assert error is not None, "the call was answered"
    return error


def outcome(call: Iterable[Any]) -> tuple[list[Any], grpc.RpcError | None]:
    """All that a streaming call answers, and the error it ends with, if any."""
    events: list[Any] = []
    try:
        events.extend(event for event in call)
    except grpc.RpcError as error:
        return events, error
    return events, None
