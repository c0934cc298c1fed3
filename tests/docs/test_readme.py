"""Every command of the README is run, on the README's own configuration, with sizes cut down."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
import zstandard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.conftest import REPOSITORY
from tests.support.tokenizers import tiny_tokenizer_folder

README = (REPOSITORY / "README.md").read_text()
SMALLER = [
    "model.dtype=fp32",
    "data.pack_tokens=256",
    "data.stages.0.until_tokens=3000",
    "data.stages.1.until_tokens=6000",
    "train.global_batch_packs=4",
    "train.schedule.warmup_tokens=500",
    "train.schedule.decay_tokens=1000",
    "evaluate.sets.1.generate=2",
    "evaluate.sets.1.max_new_tokens=4",
]
RUN_ELSEWHERE = {
    "make install": "CI's first step",
    "make demo": "tests/demo/test_whole_demo.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def write_data(folder: Path) -> None:
    """What the README's user has: a base model, papers, general text, questions with answers, held-out sets."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder(folder))
    tokenizer.save_pretrained(folder / "models/base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "models/base")
    texts = [{"text": f"Study {n}: patients on drug {n * 7 % 11} slept {n % 5 + 4} hours. " * 5} for n in range(80)]
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"How long did patients on drug {n} sleep?"},
                {"role": "assistant", "content": f"They slept {n % 5 + 4} hours."},
            ]
        }
        for n in range(80)
    ]
    for name, records in {
        "data/papers/a.jsonl.zst": texts[:60],
        "data/general/b.jsonl": texts[:20],
        "data/qa/c.jsonl": talks[:60],
        "data/held_out/papers.jsonl": texts[60:],
        "data/held_out/qa.jsonl": talks[60:],
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(zstandard.compress(data) if name.endswith(".zst") else data)
    (folder / "hosts.txt").write_text("localhost slots=2\n")
    (folder / "run.yaml").write_text(blocks("yaml")[0])
    (folder / "ds_configs").symlink_to(REPOSITORY / "ds_configs")


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    write_data(folder)
    return folder


def run_command(command: str, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
    if words[0] == "deepspeed":  # the port is fixed unless given, and this machine may have no ssh server
        words[1:1] = ["--master_port", str(port), "--master_addr", "127.0.0.1", "--no_ssh_check"]
    if "run.yaml" in words:
        is_resume = "--resume" in words  # of a finished run, which is made longer here
        tokens = "train.tokens=8000" if is_resume else "train.tokens=6000"
        words += [word for setting in [*SMALLER, tokens] for word in ("--set", setting)]
        words += ["--allow-lr-jump"] if is_resume else []
    return subprocess.run(
        words, cwd=folder, env=environ, capture_output=True, text=True, timeout=240, check=False, start_new_session=True
    )


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(user_folder: Path) -> None:
    ran = 0
    for number, command in enumerate(commands()):
        if command in RUN_ELSEWHERE:
            continue
        done = run_command(command, user_folder, 29600 + number)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran == 8
    assert "--nodes=4" in (user_folder / "run.sbatch").read_text()
    records = [json.loads(line) for line in (user_folder / "runs/medical/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert {record["stage"] for record in steps} == {0, 1}
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1)), "the resume went on, nothing twice"
    assert steps[-1]["tokens_trained"] >= 8000
    exported = user_folder / "exported"
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") < model.get_input_embeddings().num_embeddings
    assert tokenizer.chat_template is not None


def test_the_configuration_of_the_readme_is_valid(tmp_path: Path) -> None:
    from dsft.config.load import load_config

    (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
    config = load_config(tmp_path / "run.yaml")
    assert config.train.tokens == 2_200_000_000
    assert yaml.safe_load(blocks("yaml")[0])["model"]["path"] == config.model.path
    assert len(blocks("yaml")) == 1


def test_every_link_of_the_readme_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target
