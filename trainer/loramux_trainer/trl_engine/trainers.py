"""trl's own trainers with a job's values: their configs by their names, our rows, our learning rates by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch.optim.lr_scheduler import LambdaLR

from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import TrainConfig
from loramux_trainer.reward_function import load_reward_function
from loramux_trainer.schedule import learning_rate
from loramux_trainer.trl_engine.data import TrlData

_OPTIMIZERS: Final[Mapping[str, str]] = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "sgd": "sgd",
    "lion": "lion_32bit",
}
"""Ours -> transformers' names."""
_NAMES: Final[Mapping[str, str]] = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "reward": "Reward"}
_OPTIONS: Final = (
    "beta", "label_smoothing", "desirable_weight", "undesirable_weight", "num_generations", "max_completion_length",
    "temperature",
)  # fmt: skip


def build_trainer(job: TrainConfig, data: TrlData, model: Any, peft_config: Any, device: str) -> Any:
    """The trainer of the job's loss, not yet begun. Raises JobInvalid for what trl refuses."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    name = _NAMES[job.loss.name]
    rows, options = data.train, dict[str, Any]()
    if job.loss.name == "kto" and data.order is not None:
        # trl pairs each prompt with the answer before it once, over the rows as they lie.
        rows = [rows[index] for index in data.order.rows(0)]
    if job.loss.name == "grpo":
        options["reward_funcs"] = load_reward_function(str(job.loss.reward_function))
    try:
        trainer = _class_of(getattr(trl, f"{name}Trainer"), job, data)(
            model=model,
            args=getattr(trl, f"{name}Config")(**_arguments(job, device, evaluates=bool(data.held))),
            train_dataset=Dataset.from_list(rows),
            processing_class=data.reading.tokenizer,
            peft_config=peft_config,
            **({"eval_dataset": Dataset.from_list(data.held)} if data.held else {}),
            **options,
        )
    except (ValueError, TypeError) as error:
        raise JobInvalid("engine", f"trl refuses the job: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _class_of(base: Any, job: TrainConfig, data: TrlData) -> Any:
    class OurTrainer(base):  # type: ignore[misc]
        """trl's, but for where rows, tokens and learning rates come from."""

        _name = base._name

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """Our curve of the step: transformers' own, with a rate above zero where there is one step only."""
            training = job.training

            def factor(step: int) -> float:
                return learning_rate(training, step, num_training_steps) / training.learning_rate

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
            return self.lr_scheduler

    if job.loss.name == "grpo":
        return type("OurGrpoTrainer", (OurTrainer,), {"_tokenize_prompts": _server_tokens(data)})
    methods: dict[str, Any] = {}
    if job.loss.name == "dpo":
        methods["_prepare_dataset"] = _as_it_is
    if data.order is not None and job.loss.name != "kto":
        methods["_get_train_sampler"] = lambda self, train_dataset=None: data.order
    if job.loss.name == "kto":
        methods["_prepare_dataset"] = _with_answers_before
    return type("OurOrderedTrainer", (OurTrainer,), methods)


def _server_tokens(data: TrlData) -> Any:
    def tokenize(self: Any, prompts: Sequence[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """As trl's: ids of each prompt, no images, nothing beside them."""
        return [data.reading.encoder.encode_prompt(prompt) for prompt in prompts], None, {}

    return tokenize


def _as_it_is(self: Any, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
    """Rows that are tokens already."""
    return dataset


def _with_answers_before(self: Any, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
    """trl's own rotation: each prompt of a batch meets the answer before it."""
    if not self.calculate_KL:
        return dataset

    def rotate(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        answers = rows["completion_ids"]
        return {**rows, "KL_completion_ids": [answers[-1], *answers[:-1]]}

    return dataset.map(rotate, batched=True, batch_size=args.per_device_train_batch_size)


def _arguments(job: TrainConfig, device: str, *, evaluates: bool) -> dict[str, Any]:
    training, loss = job.training, job.loss
    values: dict[str, Any] = {
        "output_dir": str(job.output),
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps if training.max_steps is not None else -1,
        "max_grad_norm": training.max_grad_norm or 0.0,
        "optim": _OPTIMIZERS[training.optimizer],
        "weight_decay": training.weight_decay,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "seed": training.seed,
        "use_cpu": device == "cpu",
        # The base has its compute dtype already, the factors are float32.
        "bf16": False,
        "gradient_checkpointing": training.gradient_checkpointing,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",  # transformers keeps optimizers as pickles
        "eval_strategy": ("steps" if training.eval_steps else "epoch") if evaluates else "no",
        "eval_steps": training.eval_steps,
        "prediction_loss_only": True,
        "dataloader_pin_memory": device != "cpu",
    }
    if training.optimizer == "sgd" and training.momentum:
        values["optim_args"] = f"momentum={training.momentum}"
    if loss.name != "grpo":
        values["max_length"] = job.data.max_length
    if loss.name != "sft":
        values["disable_dropout"] = False  # the base's own is off; lora.dropout takes effect
    values |= {name: getattr(loss, name) for name in _OPTIONS if getattr(loss, name) is not None}
    if loss.name in ("dpo", "kto"):
        values["precompute_ref_log_probs"] = loss.precompute_ref_log_probs
    if loss.kind:
        values["loss_type"] = [loss.kind] if loss.name == "dpo" else loss.kind
    return values
