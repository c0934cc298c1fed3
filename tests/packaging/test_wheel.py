"""The wheel, built from its sources alone and installed where no checkout is, trains a step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.tokenizers import tiny_tokenizer_folder

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

RUN_YAML = """\
run: {name: wheel, dir: run}
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 2, vocab_size: 700, max_position_embeddings: 64}
  tokenizer: tokenizer
  dtype: fp32
data:
  pack_tokens: 64
  sources: [{name: text, path: text.jsonl}]
train: {steps: 1, global_batch_packs: 2, lr: 1e-3}
deepspeed: {zero_optimization: {stage: 3, reduce_bucket_size: 100000, stage3_prefetch_bucket_size: 100000}}
"""


def checked(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed within five minutes."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of its sources, so that nothing of this checkout's ``build/`` gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("dsft", "csrc"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    checked(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with the wheel in it; dsft's dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    checked(
        sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=folder
    )
    # A plain path in a .pth file comes after site-packages and has its own .pth files ignored: the editable install of
    # the checkout stays out of it.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_sources_types_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "dsft/py.typed" in names
    sources = {
        str(file.relative_to(REPOSITORY / "csrc")) for file in (REPOSITORY / "csrc").rglob("*") if file.is_file()
    }
    assert {name.removeprefix("dsft/_csrc/") for name in names if name.startswith("dsft/_csrc/")} == sources
    package = [file for file in (REPOSITORY / "dsft").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    inside = {name for name in names if name.startswith("dsft/") and not name.startswith(("dsft/_csrc/", "dsft/_lib/"))}
    assert inside == {str(file.relative_to(REPOSITORY)) for file in package}
    assert [name for name in names if name.startswith("dsft/_lib/")] == ["dsft/_lib/libdsft_cpu.so"]
    assert wheel.name.startswith("dsft-")
    assert "-py3-none-linux_" in wheel.name
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/", "build/"))]


def test_the_installed_wheel_trains_a_step(installed: Path, tmp_path: Path) -> None:
    where = checked(installed, "-c", "import dsft; print(dsft.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parents[1])
    built = checked(installed, "-m", "dsft", "ops", "build", cwd=tmp_path, PATH="", CXX="")  # needs no compiler
    assert "dsft/_lib/libdsft_cpu.so" in built

    tiny_tokenizer_folder(tmp_path)
    words = "a step of training from an installed wheel needs no checkout of the repository at all " * 5
    lines = [json.dumps({"text": f"{number} {words}"}) for number in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    scripts = sysconfig.get_path("scripts")  # ninja
    checked(
        *(installed, "-m", "dsft", "train", "run.yaml"),
        cwd=tmp_path,
        PATH=f"{scripts}:{os.environ['PATH']}",
        DS_ACCELERATOR="cpu",
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record.get("kind") == "step"]
    assert len(steps) == 1
    assert 5 < steps[0]["loss"] < 8  # ln(700) = 6.6: an untrained model
