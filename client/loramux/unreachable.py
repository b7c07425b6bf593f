"""What gRPC's words about a connection mean to a caller, and what to do.

The words themselves stay in the error's metadata.
"""

from __future__ import annotations

import re

from loramux.channel import find_proxy, host_of

_TOO_LARGE = re.compile(r"(SERVER|CLIENT): (Received|Sent) message larger than max \((\d+) vs\. (\d+)\)")


def explain_transport(message: str, address: str) -> str:
    """One line for a terminal about a failure of the transport to `address`."""
    lowered = message.lower()
    scheme, separator, rest = address.partition("://")
    if separator and scheme in ("http", "https", "grpc", "grpcs"):
        return f"{address} is a URL: leave out {scheme}://, as in {rest.rstrip('/')}"
    if "wrong_version_number" in lowered:
        return f"the server at {address} does not speak TLS; connect without credentials"
    if "certificate_verify_failed" in lowered:
        return f"the certificate of the server at {address} is not trusted; give its authority's in the credentials"
    if "hostname verification" in lowered:
        return f"the certificate of the server at {address} is for another host name"
    if "handshake failed" in lowered:
        return f"the TLS handshake with the server at {address} failed: {message}"
    if "http1.x" in lowered:
        return f"what listens at {address} speaks HTTP/1, not gRPC; is it the port of the metrics?"
    if "resol" in lowered or "dns" in lowered:
        return f"the host of {address} is unknown"
    if "connect" in lowered and "reset" not in lowered:
        return _unreachable(lowered, address)
    return f"the connection to the server at {address} broke: {message}"


def _unreachable(lowered: str, address: str) -> str:
    proxy = find_proxy(address)
    if proxy:
        return (
            f"no server reachable at {address} through the proxy of {proxy}; unset it, or add {host_of(address)} to "
            "no_proxy"
        )
    if "failed to connect" in lowered and "socket closed" in lowered:
        return (
            f"what listens at {address} closes connections; a server with TLS does so to a client without credentials"
        )
    return f"no server reachable at {address}; start one with `loramux serve`"


def explain_too_large(message: str) -> str:
    """A refusal of gRPC's own for the size of a message in our words, empty for any other."""
    found = _TOO_LARGE.search(message)
    if found is None:
        return ""
    side, _, size, most = found.groups()
    if side == "SERVER":
        return f"the request has {int(size):,} bytes, and the server takes at most {int(most):,} (max_message_bytes)"
    return f"the answer has {int(size):,} bytes, and this client takes at most {int(most):,}: ask for less at once"
