"""How both clients reach a server: the default address and the channel options.

Opens nothing itself.
"""

from __future__ import annotations

DEFAULT_ADDRESS = "127.0.0.1:50051"
CALL_TIMEOUT = 30.0
"""Seconds for each try of a call that answers at once; others have no limit unless the caller sets one."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),  # prompt log-probabilities of a long context pass 4 MB
    # The bounded retries above count on a channel that tries again soon; the default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name: what one attempt to connect may take. A busy server needs more than a few milliseconds.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A peer that is gone without a word (a host that lost power, a NAT that forgot) would be waited for forever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # a long generation sends none; servers of ours allow a ping each 10 s
    ("grpc.use_local_subchannel_pool", 1),  # no shared back-off with other channels of this process
)
