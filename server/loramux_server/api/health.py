"""grpc.health.v1 whole: the reference servicer answers Check and Watch, and List by an exception."""

# ruff: noqa: N802 -- methods are named by the contract

from __future__ import annotations

from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """The reference servicer with List."""

    async def List(
        self, request: health_pb2.HealthListRequest, context: aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        """The status of every service that Check knows."""
        statuses = {
            service: health_pb2.HealthCheckResponse(status=status) for service, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)
