"""What the sampler remembers of requests between steps: which tokens they have, and fixed addends.

Dense rows on the device, taken on a request's first chunk and given back when it retires; a step's
updates are two scattered writes for all requests. Knows nothing of how penalties are applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from loramux_server.engine.plan import Chunk


class TokenCounts:
    """Per request: tokens seen in prompt or output, and counts of those in the output."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._output = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._counted: dict[str, int] = {}  # tokens taken into account, by request

    def observe(self, chunks: Iterable[Chunk]) -> None:
        """Count the chunks' tokens, each position once; a chunk with `history` or at 0 begins anew.

        Raises ValueError if positions are missing: neither counted before nor in `history`. Nothing counts as observed
        when it raises, so that the step can run again.
        """
        ends: dict[str, int] = {}
        rows: list[int] = []
        tokens: list[int] = []
        output_rows: list[int] = []
        output_tokens: list[int] = []
        for chunk in chunks:
            row, first, fresh = self._admit(chunk)
            ends[chunk.request_id] = first + len(fresh)
            seen = fresh[max(0, chunk.virtual_tokens - first) :]
            rows += [row] * len(seen)
            tokens += seen
            output = fresh[max(0, chunk.prompt_length - first) :]
            output_rows += [row] * len(output)
            output_tokens += output
        device = self._seen.device
        if tokens:
            where = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
            self._seen.index_put_(where, torch.ones((), dtype=torch.bool, device=device))
        if output_tokens:
            where = (torch.tensor(output_rows, device=device), torch.tensor(output_tokens, device=device))
            one = torch.ones((), dtype=torch.int32, device=device)
            self._output.index_put_(where, one, accumulate=True)
        self._counted.update(ends)

    def _admit(self, chunk: Chunk) -> tuple[int, int, tuple[int, ...]]:
        """Row of the chunk's request, and the tokens to count with the position of the first."""
        if chunk.start == 0 or chunk.history is not None:
            history = chunk.history or ()
            if len(history) != chunk.start:
                raise ValueError(f"{chunk.request_id}: history of {len(history)} tokens for start {chunk.start}")
            row = self._empty_row(chunk.request_id)
            self._counted.pop(chunk.request_id, None)
            first, fresh = 0, (*history, *chunk.tokens)
        else:
            first = self._counted.get(chunk.request_id, -1)
            if first < chunk.start:
                raise ValueError(f"{chunk.request_id}: tokens before {chunk.start} were never observed")
            row = self._rows[chunk.request_id]
            fresh = chunk.tokens[first - chunk.start :]
        return row, first, fresh

    def _empty_row(self, request_id: str) -> int:
        row = self._rows.get(request_id)
        if row is None:
            if not self._free:
                self._grow()
            row = self._rows[request_id] = self._free.pop()
        self._seen[row] = False
        self._output[row] = 0
        return row

    def _grow(self) -> None:
        size = self._seen.shape[0]
        more = max(8, size)
        seen = torch.cat((self._seen, self._seen.new_zeros((more, self._seen.shape[1]))))
        output = torch.cat((self._output, self._output.new_zeros((more, self._output.shape[1]))))
        self._seen, self._output = seen, output  # both or neither: there may be memory for one only
        self._free += range(size + more - 1, size - 1, -1)

    def widen(self, vocabulary: int) -> None:
        """Makes columns for an adapter with more tokens than the base; they stay."""
        more = vocabulary - self._seen.shape[1]
        if more > 0:
            self._seen, self._output = (torch.nn.functional.pad(each, (0, more)) for each in (self._seen, self._output))

    def is_current(self, chunk: Chunk) -> bool:
        """Whether all tokens up to the chunk's end are counted, and none after it."""
        return self._counted.get(chunk.request_id) == chunk.start + len(chunk.tokens)

    def seen(self, request_ids: Sequence[str], vocabulary: int) -> Tensor:
        """Tokens in prompt or output, bool [requests, vocabulary]."""
        return self._seen.index_select(0, self._index(request_ids))[:, :vocabulary]

    def output(self, request_ids: Sequence[str], vocabulary: int) -> Tensor:
        """How often each token is in the output, int32 [requests, vocabulary]."""
        return self._output.index_select(0, self._index(request_ids))[:, :vocabulary]

    def _index(self, request_ids: Sequence[str]) -> Tensor:
        return torch.tensor([self._rows[request_id] for request_id in request_ids], device=self._seen.device)

    def retire(self, request_id: str) -> None:
        """Give the request's row back; unknown requests are fine."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free.append(row)
        self._counted.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._rows)


class Addends:
    """Per request: what is added to single logits in every step, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bias: dict[str, tuple[Tensor, Tensor]] = {}
        self._suppressed: dict[str, Tensor] = {}

    def bias(self, chunk: Chunk, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Ids int64 [n] and addends float32 [n] of the request's logit bias."""
        found = self._bias.get(chunk.request_id)
        if found is None:
            # Ids outside are refused by validation; here they could only touch what cannot be drawn.
            items = [(i, v) for i, v in chunk.params.logit_bias.items() if 0 <= i < vocabulary]
            ids = torch.tensor([i for i, _ in items], dtype=torch.int64, device=self._device)
            values = torch.tensor([v for _, v in items], dtype=torch.float32, device=self._device)
            found = self._bias[chunk.request_id] = (ids, values)
        return found

    def suppressed(self, chunk: Chunk, vocabulary: int) -> Tensor:
        """Ids int64 [n] forbidden while the output is short."""
        found = self._suppressed.get(chunk.request_id)
        if found is None:
            ids = [i for i in chunk.params.suppressed if 0 <= i < vocabulary]
            found = torch.tensor(ids, dtype=torch.int64, device=self._device)
            self._suppressed[chunk.request_id] = found
        return found

    def retire(self, request_id: str) -> None:
        """Forget the request; unknown requests are fine."""
        self._bias.pop(request_id, None)
        self._suppressed.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._bias.keys() | self._suppressed.keys())
