"""The standard health service, told by the worker's lifecycle."""

from __future__ import annotations

from grpclib.health.check import ServiceStatus
from grpclib.health.service import OVERALL, Health

from orcd_jax.server.gate import Service
from orcd_jax.worker.lifecycle import Lifecycle, State


def health_service(lifecycle: Lifecycle, service: Service) -> Health:
    """SERVING while jobs are taken, for the worker's own service and for the process as a whole.

    Args:
      lifecycle: followed from now on, as long as it lives.
      service: whose name the status is given under, besides the empty one.
    """
    status = ServiceStatus()

    def follow(state: State) -> None:
        del state
        status.set(lifecycle.serving)

    follow(lifecycle.state)
    lifecycle.subscribe(follow)
    return Health({service: [status], OVERALL: [status]})
