"""Files of several jobs: lists, sweeps, what they make of common keys, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.names import NAME
from loramux_trainer.errors import JobInvalid, SeveralInvalid
from loramux_trainer.job import parse_job
from loramux_trainer.job_file import JobFile, parse_job_file, read_job_file
from loramux_trainer.schema.sweep_config import FleetConfig, HalvingConfig, SweepConfig
from loramux_trainer.sweep import combinations, configuration_names

COMMON: dict[str, Any] = {"model": "org/name", "output": "out", "data": {"train": "t.jsonl", "eval_fraction": 0.1}}


def parse(**values: Any) -> JobFile:
    return parse_job_file({**COMMON, **values})


def sweep(**values: Any) -> JobFile:
    return parse(sweep=values)


def refusals(**values: Any) -> list[tuple[str, str]]:
    with pytest.raises((JobInvalid, SeveralInvalid)) as caught:
        parse(**values)
    error = caught.value
    problems = error.problems if isinstance(error, SeveralInvalid) else (error,)
    return [(problem.field, problem.message) for problem in problems if isinstance(problem, JobInvalid)]


def test_one_job_is_a_file_of_one(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**COMMON, "fleet": {"token_budget": 1024}}))
    file = read_job_file(tmp_path / "job.yaml")
    assert file == JobFile((parse_job(COMMON, root=tmp_path),), FleetConfig(token_budget=1024))


def test_jobs_differ_from_the_common_keys_in_their_own(tmp_path: Path) -> None:
    file = parse_job_file(
        {
            **COMMON,
            "lora": {"rank": 8, "alpha": 4},
            "jobs": [
                {"name": "small", "lora": {"rank": 2}},
                {"output": "elsewhere/large", "lora_r": 64},
                {"name": "prompts", "output": "p", "method": "prompt"},
            ],
        },
        root=tmp_path,
    )
    small, large, prompts = file.jobs
    assert [job.name for job in file.jobs] == ["small", "large", "prompts"]
    assert [job.output for job in file.jobs] == [tmp_path / "out/small", tmp_path / "elsewhere/large", tmp_path / "p"]
    assert [(job.lora.rank, job.lora.alpha) for job in (small, large)] == [(2, 4.0), (64, 4.0)]
    assert prompts.method == "prompt"  # which reads no rank: the others do
    assert {job.data.train for job in file.jobs} == {tmp_path / "t.jsonl"}
    assert file.sweep is None


_BY = "read it; remove it (it is read by lora, rslora,"


def test_a_common_key_that_no_job_reads_is_refused_and_so_is_an_own_one() -> None:
    jobs = [{"name": "a", "method": "prompt"}, {"name": "b", "method": "prefix", "lora": {"alpha": 2}}]
    assert refusals(jobs=jobs, lora={"rank": 8, "alpha": 1}) == [
        ("jobs[1].lora.alpha", f"method prefix does not {_BY} dora, adalora, loha, lokr)"),
        ("lora.rank", f"method prompt does not {_BY} dora, adalora, vera, loha, lokr)"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"jobs": []}, "jobs", "must be a list of jobs"),
        ({"jobs": [3]}, "jobs", "must be a list of jobs"),
        ({"jobs": [{"lora": {"rank": 4}}]}, "jobs[0].name", "is required where a job has no output"),
        ({"jobs": [{"name": "a/b"}]}, "jobs[0].name", "must be 1 to 64 letters"),
        ({"jobs": [{"name": "a", "output": "x"}, {"name": "a"}]}, "name", "two jobs have a"),
        ({"jobs": [{"name": "a"}, {"name": "b", "output": "out/a"}]}, "output", "two jobs have out/a"),
        (
            {"jobs": [{"name": "a", "output": "x/../out/b"}, {"name": "b"}]},
            "output",
            "two jobs have out/b, one of them as x/../out/b",
        ),
        (
            {"jobs": [{"name": "a", "output": "out"}, {"name": "checkpoints"}]},
            "output",
            "out/checkpoints is where the job of out keeps its checkpoints",
        ),
        ({"jobs": [{"name": "a", "model": "org/other"}, {"name": "b"}]}, "model", "must be the same in all jobs"),
        ({"jobs": [{"name": "a", "lora": {"rank": 0}}]}, "jobs[0].lora.rank", "must be at least 1"),
        ({"jobs": [{"name": "a", "lora_r": 0}]}, "jobs[0].lora_r", "must be at least 1"),
        ({"jobs": [{"name": "a", "lora": {"rnk": 1}}]}, "jobs[0].lora.rnk", "did you mean rank?"),
        ({"jobs": [{"name": "a", "lora": {"r": 1, "rank": 2}}]}, "jobs[0].lora.r", "is given too"),
        ({"jobs": [{"name": "a", "training": {"clip": 1}}]}, "jobs[0].training.clip", "was renamed"),
        ({"jobs": [{"name": "a"}], "sweep": {}}, "sweep", "cannot go with jobs"),
        ({"jobs": [{"name": "a"}, {"name": "b"}], "training": {"seed": -1}}, "training.seed", "must be at least 0"),
        ({"fleet": {"token_budget": 0}}, "fleet.token_budget", "must be at least 1"),
        ({"fleet": {"budget": 1}}, "fleet.budget", "did you mean token_budget?"),
        ({"sweep": {}}, "sweep.parameters", "is required"),
        ({"sweep": {"parameters": {"lora.rank": 4}}}, "sweep.parameters", "lora.rank must be a list of values"),
        ({"sweep": {"parameters": {"lora.rank": [4, 4]}}}, "sweep.parameters", "a value is given twice"),
        (
            {"sweep": {"parameters": {"lora.rank": [4, 4.0]}}},
            "sweep.parameters",
            "rank-4 and rank-4.0 are the same job",
        ),
        ({"sweep": {"parameters": {"lora.alpha": [16, "16"]}}}, "sweep.parameters", "are the same job"),
        ({"sweep": {"parameters": {"training.optim": ["adamw", "adamw_torch"]}}}, "sweep.parameters", "the same job"),
        (
            {"sweep": {"parameters": {"method": ["lora", "rslora"], "lora.use_rslora": [True]}}},
            "sweep.parameters",
            "the same job",
        ),
        ({"sweep": {"parameters": {"lora.rank": [4]}, "seed": 3}}, "sweep.seed", "a grid draws nothing"),
        ({"sweep": {"parameters": {"lora.rank": [4, 0]}}}, "sweep.parameters.lora.rank", "must be at least 1, not 0"),
        ({"sweep": {"parameters": {"lora.rnk": [4]}}}, "sweep.parameters.lora.rnk", "did you mean rank?"),
        ({"sweep": {"parameters": {"output": ["a"]}}}, "sweep.parameters.output", "has its own already"),
        (
            {"sweep": {"parameters": {"training.seed": [1]}, "repeat": 2}},
            "sweep.parameters.training.seed",
            "repeat gives",
        ),
        ({"sweep": {"parameters": {"lora.r": [1], "lora_r": [2]}}}, "sweep.parameters", "are names of one"),
        (
            {"sweep": {"parameters": {"lora.rank": {"min": 1, "max": 4}}}},
            "sweep.parameters.lora.rank",
            "a grid needs a list",
        ),
        ({"sweep": {"parameters": {"lora.rank": [1]}, "search": "random"}}, "sweep.trials", "is required"),
        ({"sweep": {"parameters": {"lora.rank": [1]}, "trials": 2}}, "sweep.trials", "a grid has every combination"),
        (
            {"sweep": {"parameters": {"lora.rank": [1, 2]}, "trials": 3, "search": "random"}},
            "sweep.trials",
            "only 2 combinations are different",
        ),
        (
            {"sweep": {"parameters": {"lora.rank": list(range(1, 500))}, "repeat": 3}},
            "sweep.parameters",
            "make 1497 jobs",
        ),
        (
            {"sweep": {"parameters": {"training.learning_rate": {"min": 0, "max": 1, "log": True}}}},
            "sweep.parameters",
            "above 0",
        ),
        (
            {"sweep": {"parameters": {"method": ["ia3", "lora"], "lora.rank": [4]}}},
            "sweep.parameters.lora.rank",
            "method ia3",
        ),
        (
            {
                "sweep": {"parameters": {"lora.rank": [1]}, "successive_halving": {"min_steps": 4}},
                "data": {"train": "t"},
            },
            "sweep.successive_halving",
            "needs data.eval",
        ),
        (
            {"sweep": {"parameters": {"loss": ["sft", "dpo"]}, "successive_halving": {"min_steps": 4}}},
            "sweep.successive_halving",
            "another loss.name",
        ),
        (
            {
                "loss": "dpo",
                "sweep": {"parameters": {"loss.beta": [0.1, 0.5]}, "successive_halving": {"min_steps": 4}},
            },
            "sweep.successive_halving",
            "another loss.beta",
        ),
        (
            {"sweep": {"parameters": {"data.max_length": [64, 128]}, "successive_halving": {"min_steps": 4}}},
            "sweep.successive_halving",
            "another data.max_length",
        ),
        (
            {"sweep": {"parameters": {"training.seed": [1, 2]}, "successive_halving": {"min_steps": 4}}},
            "sweep.successive_halving",
            "another training.seed",
        ),
        (
            {
                "sweep": {"parameters": {"lora.rank": [1, 2]}, "successive_halving": {"min_steps": 4}},
                "fleet": {"max_members": 1},
            },
            "fleet.max_members",
            "1 of 2 jobs at a time cannot be compared",
        ),
    ],
)
def test_mistakes_are_named_where_they_stand(values: dict[str, Any], field: str, says: str) -> None:
    [(found, message)] = refusals(**values)
    assert found == field
    assert says in message


def test_jobs_made_in_python_are_checked_too() -> None:
    first = parse_job(COMMON)
    with pytest.raises(JobInvalid, match="jobs: has no job"):
        JobFile(())
    with pytest.raises(SeveralInvalid, match="two jobs have out"):
        JobFile((first, first))
    with pytest.raises(JobInvalid, match="model: must be the same in all jobs"):
        JobFile((first, parse_job({**COMMON, "model": "org/other", "output": "other"})))


def test_epochs_of_the_file_are_for_jobs_without_steps_of_their_own() -> None:
    jobs = [{"name": "a"}, {"name": "b", "training": {"max_steps": 5}}]
    first, second = parse(jobs=jobs, num_train_epochs=2).jobs
    assert (first.training.num_train_epochs, first.training.max_steps, second.training.max_steps) == (2, None, 5)
    jobs = [{"name": "a"}, {"name": "b", "training": {"num_train_epochs": 2}}]
    [(field, why)] = refusals(jobs=jobs, max_steps=5)
    assert (field, "set max_steps to null" in why) == ("jobs[1].training.num_train_epochs", True)
    jobs[1]["training"] = {"num_train_epochs": 2, "max_steps": None}
    assert [job.training.max_steps for job in parse(jobs=jobs, max_steps=5).jobs] == [5, None]


def test_a_mistake_in_a_common_key_is_named_once() -> None:
    jobs = [{"name": "a"}, {"name": "b", "lora": {"rank": 0}}]
    assert [field for field, _ in refusals(jobs=jobs, training={"seed": -1})] == ["training.seed", "jobs[1].lora.rank"]


def test_a_grid_has_every_combination_with_every_seed() -> None:
    file = sweep(parameters={"training.learning_rate": ["1e-4", 2e-4], "lora_r": [4, 8]}, repeat=3)
    assert len(file.jobs) == 12
    assert {(job.training.learning_rate, job.lora.rank, job.training.seed) for job in file.jobs} == {
        (rate, rank, seed) for rate in (1e-4, 2e-4) for rank in (4, 8) for seed in (0, 1, 2)
    }
    assert file.jobs[0].name == "learning_rate-1e-4-lora_r-4-seed-0"
    assert file.jobs[0].output == Path("out/learning_rate-1e-4-lora_r-4-seed-0")
    assert len(set(file.configurations.values())) == 4
    for job in file.jobs:
        assert job.name is not None
        assert job.name == f"{file.configurations[job.name]}-seed-{job.training.seed}"


def test_seeds_begin_with_the_jobs_own() -> None:
    file = parse(training={"seed": 5}, sweep={"parameters": {"lora.rank": [4]}, "repeat": 2})
    assert [job.training.seed for job in file.jobs] == [5, 6]


def test_presets_methods_and_lists_can_be_swept() -> None:
    file = sweep(parameters={"lora.preset": ["classic-qv-r8", "max-r256"]})
    assert [job.lora.rank for job in file.jobs] == [8, 256]
    file = parse(lora={"rank": 4}, sweep={"parameters": {"method": ["lora", "ia3"]}})
    assert [(job.method, job.lora.rank) for job in file.jobs] == [("lora", 4), ("ia3", 16)]
    file = sweep(parameters={"lora.target_modules": [["q_proj", "v_proj"], "all-linear"]})
    assert [job.name for job in file.jobs] == ["target_modules-q_proj_v_proj", "target_modules-all-linear"]


def test_seeds_of_a_configuration_may_hold_out_other_records_and_a_file_of_its_own_needs_no_seed() -> None:
    halving = {"min_steps": 4}
    sweep(parameters={"lora.rank": [4, 8]}, repeat=2, successive_halving=halving)
    data = {"train": "t.jsonl", "eval": "e.jsonl"}
    parse(data=data, sweep={"parameters": {"training.seed": [1, 2]}, "successive_halving": halving})
    assert sweep(parameters={"training.seed": [1, 2]}).incomparable_by == "training.seed"
    assert sweep(parameters={"lora.rank": [4, 8]}, repeat=2).incomparable_by is None


def test_a_drawn_sweep_is_the_same_each_time_and_another_with_another_seed() -> None:
    options: dict[str, Any] = {
        "parameters": {
            "training.learning_rate": {"min": "1e-5", "max": 1e-2, "log": True},
            "lora.rank": {"min": 2, "max": 64},
            "init": ["A", "B"],
        },
        "search": "random",
        "trials": 20,
        "successive_halving": {"min_steps": 10, "eta": 2},
    }
    first, again, other = sweep(**options), sweep(**options), sweep(**options, seed=1)
    assert first == again
    assert first.jobs != other.jobs
    assert first.sweep is not None
    assert first.sweep.successive_halving == HalvingConfig(min_steps=10, eta=2)
    assert len({job.name for job in first.jobs}) == 20
    rates = [job.training.learning_rate for job in first.jobs]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 3e-4 for rate in rates) in range(4, 17)  # half of the logarithm
    assert {job.init for job in first.jobs} == {"A", "B"}
    assert all(isinstance(job.lora.rank, int) for job in first.jobs)


@pytest.mark.parametrize(("low", "high"), [("2", "64"), (2, "64"), ("+2", 64)])
def test_a_whole_number_as_text_draws_whole_numbers(low: object, high: object) -> None:
    options: dict[str, Any] = {"search": "random", "trials": 8}
    jobs = sweep(parameters={"lora.rank": {"min": low, "max": high}}, **options).jobs
    assert jobs == sweep(parameters={"lora.rank": {"min": 2, "max": 64}}, **options).jobs


KEYS = st.sampled_from(["lora.rank", "training.learning_rate", "method", "lora.target_modules"])
VALUES = st.lists(
    st.text(max_size=80) | st.floats(allow_nan=False) | st.lists(st.text(max_size=9)), min_size=1, max_size=4
)


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_names_are_distinct_and_name_adapters_with_a_seed_behind_them(parameters: dict[str, list[Any]]) -> None:
    distinct = {key: tuple({json.dumps(each): each for each in values}.values()) for key, values in parameters.items()}
    found = combinations(SweepConfig(distinct))
    names = configuration_names(found)
    assert len(set(names)) == len(found)
    assert all(NAME.allows(f"{name}-seed-2147483647") for name in names)


def test_the_files_of_the_page_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    listed, swept = (
        parse_job_file(yaml.safe_load(block.partition("```")[0]))
        for block in page.partition("\n## Several jobs in a file\n")[2].partition("\n## ")[0].split("```yaml\n")[1:]
    )
    assert [job.name for job in listed.jobs] == ["small", "large"]
    assert listed.fleet == FleetConfig()
    assert len(swept.jobs) == 16
    assert len(set(swept.configurations.values())) == 8


@pytest.mark.parametrize("key", ["name", "run_name"])
@pytest.mark.parametrize("several", [{"jobs": [{"name": "a"}]}, {"sweep": {"parameters": {"lora.rank": [2, 4]}}}])
def test_a_name_for_all_jobs_of_a_file_is_refused(key: str, several: dict[str, Any]) -> None:
    values = {"model": "loramux-tiny", "output": "out", "data": {"train": "train.jsonl"}, key: "all", **several}
    with pytest.raises(JobInvalid, match=f"^{key}: is of one job"):
        parse_job_file(values)
