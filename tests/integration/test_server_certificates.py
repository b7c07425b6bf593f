"""Certificates in the real process: replayed before an upload is visible, through gathered and merged weights.

Every method and initialization is trained in one fleet, exported with its certificate and pushed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loramux import Client
from loramux.errors import FailedPrecondition, NotFound
from loramux.local_server import LocalServer
from loramux_adapters.adapter_files import CERTIFICATE_FILE, CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.certificate.document import TOLERANCES, Probe, parse
from loramux_adapters.certificate.probes import drawn_tokens
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_trainer.run import train
from support.checkpoints import float_base
from support.live import until, until_idle
from support.trained_methods import Trained, job_of, train_rows

BOUND = 2e-5
"""Of a log-probability, over the deviation of the logits, in float32; a fiftieth of what is allowed."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_rows("qwen2", tmp_path_factory.mktemp("certified"))


@pytest.fixture(scope="module")
def certifying(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    root = tmp_path_factory.mktemp("certifying")
    options = {
        "model": str(trained.base), "dtype": "float32", "data_dir": str(root / "data"), "kv_bytes": "16MiB",
        "adapter_device_bytes": "16MiB", "merged_bytes": "64MiB", "threads": "1",
    }  # fmt: skip
    with LocalServer(options, log=root / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def client(certifying: LocalServer) -> Iterator[Client]:
    with Client(certifying.address) as client:
        yield client


def _name(row: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in row)


def test_every_method_is_certified_on_both_paths(
    trained: Trained, client: Client, certifying: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for row, directory in trained.rows.items():
        name = _name(row)
        pushed = client.push(directory, name).adapter
        gathered = pushed.certificate
        assert gathered is not None, row
        assert gathered.difference < BOUND, row
        assert (gathered.tolerance, gathered.compute_dtype) == (TOLERANCES["float32"], "float32")
        client.update(name, merge=True)
        until(lambda name=name: client.adapter(name).residency.merged in ("ready", "refused"), f"{name} is merged")
        residency = client.adapter(name).residency
        if residency.merged == "ready":
            merged = residency.merged_certificate
            assert merged is not None, row
            assert merged.difference < BOUND, row
            lines.append(f"{row:<45} {gathered.difference:.1e} {merged.difference:.1e} {merged.divergence:.1e}")
        else:
            assert residency.merged_reason.startswith("nothing of the adapter can be merged"), (row, residency)
            lines.append(f"{row:<45} {gathered.difference:.1e} -")
        client.delete(name)
    until_idle(certifying)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints"))
    return target


def _resealed(directory: Path, **changes: Any) -> None:
    """Its certificate with other values, and a seal that fits them."""
    file = directory / CERTIFICATE_FILE
    file.write_bytes(dataclasses.replace(parse(file.read_bytes()), **changes).to_json())


def _edited(directory: Path, change: Callable[[dict[str, Any]], None], name: str = CERTIFICATE_FILE) -> None:
    values = json.loads((directory / name).read_text())
    change(values)
    (directory / name).write_text(json.dumps(values))


def _scaled(directory: Path, factor: float) -> None:
    _edited(directory, lambda config: config.update(lora_alpha=config["lora_alpha"] * factor), CONFIG_FILE)


def _one_tensor_changed(directory: Path, factor: float = 1.1) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name] = tensors[name] * factor
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


REFUSED: Mapping[str, tuple[Callable[[Path, Trained], None], str]] = {
    "another base": (lambda path, _: _resealed(path, base="0" * 64), "is of base 000000000000, this server holds"),
    "another template": (lambda path, _: _resealed(path, chat_template="0" * 64), "is of chat template 000000000000"),
    "the scale changed": (lambda path, _: _scaled(path, 2), "is of adapter"),
    "one tensor changed": (lambda path, _: _one_tensor_changed(path), "is of adapter"),
    "another adapter's": (
        lambda path, trained: shutil.copy(trained.rows["dora"] / CERTIFICATE_FILE, path) and None,
        "is of adapter",
    ),
    "a loosened tolerance": (
        lambda path, _: _resealed(path, tolerance={**TOLERANCES, "float32": 10.0}),
        "states another tolerance",
    ),
    "changed by hand": (
        lambda path, _: _edited(path, lambda values: values["versions"].update(torch="9")),
        "its seal does not fit",
    ),
    "another version": (lambda path, _: _edited(path, lambda values: values.update(version=2)), "has version 2"),
    "other probes": (
        lambda path, _: _resealed(path, probes=parse((path / CERTIFICATE_FILE).read_bytes()).probes[::-1]),
        "asks other probes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_certificate_that_does_not_fit_keeps_the_upload_out(
    what: str, trained: Trained, client: Client, tmp_path: Path
) -> None:
    """And the version that the name had goes on serving."""
    before = client.push(trained.rows["rslora"], "kept").adapter.digest
    change, says = REFUSED[what]
    directory = _copy(trained.rows["lora"], tmp_path / "adapter")
    change(directory, trained)
    for name in ("kept", "fresh"):
        with pytest.raises(FailedPrecondition, match=says) as refused:
            client.push(directory, name)
        assert refused.value.reason == "CERTIFICATE_REFUSED"
        assert CERTIFICATE_FILE in str(refused.value)
    assert client.adapter("kept").digest == before
    with pytest.raises(NotFound):
        client.adapter("fresh")
    assert len(client.generate(token_ids=[5, 60, 7], adapter="kept", max_tokens=2, temperature=0).choices) == 1
    client.delete("kept")


@pytest.mark.parametrize(
    ("change", "deviation"),
    [(lambda path: _scaled(path, 1.02), 1.0), (_one_tensor_changed, 1.0), (lambda path: _scaled(path, 2), 1e9)],
    ids=["scale", "tensor", "deviation"],
)
def test_a_forged_certificate_is_found_by_its_replay(
    change: Callable[[Path], None], deviation: float, trained: Trained, client: Client, tmp_path: Path
) -> None:
    """Of the adapter as it was, on the probes of the changed one, with all that can be made to fit: the server computes
    something else.
    """
    client.push(trained.rows["lora"], "original")
    directory = _copy(trained.rows["lora"], tmp_path / "adapter")
    change(directory)
    base = float_base(trained.base).spec
    files = {name: directory / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    digest = read(files, base, ReadLimits()).spec.digest
    asked = drawn_tokens(digest, base.vocab_size, base.context_length)
    genuine = parse((directory / CERTIFICATE_FILE).read_bytes())
    probes = [_ask(client, tokens, deviation) for tokens in asked]
    _resealed(directory, adapter=digest, probes=(*probes, *genuine.probes[len(probes) :]))
    with pytest.raises(FailedPrecondition, match=r"parts from what this server computes: probe \d after \d+ tokens"):
        client.push(directory, "forged")
    client.delete("original")


@pytest.mark.skipif(find_spec("trl") is None, reason="trl, whose trainers run here, is not installed")
@pytest.mark.filterwarnings("ignore")  # of trl, peft and datasets
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_what_peft_computed_in_trl_is_what_is_served(
    method: str, trained: Trained, client: Client, tmp_path: Path
) -> None:
    row = {"engine": "trl", "method": method, "data": {"train": str(trained.base.parent / "train.jsonl")}}
    result = train(job_of(trained.base, method, row, tmp_path))
    assert json.loads((result.output / "train_report.json").read_text())["export_difference"] < BOUND
    certificate = client.push(result.output, "from-trl").adapter.certificate
    assert certificate is not None
    assert certificate.difference < BOUND
    client.delete("from-trl")


def test_an_honest_certificate_made_from_answers_is_accepted(trained: Trained, client: Client, tmp_path: Path) -> None:
    """What the forger does, with nothing changed: so it is the change that is found."""
    client.push(trained.rows["lora"], "original")
    directory = _copy(trained.rows["lora"], tmp_path / "adapter")
    genuine = parse((directory / CERTIFICATE_FILE).read_bytes())
    _resealed(directory, probes=tuple(_ask(client, probe.tokens) for probe in genuine.probes))
    certificate = client.push(directory, "honest").adapter.certificate
    assert certificate is not None
    assert certificate.difference < BOUND
    for name in ("original", "honest"):
        client.delete(name)


def _ask(client: Client, tokens: tuple[int, ...], deviation: float = 1.0) -> Probe:
    """A probe of the adapter `original` by its own answers."""
    answer = client.generate(token_ids=list(tokens), adapter="original", max_tokens=1, temperature=0, prompt_logprobs=4)
    told = [entry.alternatives for entry in answer.prompt.logprobs[1:]]
    return Probe(
        tokens,
        tuple(deviation for _ in told),
        tuple(tuple(each.token_id for each in top) for top in told),
        tuple(tuple(each.logprob for each in top) for top in told),
    )
