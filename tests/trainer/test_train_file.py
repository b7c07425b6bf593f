"""Files of several jobs and sweeps through the one entry point: each with its own output, and the best one named."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from loramux_adapters.adapter_files import ADAPTERHUB_WEIGHTS_FILE
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_trainer.errors import Interrupted, JobInvalid
from loramux_trainer.fleet.parameters import FlatParameters
from loramux_trainer.run import train, train_file
from support.adapters import files_of
from support.tiny import write_jsonl
from support.training import Watcher, job_file, job_values

WEIGHTS = "adapter_model.safetensors"
PAIRS = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
LABELS = [{"prompt": f"say {i}", "completion": f"it {i}", "label": bool(i % 2)} for i in range(12)]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    write_jsonl(tmp_path / "labels.jsonl", LABELS)
    return job_values(tmp_path)


def test_jobs_of_many_methods_losses_and_optimizers_train_in_one_fleet(
    values: dict[str, Any], base: LoadedBase, tmp_path: Path
) -> None:
    """Each leaves an adapter that a server reads, with the method that was asked for."""
    pairs, labels = ({"train": str(tmp_path / f"{name}.jsonl"), "eval_fraction": 0} for name in ("pairs", "labels"))
    jobs: list[dict[str, Any]] = [
        {"name": "lora", "lora": {"rank": 4, "dropout": 0.1}},
        {"name": "dora", "method": "dora", "lora": {"rank": 4}},
        {"name": "plus", "lora": {"rank": 4, "loraplus_lr_ratio": 8}, "training": {"optimizer": "sgd"}},
        {"name": "adalora", "method": "adalora", "lora": {"rank": 2}, "adalora": {"delta_t": 1}},
        {"name": "vera", "method": "vera", "lora": {"rank": 32}},
        {"name": "loha", "method": "loha", "lora": {"rank": 3}},
        {"name": "lokr", "method": "lokr", "lora": {"rank": 3}},
        {"name": "ia3", "method": "ia3"},
        {"name": "norms", "method": "bitfit", "bitfit": {"biases": False, "norms": True}},
        {"name": "prompt", "method": "prompt", "prompt": {"num_virtual_tokens": 4, "prompt_tuning_init_text": "say"}},
        {"name": "p", "method": "p-tuning", "prompt": {"num_virtual_tokens": 3, "encoder_hidden_size": 16}},
        {"name": "prefix", "method": "prefix", "prompt": {"num_virtual_tokens": 3, "prefix_projection": True}},
        {"name": "houlsby", "method": "bottleneck", "bottleneck": {"kind": "houlsby"}},
        {"name": "galore", "method": "galore", "galore": {"rank": 2, "update_proj_gap": 2}},
        *({"name": init, "init": init, "lora": {"rank": 4}} for init in ("B", "gaussian", "orthogonal", "eva")),
        *({"name": init, "init": init, "lora": {"rank": 4}} for init in ("pissa", "olora", "corda", "lora-ga")),
        {"name": "small", "init": "pissa", "lora": {"rank": 4, "rank_budget": 5}},
        {"name": "dpo", "loss": "dpo", "data": pairs, "lora": {"rank": 4}},
        {"name": "dpo-once", "loss": {"name": "dpo", "precompute_ref_log_probs": True}, "data": pairs},
        {"name": "kto", "loss": "kto", "data": labels, "lora": {"rank": 4}},
        {"name": "orpo", "loss": "orpo", "data": pairs, "lora": {"rank": 4}},
        {"name": "muon", "training": {"optimizer": "muon"}, "lora": {"rank": 4}},
        {"name": "lion", "training": {"optimizer": "lion"}, "lora": {"rank": 4}},
        {"name": "sophia", "training": {"optimizer": "sophia", "hessian_update_period": 2}, "lora": {"rank": 4}},
    ]
    values["training"]["max_steps"] = 3
    file = job_file(values, jobs=jobs)
    watcher = Watcher(file)
    outcome = train_file(file, progress=watcher)
    assert not outcome.failures
    assert watcher.states == {str(job["name"]): "finished" for job in jobs}
    kinds = {}
    for name, result in outcome.results.items():
        assert result.steps == 3
        assert len(watcher.jobs[name].seen) == 3
        weights = read(files_of(result.output), base.spec, ReadLimits())
        assert weights.spec.base_fingerprint == base.spec.fingerprint, name
        kinds[name] = weights.spec.kind
    assert kinds["lora"] == kinds["pissa"] == kinds["galore"] == "lora"
    assert kinds["norms"] == "ln tuning"
    assert kinds["houlsby"] == "bottleneck"
    for name in ("dora", "adalora", "vera", "loha", "lokr", "ia3"):
        assert kinds[name] == name
    assert {min(t.shape) for t in load_file(outcome.results["olora"].output / WEIGHTS).values()} == {8}
    assert {min(t.shape) for t in load_file(outcome.results["small"].output / WEIGHTS).values()} == {5}
    assert any("of its energy" in message for message in watcher.jobs["small"].warnings)
    assert (outcome.results["houlsby"].output / ADAPTERHUB_WEIGHTS_FILE).exists()
    assert outcome.best is None


@pytest.mark.usefixtures("one_thread")
def test_a_job_in_a_fleet_is_the_job_alone(values: dict[str, Any], tmp_path: Path) -> None:
    """In deterministic mode to the byte, also where others take turns in one place."""
    values["training"]["deterministic"] = True
    jobs = [{"name": f"r{rank}", "lora": {"rank": rank}, "training": {"seed": rank}} for rank in (2, 5, 9)]
    outcome = train_file(job_file(values, jobs=jobs, fleet={"max_members": 2, "token_budget": 64}))
    alone = job_file({**values, "output": str(tmp_path / "alone")}, jobs=jobs).jobs
    for job in alone:
        train(job)
        ours = (outcome.results[job.run_name].output / WEIGHTS).read_bytes()
        assert ours == (job.output / WEIGHTS).read_bytes()


def test_a_sweep_ends_losers_early_and_names_the_best(values: dict[str, Any]) -> None:
    sweep = {
        "parameters": {"training.learning_rate": [1e-6, 1e-2], "lora.rank": [2, 8]},
        "repeat": 2,
        "successive_halving": {"min_steps": 2, "eta": 2},
    }
    file = job_file(values, sweep=sweep)
    watcher = Watcher(file)
    outcome = train_file(file, progress=watcher)
    assert len(file.jobs) == 8
    assert len(outcome.stopped) == 6
    assert len(outcome.results) == 2  # both seeds of one configuration
    assert outcome.best is not None
    assert "learning_rate-0.01" in outcome.best.name
    assert outcome.best.run in outcome.results
    assert outcome.best.describe().startswith(outcome.best.name)
    steps = sorted({watcher.jobs[name].seen[-1].step for name in outcome.stopped})
    assert steps == [2, 4]
    for job in file.jobs:
        assert (job.output / WEIGHTS).exists() == (job.name in outcome.results)
        assert job.output.exists() == (job.name in outcome.results)


def test_a_job_that_diverges_leaves_the_others_alone(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = FlatParameters.clip
    sizes: list[int] = []

    def poisoned(parameters: FlatParameters, most: float | None) -> float:
        sizes.append(len(parameters.weights))
        if len(parameters.weights) == max(sizes) and sizes.count(max(sizes)) == 3:
            parameters.gradients.fill_(float("inf"))
        return real(parameters, most)

    monkeypatch.setattr(FlatParameters, "clip", poisoned)
    file = job_file(values, jobs=[{"name": "good", "lora": {"rank": 2}}, {"name": "bad", "lora": {"rank": 4}}])
    watcher = Watcher(file)
    outcome = train_file(file, progress=watcher)
    assert outcome.results.keys() == {"good"}
    assert "step 3" in outcome.failures["bad"]
    assert watcher.states == {"bad": "diverged", "good": "finished"}
    assert [path.name for path in (file.jobs[1].output / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_an_optimizer_left_between_two_steps_is_not_saved(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its moments are of a step that was not taken."""
    real = FlatParameters.is_finite.fget
    assert real is not None
    sizes: list[int] = []

    def broken(parameters: FlatParameters) -> bool:
        sizes.append(len(parameters.weights))
        is_third_of_largest = sizes[-1] == max(sizes) and sizes.count(max(sizes)) == 3
        return bool(real(parameters)) and not is_third_of_largest

    monkeypatch.setattr(FlatParameters, "is_finite", property(broken))
    jobs = [{"name": "good", "lora": {"rank": 2}}, {"name": "bad", "lora": {"rank": 4}}]
    file = job_file(values, jobs=jobs)
    outcome = train_file(file, progress=Watcher(file))
    assert outcome.results.keys() == {"good"}
    assert outcome.failures["bad"] == "step 3: the optimizer made weights that are not finite"
    assert not (file.jobs[1].output / "checkpoints").exists()


