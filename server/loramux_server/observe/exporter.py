"""What is served over HTTP, on a port of its own and a daemon thread: metrics, liveness, readiness.

Prometheus text or OpenMetrics on /metrics; /healthz and /readyz as Kubernetes probes them.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from loramux_server.errors import StartError
from loramux_server.options import split_address

_POLL_SECONDS = 0.1  # prometheus_client's own server looks twice a second whether to stop, and a stop waits for that
_PATHS = "/metrics, /healthz and /readyz"

Respond = Callable[[str, list[tuple[str, str]]], Any]


@dataclass(frozen=True)
class Probes:
    """What the probes ask. Called on the exporter's threads."""

    is_alive: Callable[[], bool] = lambda: True  # false: only a new process helps
    is_ready: Callable[[], bool] = lambda: True  # false: send no requests now


class Exporter:
    """Answers from construction to `close`. `address` has the real port."""

    def __init__(self, registry: CollectorRegistry, address: str, probes: Probes | None = None) -> None:
        host, port = split_address(address)
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            kind = type("_Server", (ThreadingWSGIServer,), {"address_family": family})
            pages = _Pages(registry, probes or Probes())
            self._server: WSGIServer = make_server(str(where[0]), port, pages, kind, _Silent)
        except OSError as error:
            raise StartError(
                f"metrics_listen: cannot listen on {address}: {error.strerror}",
                remedy="choose another with --metrics-listen, or none",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="loramux-metrics", daemon=True
        )
        self._thread.start()
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Pages:
    """The WSGI application. HEAD is GET without the body."""

    def __init__(self, registry: CollectorRegistry, probes: Probes) -> None:
        self._metrics = make_wsgi_app(registry)
        self._probes = probes

    def __call__(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        without_body = environ["REQUEST_METHOD"] == "HEAD"
        if without_body:
            environ = {**environ, "REQUEST_METHOD": "GET"}
        body = self._get(environ, respond)
        return [] if without_body else body

    def _get(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                metrics: Iterable[bytes] = self._metrics(environ, respond)
                return metrics
            case _ if environ["REQUEST_METHOD"] not in ("GET", "OPTIONS"):
                return _text(respond, "405 Method Not Allowed", "use GET or HEAD", ("Allow", "GET, HEAD, OPTIONS"))
            case "/healthz":
                alive = self._probes.is_alive()
                return _text(respond, *(("200 OK", "ok") if alive else ("503 Service Unavailable", "not alive")))
            case "/readyz":
                ready = self._probes.is_ready()
                return _text(respond, *(("200 OK", "ok") if ready else ("503 Service Unavailable", "not serving")))
            case _:
                return _text(respond, "404 Not Found", f"not found; there are {_PATHS}")


def _text(respond: Respond, status: str, text: str, *headers: tuple[str, str]) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    respond(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *headers])
    return [body]


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A scrape is not worth a line."""
