from pathlib import Path

from dsft.config.deepspeed import build_deepspeed_config
from dsft.config.load import load_config
from dsft.demo.run_config import PAIRS_SET, STAGES, TEXT_SET, write_run_config


def test_it_is_a_valid_configuration_whatever_the_path(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted": folder # with {signs}'
    folder.mkdir()
    write_run_config(folder / "run.yaml", corpus=folder / "c", tokenizer=folder / "t", run_dir=folder / "r")
    config = load_config(folder / "run.yaml", ())
    assert config.run.dir == str(folder / "r")
    assert config.data.sources[0].path == str(folder / "c/text/train")
    assert [stage.until_tokens for stage in config.data.stages] == [tokens for _, tokens in STAGES]
    assert [stage.name for stage in config.data.stages] == [name for name, _ in STAGES]
    assert [held_out.name for held_out in config.evaluate.sets] == [TEXT_SET, PAIRS_SET]
    assert config.train.tokens == STAGES[-1][1]


def test_deepspeed_gets_stage_3_with_both_offloads(tmp_path: Path) -> None:
    write_run_config(tmp_path / "run.yaml", corpus=tmp_path, tokenizer=tmp_path, run_dir=tmp_path / "r")
    keys = build_deepspeed_config(load_config(tmp_path / "run.yaml", ()), 2, "cpu")["zero_optimization"]
    assert keys["stage"] == 3
    assert keys["offload_optimizer"]["device"] == keys["offload_param"]["device"] == "cpu"
