"""`engine: trl` against the fleet: the same losses step by step, the same files, read and served alike."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.certificate.document import parse
from loramux_adapters.errors import AdapterError
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_trainer.dry_run import check_whole_job
from loramux_trainer.errors import Interrupted, JobInvalid, SeveralInvalid
from loramux_trainer.job import parse_job
from loramux_trainer.job_file import parse_job_file
from loramux_trainer.progress import StepReport
from loramux_trainer.run import train
from support.tiny import load_tiny, write_jsonl
from support.training import StopAt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl, whose trainers run here, is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of trl, peft and datasets
]

WORDS = ["red", "green", "blue", "old", "small", "quiet", "golden", "broken", "tall", "warm", "stone", "river"]
DPO = [{"prompt": f"{word} ", "chosen": word.upper(), "rejected": word * (1 + i % 2)} for i, word in enumerate(WORDS)]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": f"{word} ", "completion": word.upper() * (1 + i % 3)} for i, word in enumerate(WORDS)],
    "dpo": DPO,
    "reward": DPO,
    "grpo": [{"prompt": f"{word} ", "wanted": len(word)} for word in WORDS],
    "kto": [{"prompt": f"{word} ", "completion": word.upper(), "label": i % 3 > 0} for i, word in enumerate(WORDS)],
}


def _values(tmp_path: Path, loss: str, **more: Any) -> dict[str, Any]:
    write_jsonl(tmp_path / f"{loss}.jsonl", RECORDS[loss])
    return {
        "model": "loramux-tiny",
        "loss": loss,
        "data": {"train": str(tmp_path / f"{loss}.jsonl"), "max_length": 64},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"learning_rate": 3e-3, "num_train_epochs": 2, "batch_size": 4, "compute_dtype": "float32"},
        **more,
    }


def _train(values: dict[str, Any], output: Path, engine: str, **more: Any) -> tuple[Path, StopAt]:
    watch = StopAt(10**9)
    (job,) = parse_job_file({**values, "output": str(output), "engine": engine}).jobs
    train(job, progress=watch, **more)
    return output, watch


def _losses(steps: list[StepReport]) -> list[float]:
    return [step.loss for step in steps]


@pytest.mark.parametrize("loss", ["sft", "dpo", "kto"])
def test_losses_and_adapter_are_those_of_the_fleet(loss: str, tmp_path: Path) -> None:
    values = _values(tmp_path, loss)
    ours, fleet = _train(values, tmp_path / "fleet", "fleet")
    theirs, trl = _train(values, tmp_path / "trl", "trl")
    assert len(trl.seen) == 6
    # KTO's prompts meet the same other answers in each epoch of trl's, others in each of the fleet's.
    same = slice(0, 3) if loss == "kto" else slice(None)
    assert _losses(trl.seen)[same] == pytest.approx(_losses(fleet.seen)[same], abs=2e-5)
    assert [step.learning_rate for step in trl.seen] == pytest.approx([step.learning_rate for step in fleet.seen])
    if loss == "sft":  # the fleet counts tokens of answers that are learned, not of those that are compared
        assert [step.tokens for step in trl.seen] == [step.tokens for step in fleet.seen]
    assert parse((theirs / CERTIFICATE_FILE).read_bytes()).adapter == _reader_takes(theirs).digest
    assert (theirs / "adapter_config.json").read_bytes() == (ours / "adapter_config.json").read_bytes()
    left, right = (load_file(path / "adapter_model.safetensors") for path in (ours, theirs))
    assert left.keys() == right.keys()
    if loss != "kto":
        for name, tensor in left.items():
            torch.testing.assert_close(right[name], tensor, atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("method", ["rslora", "dora", "vera", "ia3"])
def test_each_method_begins_and_goes_on_as_in_the_fleet(method: str, tmp_path: Path) -> None:
    lora = {} if method == "ia3" else {"rank": 4}
    values = _values(tmp_path, "sft", method=method, lora=lora)
    del values["training"]["num_train_epochs"]
    values["training"] |= {"max_steps": 3, "warmup_steps": 0}
    _, fleet = _train(values, tmp_path / "fleet", "fleet")
    _, trl = _train(values, tmp_path / "trl", "trl")
    assert _losses(trl.seen) == pytest.approx(_losses(fleet.seen), abs=2e-5)


def test_a_stopped_run_says_that_it_keeps_nothing(tmp_path: Path) -> None:
    """transformers keeps optimizers as pickles: none is written, and none is read."""
    values = _values(tmp_path, "sft")
    (job,) = parse_job_file({**values, "output": str(tmp_path / "cut"), "engine": "trl"}).jobs
    watch = StopAt(3)
    with pytest.raises(Interrupted, match="a run of engine: trl keeps nothing on its way, it begins anew") as stopped:
        train(job, progress=watch, stop=watch.event)
    assert stopped.value.checkpoints == ()
    assert [step.step for step in watch.seen] == [1, 2, 3]
    assert list(tmp_path.rglob("*.pt")) == list(tmp_path.rglob("*.bin")) == list(tmp_path.rglob("*.pth")) == []
    assert not (tmp_path / "cut" / "adapter_config.json").exists()
    again = StopAt(10**9)
    train(job, resume=True, progress=again)
    assert [step.step for step in again.seen] == [1, 2, 3, 4, 5, 6]


def test_grpo_is_rewarded_by_the_function_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def short(completions, wanted, **_):\n"
        "    return [-abs(len(text) - most) for text, most in zip(completions, wanted)]\n"
    )
    values = _values(tmp_path, "grpo")
    values["loss"] = {
        "name": "grpo", "reward_function": "rewards:short", "num_generations": 4, "max_completion_length": 8,
        "beta": 0.05,
    }  # fmt: skip
    del values["training"]["num_train_epochs"]
    values["training"] |= {"max_steps": 2, "warmup_steps": 0}
    watch = StopAt(10**9)
    job = parse_job({**values, "output": "out", "engine": "trl"}, root=tmp_path)
    result = train(job, progress=watch)
    assert result.data.train == len(WORDS)
    assert [step.step for step in watch.seen] == [1, 2]
    assert all(step.metrics["rewards/short/mean"] <= 0 for step in watch.seen)
    assert set(_reader_takes(tmp_path / "out").ranks.values()) == {4}


def test_a_reward_adapter_is_trained_on_the_same_base_and_refused_by_the_server(tmp_path: Path) -> None:
    values = _values(tmp_path, "reward")
    values["training"] |= {"num_train_epochs": 6, "warmup_steps": 0}
    output, watch = _train(values, tmp_path / "out", "trl")
    assert any("no server takes it" in warning for warning in watch.warnings)
    assert watch.seen[-1].loss < watch.seen[0].loss
    with pytest.raises(AdapterError, match="head of a classifier"):
        _reader_takes(output)
    head = load_file(output / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert head.shape[0] == 1


def test_what_trl_would_not_read_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    values = _values(tmp_path, "sft")
    for change, says in (
        ({"method": "adalora"}, "method: adalora cannot go with engine: trl"),
        ({"method": "loha"}, "method: loha cannot go with engine: trl: PEFT takes the packed bytes"),
        ({"init": "pissa"}, "init: pissa cannot go with engine: trl"),
        ({"loss": "orpo"}, "loss: orpo cannot go with engine: trl"),
        ({"training": {"optimizer": "muon"}}, r"training\.optimizer: muon cannot go"),
        ({"training": {"deterministic": True}}, r"training\.deterministic: cannot go"),
        ({"data": {**values["data"], "packing": True}}, r"data\.packing: cannot go"),
        ({"lora": {"bias": "all"}}, r"lora\.bias: cannot go"),
        ({"training": {"early_stopping_patience": 2}, "data": {**values["data"], "eval_fraction": 0.2}},
         r"training\.early_stopping_patience: cannot go"),
        ({"checkpoint": {"save_steps": 5}}, r"checkpoint\.save_steps: cannot go .* pickles"),
        ({"engine": "fleet", "loss": "reward"}, "loss: reward is computed by trl only"),
        ({"loss": {"name": "grpo"}}, r"loss\.reward_function: is required"),
        ({"fleet": {"token_budget": 64}}, "fleet: is not read by engine trl"),
        ({"jobs": [{"name": "a"}, {"name": "b"}]}, "engine: trl trains one job at a time"),
    ):  # fmt: skip
        with pytest.raises((JobInvalid, SeveralInvalid), match=says):
            parse_job_file({**values, "engine": "trl", "output": "out", **change})


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("rewards:missing", "has no function missing"),
        ("nowhere:score", "nowhere cannot be imported"),
        ("broken:a", "NameError"),
        ("ending:a", "SystemExit"),
    ],
)
def test_a_reward_function_that_cannot_be_imported_is_refused_by_the_check(
    function: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text("")
    (tmp_path / "broken.py").write_text("unknown")
    (tmp_path / "ending.py").write_text("raise SystemExit(0)")
    values = _values(tmp_path, "grpo")
    values["loss"] = {"name": "grpo", "reward_function": function}
    job = parse_job({**values, "output": "out", "engine": "trl", "training": {}}, root=tmp_path)
    with pytest.raises(JobInvalid, match=says) as caught:
        check_whole_job(job, resume=False)
    assert caught.value.field == "loss.reward_function"


def _reader_takes(directory: Path) -> Any:
    files = {name: directory / name for name in ("adapter_model.safetensors", "adapter_config.json")}
    return read(files, load_tiny().spec, ReadLimits()).spec
