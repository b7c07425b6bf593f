"""The driver for a server over gRPC: one that runs already, or one started for the bench."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loramux.aio import AsyncClient
from loramux.bench.driver import Call, Push, Trace
from loramux.local_server import LocalServer


class GrpcDriver:
    """Streams every call of a burst over one channel. `address` None starts a server with `options` in `scratch`.

    Adapters are pushed under their directory names; on a server that is not ours they are removed at `close`
    if this bench created them.
    """

    name = "grpc"

    def __init__(
        self, adapters: Sequence[Path], *, address: str | None, options: Mapping[str, str], scratch: Path
    ) -> None:
        self._paths = adapters
        self._address = address
        self._options = options
        self._scratch = scratch
        self._server: LocalServer | None = None
        self._client: AsyncClient | None = None
        self._names: list[str] = []
        self._created: list[str] = []

    async def start(self) -> None:
        address = self._address
        if address is None:
            options = {"data_dir": str(self._scratch / "data"), **self._options}
            # Known before it is waited for: a bench that is stopped meanwhile closes its drivers, and this with them.
            self._server = server = LocalServer(options, log=self._scratch / "server.log")
            await asyncio.to_thread(server.__enter__)
            address = server.address
        self._client = AsyncClient(address)
        known = set() if self._address else {record.name async for record in self._client.adapters()}
        for path in self._paths:
            if path.name in known:
                self._names.append(path.name)
            else:
                await self.push(path, path.name)

    async def run(self, calls: Sequence[Call], output_tokens: int, salt: str) -> list[Trace]:
        lengths = [call.output_tokens or output_tokens for call in calls]
        answers = (self._one(call, length, salt) for call, length in zip(calls, lengths, strict=True))
        return list(await asyncio.gather(*answers))

    async def push(self, path: Path, name: str) -> Push:
        times: list[float] = []
        began = time.perf_counter()
        # Told when the channel asks for what follows a chunk: after the last one, for the commit.
        pushed = await self._connected.push(path, name, progress=lambda _: times.append(time.perf_counter()))
        if pushed.created:
            self._created.append(name)
        self._names.append(name)
        return Push(len(self._names) - 1, began, times[-1] if times else began, time.perf_counter())

    def stages_of(self, push: Push, first: Trace) -> Mapping[str, float]:
        return {}

    @property
    def _connected(self) -> AsyncClient:
        if self._client is None:
            raise RuntimeError("the driver was not started")
        return self._client

    def readings(self) -> Mapping[str, float]:
        return {}

    async def _one(self, call: Call, output_tokens: int, salt: str) -> Trace:
        arrivals: list[float] = []
        sent = time.perf_counter()
        stream = self._connected.stream(
            token_ids=call.prompt,
            adapter="" if call.adapter is None else self._names[call.adapter],
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            return_token_ids=True,
            cache_salt=salt,
        )
        async for part in stream:
            now = time.perf_counter()
            arrivals.extend(now for _ in part.token_ids)
        return Trace(sent, tuple(arrivals))

    async def close(self) -> None:
        client, self._client = self._client, None
        server, self._server = self._server, None
        try:
            if client is not None:
                if server is None:
                    for name in dict.fromkeys(self._created):
                        await client.delete(name)
                self._created.clear()
                await client.close()
        finally:
            if server is not None:
                await asyncio.to_thread(server.stop)
