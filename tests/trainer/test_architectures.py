"""The trainer on small random models of other families: what it exports is what PEFT computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from loramux_adapters.base.load import LoadedBase, load_base
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.guard.examine import examine
from loramux_trainer.data.examples import IGNORE, Example
from loramux_trainer.errors import JobInvalid
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.job import TrainConfig
from loramux_trainer.run import train
from support.adapters import files_of

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
CONFIGS = {
    "gpt2": lambda: GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4, n_positions=256),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=32),
    "qwen2": lambda: Qwen2Config(**{key: value for key, value in SHAPE.items() if key != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=32),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_run_on_each_family_gives_what_peft_computes(
    family: str, make_job: Callable[..., TrainConfig], tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = tmp_path / "base"
    AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(source)
    tokenizer.save_pretrained(source)
    job = make_job(lora={"use_rslora": True}, training={"max_steps": 4}, model=str(source))
    result = train(job)
    assert torch.isfinite(torch.tensor(result.loss))

    base = load_base(source, compute_dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("a text of some length, longer than the sliding window")])
    example = Example(tuple(ids[0].tolist()), (IGNORE, *ids[0, 1:].tolist()))
    adapter = _exported(job.output, base)
    with torch.no_grad():
        with FleetModel(base, examine(base, 256)) as model:
            bare, ours = (_log_probs(model, parts, [example]) for parts in (None, adapter))
        logits = PeftModel.from_pretrained(base.model, str(job.output))(input_ids=ids).logits[0, :-1]
    theirs = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert (ours - bare).abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def _exported(directory: Path, base: LoadedBase) -> StepParts:
    """What a server reads."""
    weights = read(files_of(directory), base.spec, ReadLimits())
    return StepParts({name: module.parts for name, module in weights.modules.items()})


def _log_probs(model: FleetModel, parts: StepParts | None, examples: list[Example]) -> torch.Tensor:
    with model.running([MemberRows(parts, tuple(examples), 0)]) as hidden:
        return model.log_probs(hidden)


def test_a_base_that_no_server_serves_is_not_trained(
    make_job: Callable[..., TrainConfig], tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "base"
    options = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    config = Lfm2Config(**options, layer_types=["conv", "full_attention"])
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    with pytest.raises(JobInvalid, match=r"model: .*Lfm2ForCausalLM cannot be served exactly.*could not be served"):
        train(make_job(training={"max_steps": 1}, model=str(source)))


def test_rows_of_a_longrope_base_choose_by_their_own_length(tmp_path: Path) -> None:
    """transformers lets the longest row of a batch, padding included, choose for all."""
    options = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + index for index in range(8)],
        "original_max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    config = Phi3Config(**options, original_max_position_embeddings=32, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8  # so that where a token stands matters
    model.save_pretrained(tmp_path)
    examples = [Example(tuple(range(1, size + 1)), (IGNORE, *range(2, size + 1))) for size in (12, 60)]
    with torch.no_grad():
        plain = load_base(tmp_path, compute_dtype=torch.float32).model
        each = [plain(input_ids=torch.tensor([example.ids])).logits[0, :-1] for example in examples]
        padded = torch.tensor([[*examples[0].ids, *[0] * 48], examples[1].ids])
        naive = plain(input_ids=padded).logits[0, :11]
        base = load_base(tmp_path, compute_dtype=torch.float32)
        with FleetModel(base, examine(base, 256)) as model:
            together = _log_probs(model, None, examples)
    expected = torch.cat(
        [
            logits.log_softmax(-1).gather(1, torch.tensor(example.ids[1:])[:, None])[:, 0]
            for logits, example in zip(each, examples, strict=True)
        ]
    )
    torch.testing.assert_close(together, expected, atol=2e-5, rtol=1e-5)
    assert float((naive - each[0]).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral"])
def test_sequences_of_a_micro_batch_are_each_by_itself(family: str, tmp_path: Path) -> None:
    """Learned positions, windows and caps: each begins at position 0 and sees itself alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 4  # so that where a token stands matters
    model.save_pretrained(tmp_path)
    sizes = (7, 60, 33)
    rows = [tuple(range(start, start + size)) for start, size in zip((3, 40, 90), sizes, strict=True)]
    examples = [Example(row, (IGNORE, *row[1:])) for row in rows]
    base = load_base(tmp_path, compute_dtype=torch.float32)
    with torch.no_grad():
        logits = [base.model(input_ids=torch.tensor([row])).logits[0, :-1] for row in rows]
        with FleetModel(base, examine(base, 256)) as fleet:
            together = _log_probs(fleet, None, examples)
    targets = torch.cat([torch.tensor(row[1:]) for row in rows])
    alone = torch.cat(logits).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(together, alone, atol=5e-4, rtol=1e-4)