def test_ia3_s_feedforward_modules_are_each_among_the_selected(values: dict[str, Any]) -> None:
    lora = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj", "up_proj"]}
    with pytest.raises(JobInvalid, match=r"^lora.feedforward_modules: 'up_proj' matches none of the selected"):
        train_file(job_file(values, method="ia3", lora=lora))


def test_a_fleet_that_is_stopped_goes_on_to_the_same_bytes(values: dict[str, Any], tmp_path: Path) -> None:
    jobs = [
        {"name": "a", "lora": {"rank": 4, "dropout": 0.2}},
        {"name": "b", "method": "ia3", "training": {"optimizer": "lion"}},
    ]
    whole = train_file(job_file({**values, "output": str(tmp_path / "whole")}, jobs=jobs))
    file = job_file(values, jobs=jobs)
    watcher = Watcher(file, ("a", 3))
    with pytest.raises(Interrupted, match=r"stopped after saving .*/a/checkpoints/step-\d+ and 1 more; ") as stopped:
        train_file(file, progress=watcher, stop=watcher.event)
    assert [path.parent.parent.name for path in stopped.value.checkpoints] == ["a", "b"]
    rest = Watcher(file)
    outcome = train_file(file, resume=True, progress=rest)
    assert rest.steps("b") == [4, 5, 6]
    for name in ("a", "b"):
        ours, theirs = (result.results[name].output / WEIGHTS for result in (outcome, whole))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_job_that_is_found_invalid_late_does_not_end_the_others(values: dict[str, Any]) -> None:
    jobs = [{"name": "good", "lora": {"rank": 2}}, {"name": "bad", "init": "pissa", "lora": {"rank": 300}}]
    file = job_file(values, jobs=jobs, fleet={"max_members": 1})
    watcher = Watcher(file)
    outcome = train_file(file, progress=watcher)
    assert outcome.results.keys() == {"good"}
    assert "directions that init pissa finds" in outcome.failures["bad"]
    assert watcher.states == {"good": "finished", "bad": "refused"}


def test_virtual_tokens_count_against_the_context(values: dict[str, Any]) -> None:
    with pytest.raises(JobInvalid, match=r"an example has \d+ tokens, the base's context is"):
        train_file(job_file(values, method="prompt", prompt={"num_virtual_tokens": 2040}))


def test_what_cannot_go_together_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(JobInvalid, match=r"bitfit\.biases: .* has no biases"):
        train_file(job_file(values, method="bitfit"))
    with pytest.raises(JobInvalid, match=r"lora\.rank: 300 is more than the \d+ directions"):
        train_file(job_file(values, init="pissa", lora={"rank": 300}))
