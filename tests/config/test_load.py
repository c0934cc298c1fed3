from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsft.config.load import config_differences, config_to_json, load_config, order_keys
from dsft.config.models import RunConfig
from dsft.errors import ConfigError
from tests.support.run_yaml import write_run_yaml


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_loads_and_keeps_types(tmp_path: Path) -> None:
    config = load_config(write_run_yaml(tmp_path))
    assert config.train.lr == 1e-5
    assert config.train.tokens == 2_500_000
    assert config.data.sources[1].path == ("a.jsonl", "b.jsonl")
    assert config.train.betas == (0.9, 0.95)
    assert config.file == str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("seed: 17", "sed: 17", ["line 1", "run.sed: unknown key", "did you mean run.seed?"]),
        ("  dtype: fp32", "  dtpe: fp32", ["line 4", "model.dtpe: unknown key", "did you mean model.dtype?"]),
        ("weight: 0.2", "wieght: 0.2", ["line 12", "data.sources.1.wieght", "did you mean data.sources.1.weight?"]),
        ("model:\n", "lr: 1\nmodel:\n", ["line 2", "lr: unknown key", "lr belongs to train"]),
        ("seed: 17", "seed: 1.5", ["line 1", "run.seed: expected a whole number, got 1.5"]),
        ("seed: 17", "seed: true", ["line 1", "run.seed: expected a whole number, got true"]),
        ("seed: 17", "seed: yes", ["line 1", "run.seed: expected a whole number, got 'yes'"]),
        ("name: small", "name: 3", ["line 1", "run.name: expected text, got 3"]),
        ("dtype: fp32", "dtype: fp16", ["line 4", "model.dtype: expected 'fp32' or 'bf16', got 'fp16'"]),
        ("lr: 1e-5", "lr: [1]", ["line 17", "train.lr: expected a number, got a list"]),
        ("lr: 1e-5", "lr: -1", ["line 17", "train.lr: expected greater than 0, got -1"]),
        ("lr: 1e-5", "", ["line 13", "train.lr: this key is required"]),
        ("tokens: 2.5M", "tokens: 2.5Q", ["line 14", "train.tokens", "2.5Q", "powers of 1000"]),
        ("tokens: 2.5M", "tokens: 0.5", ["line 14", "train.tokens", "not a whole number"]),
        ("tokens: 2.5M", "tokens: 0", ["line 14", "train.tokens: expected greater than or equal to 1"]),
        ("tokens: 2.5M", "", ["line 13", "exactly one of tokens, steps, epochs"]),
        ("tokens: 2.5M", "epochs: 1", ["train.epochs needs a single source"]),
        ("data:\n", "data:\n  streaming: true\n  store_dir: s3://b/s\n", ["data.streaming", "s3://b/s is a URL"]),
        ("tokens: 2.5M", "tokens: 2.5M\n  spikes: {}", ["train.spikes goes back", "give checkpoint.every_steps"]),
        (
            "path: [a.jsonl, b.jsonl]",
            "path: 3",
            ["line 10", "data.sources.1.path: expected text", "or expected a list"],
        ),
        ("path: [a.jsonl, b.jsonl]", "path: []", ["line 10", "data.sources.1.path", "at least 1 item"]),
        ("path: [a.jsonl, b.jsonl]", "path: ''", ["line 10", "data.sources.1.path", "at least 1 character"]),
        ("path: /models/none", "path: null", ["line 2", "either model.path", "or model.config"]),
        ("name: qa", "name: papers", ["line 7", "two sources share a name", "'papers'"]),
        ("lr: 1e-5\n", "lr: 1e-5\nlog: 3\n", ["line 18", "log: expected a section", "got 3"]),
        ("lr: 1e-5", "lr: 1e-5\n  lr: 2e-5", ["line 18", "train.lr is given twice", "line 17"]),
        ("name: small", "name: a/b", ["line 1", "run.name: expected text that matches"]),
        ("lr: 1e-5", "lr: .inf", ["line 17", "train.lr: expected a finite number"]),
        ("weight: 0.8", "weight: .inf", ["line 8", "data.sources.0.weight: expected a finite number"]),
        ("lr: 1e-5", "lr: 1e-5\n  betas: [0.9, 1.0]", ["line 18", "train.betas.1: expected less than 1"]),
    ],
)
def test_bad_values_name_file_line_key_and_expectation(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    text = message(write_run_yaml(tmp_path, old, new))
    for part in [*parts, str(tmp_path / "run.yaml")]:
        assert part in text
    assert "\n" not in text


def test_several_errors_are_listed_and_counted(tmp_path: Path) -> None:
    path = write_run_yaml(tmp_path, "seed: 17", "a: 1, b: 2, c: 3, d: 4, e: 5, f: 6, seed: x")
    lines = message(path).splitlines()
    assert lines[0] == f"{path} has 7 errors:"
    assert len(lines) == 7
    assert lines[-1].strip() == "and 2 more"


def test_stage_weights_of_an_unknown_source_point_to_the_stage(tmp_path: Path) -> None:
    stages = "  stages:\n    - {until_tokens: 1M, weights: {qa: 1}}\n    - {until_tokens: 2M, weights: {quiz: 1}}\n"
    text = message(write_run_yaml(tmp_path, "train:\n", stages + "train:\n"))
    assert "line 15" in text
    assert "data.stages.1.weights: no source is called 'quiz'" in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["is empty", "run, model, data and train"]),
        ("# only a comment\n", ["is empty"]),
        ("- a\n- b\n", ["line 1", "this is a list"]),
        ("just text\n", ["line 1", "the text 'just text'"]),
    ],
)
def test_files_that_are_no_mapping(tmp_path: Path, content: str, parts: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    for part in parts:
        assert part in message(path)


def test_missing_file_folder_and_binary_file(tmp_path: Path) -> None:
    write_run_yaml(tmp_path)
    assert "there is no file" in message(tmp_path / "rum.yaml")
    assert "run.yaml" in message(tmp_path / "rum.yaml")  # the files that are there are listed
    assert "is a folder" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(tmp_path / "binary.yaml")


def test_overrides(tmp_path: Path) -> None:
    config = load_config(
        write_run_yaml(tmp_path),
        [
            "train.lr=2e-4",
            "data.sources.0.weight=0.5",
            "train.schedule.kind=linear",
            "data.sources[1].path=[x, y]",
            "log={every_steps: 3}",
            "train.tokens=null",
            "train.steps=12",
            "train.lr=3e-4",
        ],
    )
    assert config.train.lr == 3e-4  # the last one wins
    assert config.data.sources[0].weight == 0.5
    assert config.train.schedule.kind == "linear"
    assert config.data.sources[1].path == ("x", "y")
    assert config.log.every_steps == 3
    assert (config.train.tokens, config.train.steps) == (None, 12)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lrr=1", ["--set train.lrr", "did you mean train.lr?"]),
        ("train.lr=fast", ["--set train.lr: expected a number, got 'fast'"]),
        ("train.lr", ["write it as --set section.key=value"]),
        ("=3", ["write it as --set section.key=value"]),
        ("train..lr=3", ["write it as --set section.key=value"]),
        ("data.sources.2.weight=1", ["data.sources is a list of 2", "0 to 1"]),
        ("data.sources.first.weight=1", ["data.sources is a list of 2"]),
        ("run.seed.x=1", ["run.seed is the value 17 and has no keys"]),
        ("train.lr=[1", ["--set train.lr", "not valid YAML"]),
        ("train.schedule.warmup_steps=1.5", ["--set train.schedule.warmup_steps", "not a whole number"]),
        ("nosection.x=3", ["--set nosection.x: ", "unknown key"]),
        ("data.sources[2].weight=1", ["data.sources is a list of 2", "0 to 1"]),
        ("run.dir=~/runs", ["--set run.dir", "'~/runs' begins with '~'", "written out"]),
        ("run.dir=", ["--set run.dir", "expected text"]),
        ("run.dir=''", ["--set run.dir", "at least 1 character"]),
        ("data.store_dir=$HOME/store", ["--set data.store_dir", "written out"]),
    ],
)
def test_bad_overrides_name_themselves(tmp_path: Path, override: str, parts: list[str]) -> None:
    text = message(write_run_yaml(tmp_path), override)
    for part in parts:
        assert part in text
    assert "run.yaml" not in text  # the file is not to blame


