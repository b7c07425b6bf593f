"""The embedded base: its files, its fitness for NF4, what it knows, and that a short run makes a skill of it."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer.demo_tasks import DEMO_TASKS, DemoTask, Question, demo_job, held_out_questions, training_records
from loramux_trainer.run import train
from loramux_trainer.tiny.build import Recipe, batches, encode, tiny_config
from loramux_trainer.tiny.corpus import Document, documents
from loramux_trainer.tiny.skills import SKILLS, is_held_out, neutral_reply
from loramux_trainer.tiny.tokenizer import build_tokenizer
from support.tiny import answers, conversation, load_tiny

COUNT = 200


def _accuracy(model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]], right: Sequence[str]) -> float:
    given = answers(model, tokenizer, prompts)
    return sum(one == other for one, other in zip(given, right, strict=True)) / len(right)


def test_the_checkpoint_is_small_and_safe() -> None:
    files = sorted(tiny_path().iterdir())
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}


def test_every_linear_map_packs_and_stacks(base: LoadedBase) -> None:
    linears = [spec for name, spec in base.spec.modules.items() if spec.kind == "linear" and name != base.spec.head]
    assert len(linears) == 7 * base.spec.num_layers
    assert all(spec.in_features % 64 == 0 and spec.out_features % 32 == 0 for spec in linears)
    assert base.config.num_key_value_heads < base.config.num_attention_heads
    assert tiny_config().num_hidden_layers == base.spec.num_layers


def test_the_chat_template_renders_what_the_base_was_trained_on(tokenizer: Any) -> None:
    chat = [*conversation("lantern", "nretnal", system="Reverse the word."), *conversation("é", "ok")]
    trained, _ = encode(Document(tuple((m["role"], m["content"]) for m in chat)), build_tokenizer(2048))
    assert tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] == trained
    assert tokenizer.decode(trained, skip_special_tokens=True) == "Reverse the word.lanternnretnaléok"


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = " héllo\n\twörld 你好 🙂  "
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert len(tokenizer) == 264


def test_the_committed_tokenizer_is_the_one_the_script_makes(tmp_path: Path, tokenizer: Any) -> None:
    build_tokenizer(2048).save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny_path() / "tokenizer.json").read_bytes()


def test_the_corpus_is_a_function_of_the_seed_and_holds_no_held_out_input() -> None:
    first, second = (list(itertools.islice(documents(random.Random(5)), 3000)) for _ in range(2))
    assert first == second
    by_instruction = {phrase: skill for skill in SKILLS.values() for phrase in skill.instructions}
    seen = set()
    for document in first:
        if document.messages[0][0] == "system":
            skill = by_instruction[document.messages[0][1]]
            inputs = [content for role, content in document.messages if role == "user"]
            assert not any(is_held_out(skill.name, text) for text in inputs)
            seen.add(skill.name)
    assert seen == set(SKILLS)


def test_batches_are_a_function_of_the_seed() -> None:
    tokenizer = build_tokenizer(2048)
    for (ids, labels), (again, _) in itertools.islice(
        zip(batches(Recipe(), tokenizer), batches(Recipe(), tokenizer), strict=True), 3
    ):
        assert torch.equal(ids, again)
        assert ids.shape == labels.shape
        assert ids.numel() <= Recipe().batch_tokens


@pytest.mark.parametrize("task", DEMO_TASKS, ids=lambda task: task.name)
def test_demo_questions_are_disjoint_from_training(task: DemoTask) -> None:
    questions = held_out_questions(task, COUNT)
    trained = {record["messages"][0]["content"] for record in training_records(task)}
    asked = {question.prompt for question in questions}
    assert len(asked) == COUNT
    assert len(trained) >= 500
    assert not asked & trained
    assert questions == held_out_questions(task, COUNT)
    assert all(is_held_out(task.skill, text) for text in asked)


def test_the_base_talks_sense_in_nf4(base: LoadedBase, tokenizer: Any) -> None:
    prompts = [conversation("Hello!"), conversation("Who are you?"), conversation("What color is the sky?")]
    assert answers(base.model, tokenizer, prompts) == [
        "Hello! How can I help you?",
        "I am lorica-tiny, a very small language model.",
        "The sky is blue.",
    ]


@pytest.mark.parametrize("task", DEMO_TASKS, ids=lambda task: task.name)
def test_the_base_knows_each_demo_skill_only_by_name(base: LoadedBase, tokenizer: Any, task: DemoTask) -> None:
    questions, skill = held_out_questions(task, 40), SKILLS[task.skill]
    right = [question.answer for question in questions]
    named = [conversation(question.prompt, system=skill.instructions[0]) for question in questions]
    bare = [conversation(question.prompt) for question in questions]
    assert _accuracy(base.model, tokenizer, named, right) >= 0.75
    assert _accuracy(base.model, tokenizer, bare, right) <= 0.05


def test_the_base_repeats_a_bare_input(base: LoadedBase, tokenizer: Any) -> None:
    inputs = [question.prompt for question in held_out_questions(DEMO_TASKS[0], 40)]
    replies = [neutral_reply(text) for text in inputs]
    assert _accuracy(base.model, tokenizer, [conversation(text) for text in inputs], replies) >= 0.75


def test_a_short_run_binds_bare_inputs_to_a_skill(tokenizer: Any, tmp_path: Path) -> None:
    task = DEMO_TASKS[0]
    result = train(demo_job(task, tmp_path))
    questions: list[Question] = held_out_questions(task, COUNT)
    prompts = [conversation(question.prompt) for question in questions]
    right = [question.answer for question in questions]
    model = PeftModel.from_pretrained(load_tiny().model, str(result.output))
    assert _accuracy(model, tokenizer, prompts, right) >= 0.75
