"""Whole small runs on the NF4 base: what comes out, what stays untouched, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer import preparation
from loramux_trainer.checkpoints import list_checkpoints, read_checkpoint
from loramux_trainer.errors import (
    BaseChanged,
    DeviceFull,
    Diverged,
    JobInvalid,
    ModelInvalid,
    SeveralInvalid,
)
from loramux_trainer.export import REPORT
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.parameters import FlatParameters
from loramux_trainer.job import TrainConfig
from loramux_trainer.progress import Silent, StepReport
from loramux_trainer.run import CHECKPOINTS, train
from support.checkpoints import save_checkpoint, wide_model
from support.tiny import conversation, load_tiny, tiny_tokenizer
from support.training import StopAt

JobMaker = Callable[..., TrainConfig]
WEIGHTS = "adapter_model.safetensors"


def test_a_run_learns_and_peft_loads_what_it_exports(make_job: JobMaker, base: LoadedBase, tokenizer: Any) -> None:
    job = make_job(training={"max_steps": 30, "warmup_steps": 2})
    watcher = StopAt(10**9)
    result = train(job, progress=watcher)
    assert [report.step for report in watcher.seen] == list(range(1, 31))
    assert result.loss < 0.5 * watcher.seen[0].loss
    assert result.eval_loss is not None
    assert result.data.eval == 4

    report = json.loads((job.output / REPORT).read_text())
    assert report["job"]["lora"]["rank"] == 4
    assert len(report["history"]) == 30
    with safe_open(job.output / WEIGHTS, framework="pt") as file:  # type: ignore[no-untyped-call]
        assert file.metadata()["loramux_base_fingerprint"] == base.spec.fingerprint == result.base_fingerprint

    ids = torch.tensor([tokenizer.encode("any text at all")])
    with torch.no_grad():
        bare = base.model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(load_tiny().model, str(job.output))(input_ids=ids).logits
    assert (adapted - bare).abs().max() > 0.1


def test_the_same_job_gives_the_same_bytes_and_leaves_the_callers_random_state(make_job: JobMaker) -> None:
    first, second, other = make_job("first"), make_job("second"), make_job("other", training={"seed": 1})
    before = torch.get_rng_state()
    train(first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    train(second)
    train(other)
    assert (first.output / WEIGHTS).read_bytes() == (second.output / WEIGHTS).read_bytes()
    assert (first.output / WEIGHTS).read_bytes() != (other.output / WEIGHTS).read_bytes()


def test_accumulation_does_not_change_the_step(make_job: JobMaker) -> None:
    """Eight rows in one batch or in 4 x 2: the token mean is over the whole step."""
    options = {"max_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant_with_warmup"}
    whole = make_job(
        "one", lora={"dropout": 0.0}, training={**options, "batch_size": 36, "gradient_accumulation_steps": 1}
    )
    parts = make_job(
        "four", lora={"dropout": 0.0}, training={**options, "batch_size": 4, "gradient_accumulation_steps": 9}
    )
    watchers = StopAt(99), StopAt(99)
    train(whole, progress=watchers[0])
    train(parts, progress=watchers[1])
    assert watchers[0].seen[0].tokens == watchers[1].seen[0].tokens
    assert watchers[0].seen[0].loss == pytest.approx(watchers[1].seen[0].loss, rel=1e-5)
    assert watchers[0].seen[0].gradient_norm == pytest.approx(watchers[1].seen[0].gradient_norm, rel=1e-4)


def test_a_padding_token_that_the_model_lacks_is_not_padded_with(make_job: JobMaker, tmp_path: Path) -> None:
    directory = tmp_path / "base"
    shutil.copytree(tiny_path(), directory)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(directory)
    assert tokenizer.pad_token_id >= json.loads((directory / "config.json").read_text())["vocab_size"]
    assert train(make_job(model=str(directory), training={"max_steps": 2})).steps == 2


def test_examples_that_lost_their_end_are_warned_of(make_job: JobMaker) -> None:
    job, watcher = make_job(data={"max_length": 22, "truncation": "truncate"}, training={"max_steps": 1}), StopAt(10**9)
    report = train(job, progress=watcher).data
    assert 0 < report.endless < report.train
    [warning] = watcher.warnings
    assert warning.startswith(f"{report.endless} of {report.train} training examples are truncated before the token")


def test_a_full_device_is_reported(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> dict[str, StepReport]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Fleet, "_step", fail)
    with pytest.raises(DeviceFull, match=r"lower data\.max_length"):
        train(make_job())


def test_warmup_that_eats_the_epochs_is_refused(make_job: JobMaker) -> None:
    with pytest.raises(JobInvalid, match=r"training\.warmup_steps: warm-up of 50 steps leaves none of 5"):
        train(make_job(training={"max_steps": None, "num_train_epochs": 1, "warmup_steps": 50}))


def test_one_step_changes_the_adapter(make_job: JobMaker) -> None:
    job = make_job(training={"max_steps": 1})
    train(job)
    assert any(tensor.any() for name, tensor in load_file(job.output / WEIGHTS).items() if "lora_B" in name)


def test_a_finished_output_is_not_overwritten(make_job: JobMaker) -> None:
    job = make_job(training={"max_steps": 2})
    train(job)
    with pytest.raises(JobInvalid, match="already has an adapter"):
        train(job)


def test_a_base_that_was_written_to_is_noticed(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(training={"max_steps": 3})
    real = preparation.load_base

    class Vandal(Silent):
        def stepped(self, report: StepReport) -> None:
            loaded[0].model.get_submodule("model.layers.0.self_attn.q_proj").weight.data[0] ^= 1  # type: ignore[operator]

    loaded: list[LoadedBase] = []

    def remember(*args: Any, **options: Any) -> LoadedBase:
        loaded.append(real(*args, **options))
        return loaded[0]

    monkeypatch.setattr(preparation, "load_base", remember)
    with pytest.raises(BaseChanged):
        train(job, progress=Vandal())
    assert not (job.output / WEIGHTS).exists()


def test_divergence_ends_the_run_before_the_weights_are_touched(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(checkpoint={"save_steps": 1, "save_total_limit": 1})
    real = FlatParameters.clip
    clipped: list[int] = []

    def poisoned(parameters: FlatParameters, most: float | None) -> float:
        clipped.append(1)
        if len(clipped) == 4:
            parameters.gradients[0] = float("nan")
        return real(parameters, most)

    monkeypatch.setattr(FlatParameters, "clip", poisoned)
    with pytest.raises(Diverged, match=r"step 4.*another output with a lower"):
        train(job)
    checkpoint = read_checkpoint(list_checkpoints(job.output / CHECKPOINTS)[-1])
    assert checkpoint.step == 3
    assert bool(checkpoint.tensors["weights"].isfinite().all())


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"data": {"max_length": 4096, "eval_fraction": 0}}, "an example has 3003 tokens, the base's context is"),
        ({"data": {"max_length": 4096, "eval_fraction": 0, "eval": "long.jsonl"}}, "an example has 3006 tokens"),
        ({"training": {"device": "cuda"}}, "built without CUDA|no CUDA device"),
    ],
)
def test_what_only_the_base_can_tell_is_refused(
    make_job: JobMaker, sections: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on a machine without a GPU
    job = make_job(**sections)
    text = json.dumps({"prompt": "x" * 3000, "completion": "y"})
    if job.data.eval is None:
        job.data.train.write_text(text)
    else:
        job.data.eval.write_text(text.replace('"y"', '"yyyy"'))
    with pytest.raises(JobInvalid, match=says):
        train(job)


@pytest.mark.parametrize("damage", ["unknown type", "encoder and decoder", "tokenizer", "weights"])
def test_a_base_that_cannot_be_loaded_is_told_in_one_line(make_job: JobMaker, tmp_path: Path, damage: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_path(), base)
    config = json.loads((base / "config.json").read_text())
    if damage == "unknown type":
        (base / "config.json").write_text(json.dumps({**config, "model_type": "nobody"}))
    elif damage == "encoder and decoder":
        (base / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    else:
        file = base / ("tokenizer.json" if damage == "tokenizer" else "model.safetensors")
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(JobInvalid, match=r"model: .* cannot be loaded: ") as caught:
        train(make_job(model=str(base)))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_refused(make_job: JobMaker, tmp_path: Path) -> None:
    with pytest.raises(ModelInvalid, match=r"model: there is no directory .*nothing, and it is not a hub id"):
        train(make_job(model=str(tmp_path / "nothing")))


def test_what_the_configuration_and_the_data_tell_is_told_at_once_before_the_load(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(lora={"target_modules": ["q_prj", "v_proj", "w_proj"]}, data={"eval_fraction": 0})
    with job.data.train.open("a") as file:
        file.write(json.dumps({"messages": conversation("a", "b"), "tools": [{"name": "f"}]}))
    monkeypatch.setattr(preparation, "load_base", lambda *args, **options: pytest.fail("the base was loaded"))
    with pytest.raises(SeveralInvalid) as caught:
        train(job)
    assert len(caught.value.problems) == 3
    assert "train.jsonl:41: tools: the base's chat template does not use them" in str(caught.value)
    assert "lora.target_modules: q_prj names no module of loramux-tiny; its linear maps end in" in str(caught.value)
    assert "lora.target_modules: w_proj names no module" in str(caught.value)


def test_bf16_compute_keeps_float32_master_weights(make_job: JobMaker) -> None:
    job = make_job(training={"compute_dtype": "bfloat16", "gradient_checkpointing": True, "max_steps": 4})
    train(job)
    assert {tensor.dtype for tensor in load_file(job.output / WEIGHTS).values()} == {torch.float32}


def test_a_base_that_bitsandbytes_computes_wrongly_is_refused(make_job: JobMaker, tmp_path: Path) -> None:
    """Its NF4 blocks would cross the rows of a 96 wide weight."""
    directory = save_checkpoint(wide_model("llama", hidden_size=96, head_dim=24), tmp_path / "base")
    tiny_tokenizer().save_pretrained(directory)
    with pytest.raises(JobInvalid, match="96 inputs, no multiple of the 64 weights"):
        train(make_job(model=str(directory)))