@pytest.mark.parametrize(
    ("schedule", "part"),
    [
        ("kind: warmup_stable_decay", "needs decay_tokens"),
        ("kind: warmup_stable_decay, decay_steps: 5", "give decay_tokens instead of decay_steps"),
        ("kind: warmup_stable_decay, warmup_tokens: 1M, decay_tokens: 2M", "3,000,000 tokens, but the run has only"),
        ("kind: cosine, warmup_tokens: 3M", "the run has only 2,500,000; shorten them"),
        ("kind: cosine, decay_tokens: 1M", "cosine would ignore it"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_any_data_is_read(tmp_path: Path, schedule: str, part: str) -> None:
    text = message(write_run_yaml(tmp_path, "lr: 1e-5", f"lr: 1e-5\n  schedule: {{{schedule}}}"))
    assert f"{tmp_path / 'run.yaml'}, line 18: train.schedule: " in text
    assert part in text


def test_a_schedule_over_epochs_is_checked_when_the_data_is_known(tmp_path: Path) -> None:
    overrides = ("data.sources=[{name: s, path: p}]", "train.tokens=null", "train.epochs=2")
    load_config(write_run_yaml(tmp_path), (*overrides, "train.schedule={kind: cosine, warmup_tokens: 90B}"))
    text = message(write_run_yaml(tmp_path), *overrides, "train.schedule={kind: warmup_stable_decay, decay_steps: 3}")
    assert "give decay_tokens instead of decay_steps" in text


def test_json_round_trip(tmp_path: Path) -> None:
    config = load_config(write_run_yaml(tmp_path))
    values = json.loads(json.dumps(config_to_json(config)))
    assert config_to_json(RunConfig.model_validate(values)) == values
    assert values["train"]["tokens"] == 2_500_000
    assert values["checkpoint"]["keep_last"] == 3  # defaults are stated


def test_nothing_of_the_environment_is_in_the_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "not-for-dumps")
    assert "not-for-dumps" not in json.dumps(config_to_json(load_config(write_run_yaml(tmp_path))))


@pytest.mark.parametrize(
    ("override", "changes_data_order"),
    [
        ("run.seed=18", True),
        ("train.global_batch_packs=8", True),
        ("data.pack_tokens=512", True),
        ("data.sources.0.weight=0.7", True),
        ("data.sources.1.supervise=all", True),
        ("data.window_tokens=1M", True),
        ("data.packing=next_fit", True),
        ("model.add_tokens=[<x>]", True),
        ("data.sources.0.loss_weight=2", False),
        ("data.store_dir=elsewhere", False),
        ("data.bad_records=skip", False),
        ("data.audit.ngram_words=8", False),
        ("train.tokens=3M", False),
        ("train.lr=1", False),
        ("train.micro_batch_packs=1", False),
        ("log.every_steps=5", False),
        ("checkpoint.every_steps=5", False),
        ("evaluate.every_steps=5", False),
        ("run.dir=elsewhere", False),
    ],
)
def test_differences_say_what_changes_the_data_order(tmp_path: Path, override: str, changes_data_order: bool) -> None:
    path = write_run_yaml(tmp_path)
    old, new = load_config(path), load_config(path, [override])
    differences = config_differences(config_to_json(old), config_to_json(new))
    assert [d.changes_data_order for d in differences] == [changes_data_order]
    assert differences[0].key.startswith(override.split("=")[0])
    assert (order_keys(config_to_json(old)) != order_keys(config_to_json(new))) == changes_data_order


def test_a_checkpoint_from_before_a_key_of_the_order_has_what_was_then_the_only_way(tmp_path: Path) -> None:
    path = write_run_yaml(tmp_path)
    old, same = config_to_json(load_config(path)), config_to_json(load_config(path))
    del old["data"]["packing"]
    assert not config_differences(old, same)
    other = config_to_json(load_config(path, ["data.packing=concat_and_split"]))
    assert [(d.key, d.old, d.changes_data_order) for d in config_differences(old, other)] == [
        ("data.packing", "best_fit_decreasing", True)
    ]


def test_differences_of_absent_keys(tmp_path: Path) -> None:
    path = write_run_yaml(tmp_path)
    old = config_to_json(load_config(path))
    new = config_to_json(load_config(path, ["data.stages=[{until_tokens: 1M, weights: {qa: 1}}]"]))
    found = {d.key: (d.old, d.new) for d in config_differences(old, new)}
    assert found["data.stages.0.weights.qa"] == (None, 1.0)
    assert not config_differences(old, old)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("{format: alpaca, columns: {question: q}}", ["has no field 'question'", "instruction, input, output"]),
        ("{format: text, columns: {text: body}}", ["has no field 'text'", "text_field"]),
        ("{format: alpaca, columns: {input: q, output: q}}", ["two fields are read from one column"]),
        ("{format: chat}", ["data.sources.0.format"]),
        ("{format: alpaca, objective: {kind: fim}}", ["fim is for raw text", "alpaca"]),
        ("{objective: {kind: fim, rate: 2}}", ["data.sources.0.objective", "less than or equal to 1, got 2"]),
        ("{objective: {kind: fim, prefix: a, suffix: a}}", ["the sentinels must differ"]),
    ],
)
def test_columns_and_objective_fit_the_format(tmp_path: Path, override: str, parts: list[str]) -> None:
    text = message(write_run_yaml(tmp_path), f"data.sources.0={override[:-1]}, name: a, path: a.jsonl}}")
    assert all(part in text for part in parts), text


