"""The gRPC server itself: options, health, reflection, and the order of a stop.

Knows the services only as things to register; what they do is theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loramux_protos.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from loramux_server.api.former_service import FormerService
from loramux_server.api.gate import Gate, Services
from loramux_server.api.health import HealthServicer
from loramux_server.api.interceptors import ErrorInterceptor, Observe
from loramux_server.api.running_calls import RunningCalls
from loramux_server.errors import StartError
from loramux_server.options import is_unix, unix_path

_WINDOW_BYTES = 4 << 20  # 80 MB/s at a round trip of 50 ms
_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)


@dataclass(frozen=True)
class GrpcOptions:
    """How the transport behaves. Seconds and bytes."""

    address: str
    max_message_bytes: int = 4 << 20
    stall_seconds: float = 30.0


@dataclass(frozen=True)
class Shutdown:
    """How long each step of the one sequence of a stop may take, in seconds.

    `readiness_seconds`: health says NOT_SERVING and new work is still accepted, until load balancers have noticed.
    `drain_seconds`: running work may end by itself. `flush_seconds`: last messages may reach clients.
    `keeps_port`: the port is left to the end of the process. Until then new calls are refused; gRPC's own stop would
    end with CANCELLED those that it has accepted and not handed over.
    """

    readiness_seconds: float = 0.0
    drain_seconds: float = 0.0
    flush_seconds: float = 2.0
    keeps_port: bool = False


class GrpcServer:
    """Listens from `start`, serves from `open`, and ends with `shut_down`."""

    def __init__(
        self,
        options: GrpcOptions,
        gate: Gate,
        inference: inference_pb2_grpc.InferenceServiceServicer,
        adapters: adapters_pb2_grpc.AdapterServiceServicer,
        observe: Observe | None = None,
    ) -> None:
        self._options = options
        self._gate = gate
        self._calls = RunningCalls()
        self._server = aio.server(
            interceptors=[ErrorInterceptor(observe, options.stall_seconds, self._calls)],
            options=_channel_options(options.max_message_bytes),
        )
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._server.add_generic_rpc_handlers((FormerService(),))
        self.address = options.address

    async def start(self) -> None:
        """Listen; health says NOT_SERVING. Raises StartError when the address is taken."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self._server.add_insecure_port(self._options.address)
        except RuntimeError as error:
            raise StartError(
                f"listen: cannot listen on {self._options.address}", remedy="choose another address with --listen"
            ) from error
        if not is_unix(self._options.address):
            host = self._options.address.rpartition(":")[0]
            self.address = f"{host}:{port}"
        await self._server.start()

    async def open(self, services: Services) -> None:
        """The engine is warm: accept work and say SERVING."""
        self._gate.open(services)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def refuse_work(self) -> None:
        """Say NOT_SERVING and refuse new work, at once; running calls go on."""
        self._gate.drain()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def shut_down(self, shutdown: Shutdown, end_work: Callable[[float], Awaitable[None]] | None = None) -> int:
        """Say NOT_SERVING, wait the readiness period, refuse new work while running work ends, close.

        Returns the number of calls that were ended before their answer, those without an end of their own aside.

        `end_work(seconds)` waits for the engine to become idle and aborts what is left after `seconds`; None where no
        engine is left to end work. The calls then end with their last message, those that are left with UNAVAILABLE.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._gate.is_open and shutdown.readiness_seconds:
            await asyncio.sleep(shutdown.readiness_seconds)
        self._gate.drain()
        if end_work is not None:
            await end_work(shutdown.drain_seconds)
        cut_off = await self._calls.end(shutdown.flush_seconds)
        if shutdown.keeps_port:
            _remove_socket(self.address)
        else:
            await self._server.stop(None)
        return cut_off

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for service in ("", *_SERVICES):
            await self._health.set(service, status)


def _remove_socket(address: str) -> None:
    """As gRPC does at its stop."""
    if is_unix(address):
        Path(unix_path(address)).unlink(missing_ok=True)


def _channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """`grpc.so_reuseport` 0: or a second server shares the port in silence.

    A fixed window for what a stream may send ahead: left to itself it grows to tens of megabytes for each upload.
    """
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.absolute_max_metadata_size", 32 << 10),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
    ]
