"""Going on elsewhere than at the end of a line: from an older checkpoint, or after a decay that is over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsft.checkpoint.discover import newest
from dsft.dist import Groups
from dsft.errors import ConfigError
from dsft.train.loop import train
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run

pytestmark = [pytest.mark.launch]

PACK_TOKENS, NUM_STEPS, DECAY_STEPS = 32, 6, 3


def _go_on(groups: Groups, folder: Path) -> dict[str, Any]:
    """A whole run; then, in copies of its folder, ways to go on. Each says where it begins, or why it does not."""
    config = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"pack_tokens": PACK_TOKENS, "sources": [{"name": "text", "path": "-"}]},
        "train": {
            "steps": NUM_STEPS,
            "global_batch_packs": 1,
            "lr": 1e-3,
            "schedule": {"kind": "warmup_stable_decay", "decay_steps": DECAY_STEPS, "min_lr_ratio": 0.1},
        },
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "checkpoint": {"every_steps": 1, "keep_last": 9},
    }
    longer = {**config, "train": {**config["train"], "steps": 2 * NUM_STEPS}}
    with built_run(groups, folder / "run", config, [folder / "text"]) as (run, state, _, _):
        assert train(run, state) == "finished"
    found: dict[str, Any] = {}

    def begin(run_dir: Path, configuration: dict[str, Any], resume: str, name: str, **options: bool) -> None:
        try:
            with built_run(groups, run_dir, configuration, [folder / "text"], resume=resume, **options) as built:
                found[name] = built[1].step  # and then the process ends, before it has saved
        except ConfigError as error:
            found[name] = str(error)

    begin(folder / "run", longer, "auto", "longer")
    begin(folder / "run", longer, "auto", "longer, told so", allow_lr_jump=True)
    older = folder / "older"
    shutil.copytree(folder / "run", older)
    begin(older, longer, str(older / "checkpoints" / "step-00000003"), "longer, of before the decay")
    begin(older, longer, "auto", "and again")
    begin(folder / "run", config, "auto", "as it was")
    return found


@pytest.mark.timeout(300)
def test_where_a_run_goes_on(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(3)
    documents = [text_document(generator.integers(3, VOCAB, PACK_TOKENS).tolist()) for _ in range(40)]
    write_store(tmp_path / "text", documents, num_shards=2, name="text", vocab_tokens=VOCAB)
    (found,) = run_ranks(_go_on, 1, tmp_path, timeout_seconds=280)
    assert "decayed to 10.0% of train.lr by step 6" in found["longer"]
    assert "jump back to 100.0%" in found["longer"]
    assert "--allow-lr-jump" in found["longer"]
    assert found["longer, told so"] == NUM_STEPS
    assert found["longer, of before the decay"] == 3
    assert found["and again"] == 3, "auto goes on with the line that was begun last, though it has saved nothing yet"
    last = newest(tmp_path / "older" / "checkpoints")
    assert last is not None
    assert last.name == "step-00000003"
    assert len(list((tmp_path / "older" / "checkpoints").glob("superseded-0-step-*"))) == 3
    assert found["as it was"] == NUM_STEPS
