"""Faults that certificates and their replays could have; see `catalog`."""

from __future__ import annotations

from mutant import Mutant

CERTIFICATE, SERVER = "adapters/loramux_adapters/certificate/", "server/loramux_server/"
STORE = "adapters/loramux_adapters/store/"
TEST_CERTIFICATE, TEST_SERVER, TEST_STORE = "tests/adapters/certificate/", "tests/server/", "tests/adapters/store/"

CERTIFICATE_MUTANTS = (
    Mutant(
        "a tolerance that was loosened by hand counts",
        CERTIFICATE + "document.py",
        "    if dict(certificate.tolerance) != dict(TOLERANCES):\n",
        "    if False:\n",
        (TEST_CERTIFICATE + "test_document.py",),
    ),
    Mutant(
        "a certificate of another adapter passes",
        CERTIFICATE + "replay.py",
        "    if certificate.adapter != adapter:\n",
        "    if False:\n",
        (TEST_CERTIFICATE + "test_replay.py",),
    ),
    Mutant(
        "a log-probability that is no number is no distance",
        CERTIFICATE + "replay.py",
        "    apart |= {token: math.inf for token, own in found.items() if math.isnan(own)}\n",
        "",
        (TEST_CERTIFICATE + "test_replay.py",),
    ),
    Mutant(
        "a certificate may name unlikely tokens as the most likely",
        CERTIFICATE + "replay.py",
        "max(0.0, own - uncertified)",
        "0.0",
        (TEST_CERTIFICATE + "test_replay.py",),
    ),
    Mutant(
        "a wide deviation loosens the tolerance",
        CERTIFICATE + "replay.py",
        "min(probe.deviations[place], _WIDEST)",
        "probe.deviations[place]",
        (TEST_CERTIFICATE + "test_replay.py",),
    ),
    Mutant(
        "a replay that was cut off holds",
        SERVER + "certification.py",
        "        if len(found) != len(tokens) - 1:",
        "        if False:",
        (TEST_SERVER + "test_certification.py",),
    ),
    Mutant(
        "what parts is published all the same",
        SERVER + "publishing.py",
        "            check_replay(replay)\n",
        "",
        (TEST_SERVER + "test_publishing.py",),
    ),
    Mutant(
        "what was tried and refused stays in memory",
        SERVER + "publishing.py",
        "        if not self._store.existing([digest]):\n",
        "        if False:\n",
        (TEST_SERVER + "test_publishing.py",),
    ),
    Mutant(
        "merged weights on trial are used by everybody",
        SERVER + "engine/step_builder.py",
        'routes = ("merged", "any") if chosen in ready else ("merged",)',
        'routes = ("merged", "any")',
        (TEST_SERVER + "engine/test_merged_routes.py",),
    ),
    Mutant(
        "merged weights that were refused stay on the device",
        SERVER + "model/merged_weights.py",
        "                    self._drop(digest)\n                    self._sets[digest] = begun\n",
        "                    self._on_trial -= {digest}\n",
        (TEST_SERVER + "model/test_merged_weights.py",),
    ),
    Mutant(
        "a name that somebody else has moved is switched",
        STORE + "changes.py",
        "    if change.if_version:\n",
        "    if False:\n",
        (TEST_STORE + "test_store_switch.py",),
    ),
    Mutant(
        "an upload takes a name that somebody else has taken meanwhile",
        STORE + "changes.py",
        "    if manifest.if_version is not None and current != spec.digest:",
        "    if manifest.if_version and current != spec.digest:",
        (TEST_STORE + "test_store_switch.py",),
    ),
    Mutant(
        "a version of another tenant can be taken",
        STORE + "changes.py",
        '        WHERE h.tenant = ? AND substr(v.digest, 1, ?) = ?""",\n        (tenant, len(prefix), prefix),',
        '        WHERE h.tenant != \'\' AND substr(v.digest, 1, ?) = ?""",\n        (len(prefix), prefix),',
        (TEST_STORE + "test_store_switch.py",),
    ),
)
