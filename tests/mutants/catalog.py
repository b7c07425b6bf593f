"""Faults that core logic could have, each with the tests that must notice it.

A mutant is one exact replacement in one file. One that changes nothing that can be observed is no mutant: replace it.
"""

from __future__ import annotations

from catalog_of_certificates import CERTIFICATE_MUTANTS
from catalog_of_training import TRAINING_MUTANTS
from mutant import Mutant

ENGINE, MODEL, API = "server/loramux_server/engine/", "server/loramux_server/model/", "server/loramux_server/api/"
ADAPTERS = "adapters/loramux_adapters/"
TEST_ENGINE, TEST_MODEL, TEST_ADAPTERS = "tests/server/engine/", "tests/server/model/", "tests/adapters/"

MUTANTS = (
    # Blocks and tables
    Mutant(
        "prefix hashes leave the adapter out", ENGINE + "blocks.py",
        '(tenant, salt, digest or "", "long"', '(tenant, salt, "", "long"',
        (TEST_ENGINE + "test_blocks.py", TEST_ENGINE + "test_prefix_cache.py"),
    ),
    Mutant(
        "an evicted block is still found by its hash", ENGINE + "blocks.py",
        "popitem(last=False)\n                self._drop_hash(block)", "popitem(last=False)",
        (TEST_ENGINE + "test_blocks.py",),
    ),
    Mutant(
        "the last token of a prompt is taken from the cache too", ENGINE + "tables.py",
        "tokens = len(request.tokens) - 1", "tokens = len(request.tokens)",
        (TEST_ENGINE + "test_prefix_cache.py", TEST_ENGINE + "test_scheduler.py"),
    ),
    Mutant(
        "cached blocks without an owner count as free twice", ENGINE + "tables.py",
        " + len(self.pool.find_idle(cached))", "",
        (TEST_ENGINE + "test_prefix_cache.py", TEST_ENGINE + "test_preemption.py", TEST_ENGINE + "test_traffic.py"),
    ),
    Mutant(
        "a newcomer takes the blocks that those who run need next", ENGINE + "tables.py",
        "return needed + reserve <=", "return needed <=",
        (TEST_ENGINE + "test_preemption.py", TEST_ENGINE + "test_scheduler.py"),
    ),
    Mutant(
        "a block of mixed shapes is shared in exact mode", ENGINE + "tables.py",
        "if self._exact and len(chunk.tokens) != self._grain:", "if False:",
        (TEST_ENGINE + "test_exact.py",),
    ),
    # Scheduler and step
    Mutant(
        "a request that ends keeps its lease", ENGINE + "scheduler.py",
        "            request.lease.release()\n", "",
        (TEST_ENGINE + "test_scheduler.py",),
    ),
    Mutant(
        "a failed step's KV stays in the prefix cache", ENGINE + "scheduler.py",
        "self._end(request, failure.code, now, invalidate=invalidate)", "self._end(request, failure.code, now)",
        (TEST_ENGINE + "test_scheduler.py", TEST_ENGINE + "test_prefix_cache.py"),
    ),
    Mutant(
        "a request's own deadline is passed over", ENGINE + "scheduler.py",
        "self._next_deadline = min(self._next_deadline, submission.deadline)", "pass",
        (TEST_ENGINE + "test_scheduler.py",),
    ),
    Mutant(
        "a step is over its budget of tokens", ENGINE + "step_builder.py",
        "self._left -= end - start", "self._left -= 1",
        (TEST_ENGINE + "test_scheduler.py",),
    ),
    Mutant(
        "a step of two adapters runs on one's merged weights", ENGINE + "step_builder.py",
        "replace(chunk, is_merged=True) if own else chunk", "replace(chunk, is_merged=True)",
        (TEST_ENGINE + "test_scheduler.py", TEST_ENGINE + "test_traffic.py"),
    ),
    Mutant(
        "a request is overtaken without a bound", ENGINE + "policies.py",
        "            self._is_closed = self._is_closed or other.skips >= self._bound\n", "",
        (TEST_ENGINE + "test_policies.py",),
    ),
    Mutant(
        "a full batch loads adapters for all who wait", ENGINE + "policies.py",
        "return len(self._not_ready) < places + LOADS_AHEAD", "return True",
        (TEST_ENGINE + "test_policies.py", TEST_ENGINE + "test_more_adapters_than_slots.py"),
    ),
    Mutant(
        "the commands of a step that failed are lost", ENGINE + "execution.py",
        "replace(plan, chunks=plan.chunks[:middle])", "StepPlan(plan.step, plan.chunks[:middle], plan.merged)",
        (TEST_ENGINE + "test_execution.py", TEST_MODEL + "test_worker.py"),
    ),
    Mutant(
        "the second half of a failed step loses its merged weights", ENGINE + "execution.py",
        "StepPlan(plan.step, plan.chunks[middle:], plan.merged)", "StepPlan(plan.step, plan.chunks[middle:])",
        (TEST_ENGINE + "test_execution.py",),
    ),
    Mutant(
        "of many choices one counts against the queue", ENGINE + "client.py",
        "if self._live + submission.n > self._limits.max_live:", "if self._live + 1 > self._limits.max_live:",
        (TEST_ENGINE + "test_client.py",),
    ),
    # Terminal events
    Mutant(
        "a choice ends twice", ENGINE + "stream.py",
        "            self._open.discard(event.choice)\n        self._events", "            pass\n        self._events",
        (TEST_ENGINE + "test_client.py",),
    ),
    Mutant(
        "an engine that has ended takes requests that nobody will answer", ENGINE + "client.py",
        "if self._refusal is not Draining:", "if self._refusal is Draining:",
        (TEST_ENGINE + "test_client.py",),
    ),
    # Stop strings
    Mutant(
        "of two stop strings that end together the shorter counts", ENGINE + "stop_strings.py",
        "len(pattern.string) > len(found)", "len(pattern.string) < len(found)",
        (TEST_ENGINE + "test_detokenize.py",),
    ),
    Mutant(
        "a stop string that overlaps itself is missed", ENGINE + "stop_strings.py",
        "self.matched = self._shorter[self.matched]\n        if", "self.matched = 0\n        if",
        (TEST_ENGINE + "test_detokenize.py",),
    ),
    Mutant(
        "a stop string that begins within a failed match is missed", ENGINE + "stop_strings.py",
        "            matched = shorter[matched]\n", "            matched = 0\n",
        (TEST_ENGINE + "test_detokenize.py",),
    ),
    # Pool, slots, rank rows
    Mutant(
        "a lease that is released twice gives back another's", ADAPTERS + "residency/pool.py",
        "        if self._live:\n            self._live = False\n",
        "        if self._slot:\n            self._live = False\n",
        (TEST_ADAPTERS + "residency/test_pool.py",),
    ),
    Mutant(
        "an adapter with a lease is evicted", ADAPTERS + "residency/pool.py",
        "return not slot.leases and slot.bound_at != self._tick", "return slot.bound_at != self._tick",
        (TEST_ADAPTERS + "residency/test_pool.py",),
    ),
    Mutant(
        "the adapter used last leaves first", ADAPTERS + "residency/pool.py",
        "return 0.0, slot.used_at", "return 0.0, -slot.used_at",
        (TEST_ADAPTERS + "residency/test_pool.py",),
    ),
    Mutant(
        "an evicted slot is not unbound", ADAPTERS + "residency/pool.py",
        "        self._unbound.append(slot.number)\n", "",
        (TEST_ADAPTERS + "residency/test_pool.py", TEST_ADAPTERS + "residency/test_pool_machine.py"),
    ),
    Mutant(
        "rank rows of two adapters overlap by one", ADAPTERS + "residency/row_space.py",
        "if first - end >= rows:", "if first - end >= rows - 1:",
        (TEST_ADAPTERS + "residency/test_tables.py",),
    ),
    Mutant(
        "rank rows beyond an adapter's rank keep a former owner's", ADAPTERS + "parts/low_rank.py",
        "            pool[first + len(factor) : first + count].zero_()\n", "",
        (TEST_ADAPTERS + "parts", TEST_ADAPTERS + "residency/test_real_slots.py"),
    ),
    Mutant(
        "foreign rank rows count in a gathered product", ADAPTERS + "kernels/gathered.py",
        "            shrunk.masked_fill_(self.drop, 0)  # selects: a NaN in a foreign rank row stays there\n", "",
        (TEST_ADAPTERS + "kernels/test_low_rank.py",),
    ),
    # Batch and segments
    Mutant(
        "rows of the base after an adapter's are taken for its own", ADAPTERS + "apply/batch.py",
        'elif segments:\n            raise ValueError(f"row {row} has no adapter but follows rows that have one")',
        "elif segments:\n            segments[-1] = SlotSegment(segments[-1].start, row + 1, segments[-1].slot)",
        (TEST_ADAPTERS + "kernels/test_plans.py",),
    ),
    Mutant(
        "a key is written one position late", MODEL + "forward_batch.py",
        "[place // size] * size + place % size for", "[place // size] * size + (place + 1) % size for",
        (TEST_MODEL + "test_forward_batch.py",),
    ),
    Mutant(
        "a row sees one position beyond its window", MODEL + "tiled_attention.py",
        "mask | (place <= query - window)", "mask | (place < query - window)",
        (TEST_MODEL + "test_attention.py",),
    ),
    Mutant(
        "a tensor of a step is left on the host", MODEL + "forward_batch.py",
        "positions=torch.tensor(positions, device=device)", "positions=torch.tensor(positions)",
        (TEST_MODEL + "test_fake_cuda.py",),
    ),
    Mutant(
        "an output gain scales the base's bias too", ADAPTERS + "parts/output_gain.py",
        "own.to(gain) * (1 - gain)", "own.to(gain) * 0",
        (TEST_ADAPTERS + "parts/test_output_gain.py",),
    ),
    Mutant(
        "a bottleneck beside a sub-layer reads its output", ADAPTERS + "formats/adapterhub/reader.py",
        '        reads = "residual"\n', "        pass\n",
        (TEST_ADAPTERS + "kinds/test_bottlenecks.py",),
    ),
    Mutant(
        "a failed step's residual stream is read by the next", ADAPTERS + "apply/inject.py",
        "            sublayer.reset()\n", "            pass\n",
        (TEST_ADAPTERS + "kinds/test_bottlenecks.py",),
    ),
    Mutant(
        "the host waits for the device once more in each step", MODEL + "forward.py",
        "    return logits\n", "    logits.max().item()\n    return logits\n",
        (TEST_MODEL + "test_fake_cuda.py",),
    ),
    # Worker, staging, merging
    Mutant(
        "a chunk may use a slot to which nothing is bound", MODEL + "worker.py",
        "if chunk.slot != BASE_SLOT and chunk.slot not in self._bound:", "if False:",
        (TEST_MODEL + "test_worker.py",),
    ),
    Mutant(
        "a slot is bound before its copy has ended", MODEL + "staging.py",
        "            for _ in copy.pieces:\n                pass\n", "            pass\n",
        (TEST_MODEL + "test_worker.py", TEST_MODEL + "test_replay.py"),
    ),
    Mutant(
        "merged weights leave the adapter's bias out", ADAPTERS + "parts/bias.py",
        "    bias.mul_(part.base_share).add_(part.value.to(bias))\n", "    pass\n",
        (TEST_ADAPTERS + "apply/test_merge.py", TEST_ADAPTERS + "parts"),
    ),
    # Combined adapters
    Mutant(
        "a low rank is summed without its weight", ADAPTERS + "parts/low_rank.py",
        "b = [share.weight * share.part.b for share in shares]", "b = [share.part.b for share in shares]",
        (TEST_ADAPTERS + "kinds/test_combined.py",),
    ),
    Mutant(
        "a magnitude stays as it is beside another adapter's low rank", ADAPTERS + "combining.py",
        "if _acting(contributions) == [1.0]:", "if True:",
        (TEST_ADAPTERS + "kinds/test_combined.py",),
    ),
    Mutant(
        "a combination's digest leaves the weights out", ADAPTERS + "combination.py",
        'bytes.fromhex(digest) + struct.pack("<d", weight)', "bytes.fromhex(digest)",
        (TEST_ADAPTERS + "test_combination.py",),
    ),
    Mutant(
        "a combination outlives the adapters it was made of", "server/loramux_server/registry.py",
        "(removed, *self._combinations.forget(removed))", "(removed,)",
        ("tests/server/test_combinations.py",),
    ),
    # Sampler and its state
    Mutant(
        "a repetition penalty raises what is unlikely", MODEL + "logits.py",
        "torch.where(scores < 0, scores * penalty, scores / penalty)", "scores / penalty",
        (TEST_MODEL + "test_sampler.py", TEST_MODEL + "test_sampler_state.py"),
    ),
    Mutant(
        "a token's NaN is drawn as if it were the best", MODEL + "sampler.py",
        "tokens = torch.where(torch.isfinite(best), tokens, _FAILED)", "pass",
        (TEST_MODEL + "test_sampler.py",),
    ),
    Mutant(
        "a request's counts are those of the row's former owner", MODEL + "sampling_state.py",
        "        self._output[row] = 0\n", "",
        (TEST_MODEL + "test_sampler_state.py",),
    ),
    Mutant(
        "top_p drops the token that crosses it", MODEL + "draw.py",
        "(likelier.sum(dim=1) >= nucleus)", "(likelier.sum(dim=1) + level.flatten() >= nucleus)",
        (TEST_MODEL + "test_sampler.py", TEST_MODEL + "test_sampler_draw.py"),
    ),
    Mutant(
        "a row is sampled over a neighbor's wider vocabulary", MODEL + "sampler.py",
        "take_rows(logits, rows)[:, :width].contiguous()", "take_rows(logits, rows)",
        (TEST_MODEL + "test_sampler.py",),
    ),
    Mutant(
        "beside a wider adapter any token id is looked up", MODEL + "runner.py",
        "if max(chunk.tokens) >= self.adapted.vocabulary(chunk.slot):", "if False:",
        (TEST_ADAPTERS + "kinds/test_added_tokens.py::test_an_id_that_only_a_neighbor_knows_fails_its_own_row",),
    ),
    Mutant(
        "rows of new tokens that are in no tensor are made up", ADAPTERS + "formats/peft/vocabulary.py",
        "if rows is None or bool(rows.isnan().any()):", "if rows is None:",
        (TEST_ADAPTERS + "formats/test_vocabulary.py",),
    ),
    Mutant(
        "an adapter's template that took too much is run again at once",
        "server/loramux_server/text/template_sandbox.py",
        "            if template in self._paused:\n", "            if False:\n",
        ("tests/server/test_adapter_text.py",),
    ),
    Mutant(
        "choices of one seed draw the same", MODEL + "sampler.py",
        "(c.params.seed, c.params.choice, c.start + len(c.tokens))", "(c.params.seed, 0, c.start + len(c.tokens))",
        (TEST_MODEL + "test_sampler.py",),
    ),
    # Store, digest, fingerprint
    Mutant(
        "bytes of a version that a request holds are removed", ADAPTERS + "store/collector.py",
        "for version, digest in unreachable.items() if digest not in self._holds]",
        "for version, digest in unreachable.items() if digest]",
        (TEST_ADAPTERS + "store/test_store_holds.py",),
    ),
    Mutant(
        "KV of an adapter that is gone leaves by age", ENGINE + "scheduler.py",
        "            self.tables.pool.forget(digest)  #", "            digest  #",
        (TEST_ENGINE + "test_prefix_cache.py",),
    ),
    Mutant(
        "bytes of a superseded version count for ever", ADAPTERS + "store/tallies.py",
        "SET bytes = bytes - old.size", "SET bytes = bytes - 0 * old.size",
        (TEST_ADAPTERS + "store/test_store_quotas.py",),
    ),
    Mutant(
        "a name is found after its time", ADAPTERS + "store/catalog.py",
        '"(l.expires IS NULL OR l.expires > :now)"', '"(l.expires IS NULL OR l.expires > 0 * :now)"',
        (TEST_ADAPTERS + "store/test_store_lifetimes.py",),
    ),
    Mutant(
        "a caller receives an answer before its use is durable", API + "generate.py",
        "                confirm = None if resolved is None else resolved.confirm\n"
        "                if resolved is not None and not resolved.judged_at_load:\n"
        "                    await resolved.confirm()\n",
        "                confirm = None\n",
        ("tests/server/api/test_lifetimes.py",),
    ),
    Mutant(
        "bytes of an upload that were received are written again", ADAPTERS + "store/staged_upload.py",
        "if offset != received:", "if offset > received:",
        (TEST_ADAPTERS + "store/test_store_uploads.py",),
    ),
    Mutant(
        "one adapter more than the quota is published", ADAPTERS + "store/changes.py",
        "if count >= quotas.max_adapters:", "if count > quotas.max_adapters:",
        (TEST_ADAPTERS + "store/test_store_quotas.py",),
    ),
    Mutant(
        "a publish is acknowledged without being synced", ADAPTERS + "store/local.py",
        "            upload.sync()\n            with self._changing:", "            with self._changing:",
        (TEST_ADAPTERS + "store/test_store_durability.py", TEST_ADAPTERS + "store/test_store_faults.py"),
    ),
    Mutant(
        "a torn line of the journal swallows the next publish", ADAPTERS + "store/journal.py",
        'b"\\n" + _encode(publication))', "_encode(publication))",
        (TEST_ADAPTERS + "store/test_store_lost.py",),
    ),
    Mutant(
        "two contents have one digest", ADAPTERS + "formats/digest.py",
        "        self._field(dtype.encode())\n", "",
        (TEST_ADAPTERS + "formats/test_digest.py",),
    ),
    Mutant(
        "two bases of other scales have one fingerprint", ADAPTERS + "base/fingerprint.py",
        "for tensor in (module.codes, module.absmax):", "for tensor in (module.codes,):",
        (TEST_ADAPTERS + "base/test_load.py",),
    ),
    # Refusals
    Mutant(
        "no file takes too long to read", ADAPTERS + "formats/peft/work.py",
        "    if number > most:", "    if number > most and not number:",
        (TEST_ADAPTERS + "formats/test_read_work.py",),
    ),
    Mutant(
        "a power of OFT's blocks costs nothing", ADAPTERS + "formats/peft/rotations.py",
        "return terms * count * (width**3 + 200 * width**2)", "return count * (width**3 + 200 * width**2) // 64",
        (TEST_ADAPTERS + "formats/test_read_work.py",),
    ),
    Mutant(
        "a tensor of another shape is accepted", ADAPTERS + "formats/peft/tensors.py",
        "if entry.shape != expected:", "if len(entry.shape) != len(expected):",
        (TEST_ADAPTERS + "formats/test_registry.py",),
    ),
    Mutant(
        "an adapter of another base is accepted without consent", ADAPTERS + "formats/declared_base.py",
        "if differs and not allow:", "if differs and allow:",
        (TEST_ADAPTERS + "formats/test_registry.py",),
    ),
    Mutant(
        "a NaN passes for a number within its bounds", API + "validate.py",
        "if math.isfinite(value) and (low < value if open_low else low <= value) and value <= high:",
        "if not (value < low or (open_low and value == low) or value > high):",
        ("tests/server/api/test_validate.py",),
    ),
    *TRAINING_MUTANTS,
    *CERTIFICATE_MUTANTS,
)  # fmt: skip
