"""From a step's logits to one token per request, batched on the device.

Keeps what it must remember of a request by its id. A request's tokens depend on its own logits,
parameters, tokens and seed alone. Knows nothing of the model, of text, or of when a request ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from loramux_server.engine.plan import Chunk, Sampled
from loramux_server.model import logits as logit
from loramux_server.model.draw import Filters, draw
from loramux_server.model.logprobs import finite_rows, token_logprobs
from loramux_server.model.row_selection import put_rows, take_rows
from loramux_server.model.sampling_state import Addends, TokenCounts
from loramux_server.model.uniform import uniforms
from loramux_server.requests import RequestFailure, SamplingParams, TokenLogprob

_FAILED = -1  # in place of a token id


def _numeric_failure() -> RequestFailure:
    return RequestFailure("NUMERIC", "the logits of this request are not finite or leave no token possible")


class Sampler:
    """One step: `observe` all chunks of the plan, then `sample` those that sample.

    Use it from one thread. `retire` ids when their requests end; a preempted request may be retired too.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._vocab_size = vocab_size
        self._counts = TokenCounts(vocab_size, torch.device(device))
        self._addends = Addends(torch.device(device))
        # By request and position: logits [1, vocab] that predict the token there, the first of a next chunk.
        self._prompt_rows: dict[str, dict[int, Tensor]] = {}

    def widen(self, vocabulary: int) -> None:
        """A step with an adapter that knows more tokens than the base is to be observed."""
        self._counts.widen(vocabulary)

    def observe(self, chunks: Iterable[Chunk]) -> None:
        """Take the chunks' tokens into the penalties, each position once.

        Call it with every chunk of a step, also those that do not sample; again when the step failed and runs again. A
        chunk at position 0 or with `history` begins its request anew. Raises ValueError when a penalized request skips
        positions.
        """
        if self._prompt_rows:
            chunks = tuple(chunks)
            for chunk in chunks:
                if chunk.start >= chunk.prompt_length:
                    self._prompt_rows.pop(chunk.request_id, None)
        self._counts.observe([chunk for chunk in chunks if chunk.params.needs_history])

    def sample(
        self, chunks: Sequence[Chunk], logits: Tensor, widths: Sequence[int] | None = None
    ) -> tuple[dict[str, Sampled], dict[str, RequestFailure]]:
        """Draw the token after each chunk's last one; by request id, every chunk is in one of the two.

        `logits` [chunks, vocab] in any float type predict that token. Rows without a finite maximum fail
        with NUMERIC, alone. Chunks that `observe` has not seen yet are observed. `widths` says how many logits of a
        row are its own, where adapters have other vocabularies than the base; the rest is never read.
        """
        if not chunks:
            return {}, {}
        groups: dict[int, list[int]] = {}
        for row, width in enumerate([self._vocab_size] * len(chunks) if widths is None else widths):
            groups.setdefault(width, []).append(row)
        fits = logits.shape[1] == self._vocab_size if widths is None else logits.shape[1] >= max(groups)
        if len(logits) != len(chunks) or not fits:
            raise ValueError(f"logits {tuple(logits.shape)} for {len(chunks)} chunks and {max(groups)} tokens")
        sampled: dict[str, Sampled] = {}
        failures: dict[str, RequestFailure] = {}
        for width, rows in groups.items():
            # A group is a batch of its own: no sum or maximum runs over a neighbor's width.
            own = take_rows(logits, rows)[:, :width].contiguous()
            drawn, failed = self._sample([chunks[row] for row in rows], own)
            sampled |= drawn
            failures |= failed
        return sampled, failures

    def _sample(self, chunks: Sequence[Chunk], logits: Tensor) -> tuple[dict[str, Sampled], dict[str, RequestFailure]]:
        self.observe(c for c in chunks if c.params.needs_history and not self._counts.is_current(c))
        # Greedy, ties to the lowest id; a cast to float32 would be exact and change nothing.
        best, tokens = logits.max(dim=1)
        tokens = torch.where(torch.isfinite(best), tokens, _FAILED)
        logprobs: dict[int, TokenLogprob] = {}
        refined = [row for row, chunk in enumerate(chunks) if _is_refined(chunk)]
        if refined:
            drawn, found = self._refine(
                [chunks[row] for row in refined],
                take_rows(logits, refined).float(),
                take_rows(best, refined).float(),
                take_rows(tokens, refined),
            )
            put_rows(tokens, refined, drawn)
            logprobs = {refined[i]: logprob for i, logprob in found.items()}
        sampled: dict[str, Sampled] = {}
        failures: dict[str, RequestFailure] = {}
        for row, (chunk, token) in enumerate(zip(chunks, tokens.tolist(), strict=True)):
            if token == _FAILED:
                failures[chunk.request_id] = _numeric_failure()
            else:
                sampled[chunk.request_id] = Sampled(token, logprobs.get(row))
        return sampled, failures

    def _refine(
        self, chunks: Sequence[Chunk], scores: Tensor, best: Tensor, tokens: Tensor
    ) -> tuple[Tensor, dict[int, TokenLogprob]]:
        """Tokens [chunks] and log-probabilities by row, for rows that need more than the best raw logit.

        `scores` [chunks, vocab] float32 are the raw logits and may be the caller's own; `best` is their
        maximum and `tokens` its id, or _FAILED.
        """
        usable = tokens != _FAILED  # raw logits that failed stay failed, even if the bad token is forbidden
        if any(logit.is_adjusted(chunk) for chunk in chunks):
            scores = logit.adjust(scores, chunks, self._counts, self._addends)
            best, tokens = scores.max(dim=1)
            usable &= torch.isfinite(best)
        random = [row for row, chunk in enumerate(chunks) if not chunk.params.greedy]
        if random:
            safe = torch.where(usable, best, float("nan"))
            drawn = _draw([chunks[row] for row in random], take_rows(scores, random), take_rows(safe, random))
            tokens = tokens.clone()
            put_rows(tokens, random, drawn)
        tokens = torch.where(usable, tokens, _FAILED)
        asked = [row for row, chunk in enumerate(chunks) if chunk.params.logprobs is not None]
        found = token_logprobs(
            take_rows(scores, asked),
            take_rows(tokens, asked).clamp(min=0),  # a failed row's are not read
            [chunks[row].params.logprobs or 0 for row in asked],
        )
        return tokens, dict(zip(asked, found, strict=True))

    def prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> tuple[TokenLogprob | None, ...] | RequestFailure:
        """Log-probabilities of the chunk's prompt tokens, in order; None for the very first, and none for virtual ones.

        `logits` [len(chunk.tokens), vocab] predict the token after each of the chunk's, as the model gave
        them: penalties and bias shape the output only. The chunks of one request come in order from
        position 0 (such requests read no cached blocks): the row that predicts the next chunk's first
        token is kept between them. Raises ValueError when one is missing.
        """
        prompt = chunk.tokens[: max(0, chunk.prompt_length - chunk.start)]
        # A step that failed comes again: the row before this chunk is kept until a later chunk is observed.
        before = self._prompt_rows.get(chunk.request_id, {}).get(chunk.start)
        if not prompt:
            return ()
        rows = logits[: len(prompt)]
        kept = {} if before is None else {chunk.start: before}
        if chunk.start + len(prompt) < chunk.prompt_length:
            kept[chunk.start + len(prompt)] = rows[-1:].clone()
        self._prompt_rows[chunk.request_id] = kept
        if not bool(finite_rows(rows).all()):
            return _numeric_failure()
        number = chunk.params.prompt_logprobs or 0
        if chunk.start > 0 and before is None:
            raise ValueError(f"{chunk.request_id}: no logits kept from before position {chunk.start}")
        predicting = rows[:-1] if before is None else torch.cat((before, rows[:-1]))
        # The first token of the text has no probability, whatever virtual tokens are before it.
        skipped = max(0, chunk.virtual_tokens - chunk.start + 1)
        told = prompt[skipped:]
        found = _prompt_part(predicting[len(predicting) - len(told) :], told, number) if told else []
        has_first = chunk.start <= chunk.virtual_tokens < chunk.start + len(prompt)
        return (*(None for _ in range(has_first)), *found)

    def retire(self, request_ids: Iterable[str]) -> None:
        """Forget these requests; unknown ids are fine."""
        for request_id in request_ids:
            self._counts.retire(request_id)
            self._addends.retire(request_id)
            self._prompt_rows.pop(request_id, None)

    def remembered(self) -> int:
        """Entries held for requests; 0 when all have retired."""
        return len(self._counts) + len(self._addends) + len(self._prompt_rows)


def _is_refined(chunk: Chunk) -> bool:
    return not chunk.params.greedy or chunk.params.logprobs is not None or logit.is_adjusted(chunk)


def _draw(chunks: Sequence[Chunk], scores: Tensor, best: Tensor) -> Tensor:
    keys = [(c.params.seed, c.params.choice, c.start + len(c.tokens)) for c in chunks]
    return draw(
        scores,
        best,
        [_filters(chunk.params) for chunk in chunks],
        lambda rows, draw_round: uniforms([keys[row] for row in rows], draw_round),
    )


def _filters(params: SamplingParams) -> Filters:
    return Filters(params.temperature, params.top_p, params.top_k, params.min_p)


def _prompt_part(rows: Tensor, tokens: Sequence[int], number: int) -> list[TokenLogprob]:
    return token_logprobs(rows, torch.tensor(tokens, dtype=torch.int64, device=rows.device), [number] * len(tokens))
