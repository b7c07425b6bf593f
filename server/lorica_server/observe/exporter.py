"""The metrics endpoint: Prometheus text or OpenMetrics on its own port, on a daemon thread."""

from __future__ import annotations

import socket
import threading
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from lorica_server.errors import StartError
from lorica_server.options import split_address

_POLL_SECONDS = 0.1  # prometheus_client's own server looks twice a second whether to stop, and a stop waits for that


class Exporter:
    """Serves a registry from construction to `close`. `address` has the real port."""

    def __init__(self, registry: CollectorRegistry, address: str) -> None:
        host, port = split_address(address)
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            kind = type("_Server", (ThreadingWSGIServer,), {"address_family": family})
            self._server: WSGIServer = make_server(str(where[0]), port, make_wsgi_app(registry), kind, _Silent)
        except OSError as error:
            raise StartError(
                f"metrics_listen: cannot listen on {address}: {error.strerror}",
                remedy="choose another with --metrics-listen, or none",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="lorica-metrics", daemon=True
        )
        self._thread.start()
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no event."""