SILENT = ["data.sources.0.loss_weight=0", "data.sources.1.loss_weight=0"]
HELD_OUT = "evaluate.sets=[{name: held, path: h.jsonl, generate: 4}]"
MESSAGE = "train.loss_reduction=message"
NAMED_TWICE = "evaluate.sets=[{name: held, path: h.jsonl}, {name: held, path: i.jsonl}]"
UNLINKED = ["evaluate.sets=[{name: held, path: h.jsonl}]", "evaluate.early_stop={patience: 2}"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (SILENT, "every source drawn has loss_weight 0"),
        (["data.stages=[{until_tokens: 9, weights: {qa: 1}}]", SILENT[1]], "data.stages.0.weights: every source drawn"),
        ([HELD_OUT], "raw text has none"),
        ([NAMED_TWICE], "two sets share a name: 'held'"),
        (UNLINKED, "needs a set whose source is given"),
        ([MESSAGE, "data.sources.1.supervise=all"], "data.sources.1 learns tokens that belong to no message"),
        ([MESSAGE, "data.sources.0.objective={kind: fim}"], "data.sources.0 learns tokens that belong to no message"),
    ],
)
def test_what_could_teach_or_decide_nothing(tmp_path: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_run_yaml(tmp_path), overrides)
    assert part in str(caught.value)


def test_streaming_does_not_know_the_length_of_an_epoch() -> None:
    values = {
        "run": {"name": "t", "dir": "runs"},
        "model": {"path": "m"},
        "data": {"pack_tokens": 8, "sources": [{"name": "a", "path": "a"}], "streaming": True},
        "train": {"epochs": 1, "global_batch_packs": 1, "lr": 1e-3},
    }
    with pytest.raises(ValueError, match=r"with data.streaming they are not known at the start: give train.tokens"):
        RunConfig.model_validate(values)
