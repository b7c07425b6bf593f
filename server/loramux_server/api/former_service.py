"""The answer to clients from before the project was renamed: what their method is called now."""

from __future__ import annotations

from typing import Any

import grpc
from grpc import aio

from loramux_adapters.former_name import SERVICE_PREFIX


class FormerService(grpc.GenericRpcHandler):
    """Ends every call of the former protocol, of whatever shape, with UNIMPLEMENTED."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """A handler for methods of the former protocol, None for all others."""
        method = str(handler_call_details.method)
        if not method.startswith(SERVICE_PREFIX):
            return None
        present = f"/loramux.v1.{method.removeprefix(SERVICE_PREFIX)}"

        async def refuse(_requests: object, context: aio.ServicerContext[Any, Any]) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} was renamed to {present}: update the client")

        return grpc.stream_stream_rpc_method_handler(refuse)
