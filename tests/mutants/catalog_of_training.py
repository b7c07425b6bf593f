"""Faults that the trainer could have; see `catalog`."""

from __future__ import annotations

from mutant import Mutant

TRAINER, TESTS = "trainer/loramux_trainer/", "tests/trainer/"
FLEET, TEST_FLEET = TRAINER + "fleet/", TESTS + "fleet/"

TRAINING_MUTANTS = (
    Mutant(
        "one that diverged is not saved", TRAINER + "fleet_run.py",
        "            if self._writes and member.step and not member.is_torn:\n                run.save()\n", "",
        (TESTS + "test_train_file.py",),
    ),
    Mutant(
        "weights that are not finite stay", FLEET + "member.py",
        "            parameters.weights.copy_(before)\n", "",
        (TEST_FLEET + "test_fleet.py",),
    ),
    Mutant(
        "all members draw the same dropout masks at every step", FLEET + "member.py",
        'return f"{self.options.seed}/{self.step}/{chunk}"', 'return f"{self.options.seed}/{chunk}"',
        (TEST_FLEET + "test_member.py",),
    ),
    Mutant(
        "chunks of one member change places", FLEET + "micro_batch.py",
        "first = earliest.get(id(chunk.owner), 0)", "first = 0",
        (TEST_FLEET + "test_micro_batch.py",),
    ),
    Mutant(
        "a loss is a mean over a chunk, not over the step", FLEET + "fleet.py",
        "shares = [1.0 / chunk.owner.totals.tokens for chunk in chunks]",
        "shares = [1.0 / sum(each.supervised for each in chunk.sequences) for chunk in chunks]",
        (TEST_FLEET + "test_member.py",),
    ),
    Mutant(
        "the reference of a pair is the member itself", FLEET + "fleet.py",
        "rows = [MemberRows(None, chunk.sequences, -1) for chunk in references]",
        "rows = [MemberRows(chunk.owner.parts, chunk.sequences, chunk.owner.slot) for chunk in references]",
        (TEST_FLEET + "test_member.py",),
    ),
    Mutant(
        "what was derived keeps its gradient", FLEET + "parts.py",
        "            torch.autograd.backward([end for end, _ in ends], [gradient for _, gradient in ends])\n",
        "            pass\n",
        (TEST_FLEET + "test_methods.py",),
    ),
    Mutant(
        "positions go on from one sequence to the next", FLEET + "model.py",
        "positions = torch.cat([torch.arange(length, device=device) for length in lengths])",
        "positions = torch.arange(sum(lengths), device=device)",
        (TESTS + "test_architectures.py",),
    ),
    Mutant(
        "the initial pair is not taken off", TRAINER + "methods/delta.py",
        '-tensors["initial"]], dim=1)', 'tensors["initial"]], dim=1)',
        (TEST_FLEET + "test_initial_pairs.py",),
    ),
    Mutant(
        "a new period of GaLore loses the one before", TRAINER + "methods/galore.py",
        "        if factor.any():\n", "        if False:\n",
        (TEST_FLEET + "test_pruning_and_projection.py",),
    ),
    Mutant(
        "ranks that were pruned come back", TRAINER + "methods/adalora.py",
        "        else:\n            self._clear_pruned()\n", "",
        (TEST_FLEET + "test_pruning_and_projection.py",),
    ),
    Mutant(
        "the worst of a sweep goes on", TRAINER + "halving.py",
        "if name not in kept:", "if name in kept:",
        (TESTS + "test_train_file.py",),
    ),
    Mutant(
        "an adapter is exported without a look at the base", TRAINER + "fleet_run.py",
        "if refingerprint(self._base) != self._base.spec.fingerprint:", "if False:",
        (TESTS + "test_run.py",),
    ),
    Mutant(
        "a row of the table that diverges has figures", TRAINER + "planning/row_trial.py",
        "            raise Diverged(failure)\n", "            pass\n",
        (TESTS + "planning/test_table.py",),
    ),
    Mutant(
        "a row of the table has a fleet of its own", TRAINER + "planning/row_trial.py",
        "JobFile((prepared.job,), fleet)", "JobFile((prepared.job,))",
        (TESTS + "planning/test_table.py",),
    ),
    Mutant(
        "a measurement imports what lies in the user's directory", TRAINER + "planning/apart.py",
        '"-P", ', "",
        (TESTS + "planning/test_apart.py",),
    ),
    Mutant(
        "one loss that is not finite ends the smoothed line", TRAINER + "tracking/curves.py",
        " if math.isfinite(loss)]", "]",
        (TESTS + "tracking/test_picture.py",),
    ),
)  # fmt: skip
