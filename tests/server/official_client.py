"""The official health and reflection clients, as a process: their messages and grpclib's cannot live in one.

python -m tests.server.official_client watch PORT [SERVICE]      a line for each status
python -m tests.server.official_client check PORT [SERVICE]      one status, or the code of the refusal
python -m tests.server.official_client reflect PORT TOKEN        JSON of what reflection tells
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grpc

PACKAGE = "orcd.worker.v1"


def watch(channel: grpc.Channel, service: str = "") -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service)):
        print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status), flush=True)


def check(channel: grpc.Channel, service: str = "") -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    except grpc.RpcError as error:
        print(error.code().name)
    else:
        print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def reflect(channel: grpc.Channel, token: str) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool  # type: ignore[import-untyped]  # it ships none
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, _WithToken(token)))
    pool = DescriptorPool(database)
    service = pool.FindServiceByName(f"{PACKAGE}.Worker")
    status = pool.FindMessageTypeByName("google.rpc.Status")
    retry = pool.FindMessageTypeByName("google.rpc.RetryInfo")
    told = {
        "services": sorted(database.get_services()),
        "methods": {method.name: [method.input_type.name, method.output_type.name] for method in service.methods},
        "fields": [field.name for field in pool.FindMessageTypeByName(f"{PACKAGE}.ExecuteRequest").fields],
        "status": [field.name for field in status.fields],
        "retry": retry.fields_by_name["retry_delay"].message_type.full_name,
        "health": [method.name for method in pool.FindServiceByName("grpc.health.v1.Health").methods],
    }
    print(json.dumps(told))


class _WithToken(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Adds the token to every call of the reflection client, which takes no metadata itself."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    def intercept_stream_stream(self, call: Any, details: Any, requests: Any) -> Any:
        return call(details._replace(metadata=self._metadata), requests)


def main(arguments: Sequence[str]) -> None:
    command, port, *rest = arguments
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        commands: dict[str, Callable[..., None]] = {"watch": watch, "check": check, "reflect": reflect}
        commands[command](channel, *rest)


if __name__ == "__main__":
    main(sys.argv[1:])
