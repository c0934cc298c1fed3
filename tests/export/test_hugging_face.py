"""Checkpoints of real DeepSpeed engines, exported, loaded by plain transformers: the same logits as the live model."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dsft.checkpoint.commit import save
from dsft.checkpoint.manifest import MANIFEST_NAME
from dsft.checkpoint.retention import Keep
from dsft.checkpoint.shard import ShardReader, Wanted
from dsft.cli.export import command
from dsft.dist import Groups
from dsft.errors import CheckpointError, ConfigError, SaveError
from dsft.export import hugging_face
from dsft.export.hugging_face import export_checkpoint
from dsft.export.resolve import checkpoint_of, is_dsft_folder, weights_folder
from dsft.export.weights import WeightReader
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.model.packed import PackedCausalLM
from tests.support.checkpoints import save_engine
from tests.support.ranks import run_ranks
from tests.support.tokenizers import VOCAB_TOKENS, tiny_tokenizer_folder

pytestmark = [pytest.mark.launch]

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
PROBE = torch.arange(3, 15)[None]


def _config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_TOKENS,
        hidden_size=20,
        intermediate_size=27,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=5 * 2,
        tie_word_embeddings=tied,
    )


def train_and_save(
    groups: Groups, run: Path, tokenizer: Path, stage: int, tied: bool, dtype: str, freeze: bool
) -> None:
    """Two steps of a tiny model, a committed checkpoint, and its gathered weights beside it."""
    import deepspeed

    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=False), "cpu")
    torch.manual_seed(0)
    hf = LlamaForCausalLM(_config(tied))
    model = PackedCausalLM(hf.bfloat16() if dtype == "bf16" else hf)
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0." not in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    ids = torch.arange(20)[None] + groups.rank
    for _ in range(2):
        output = engine(
            input_ids=ids,
            position_ids=torch.arange(20)[None],
            cu_seqlens=torch.tensor([0, 20], dtype=torch.int32),
            max_seqlen=20,
            rows=torch.arange(19),
            targets=ids[0, 1:],
            row_weight=torch.ones(19),
        )
        engine.backward(output.loss)
        engine.step()

    def write_payload(staging: Path) -> Any:
        files = save_engine(engine, staging)
        if groups.rank == 0:
            hf.config.save_pretrained(staging / "model")
            hf.generation_config.save_pretrained(staging / "model")
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(staging / "model")
        return files

    save(
        run / "checkpoints",
        2,
        groups=groups,
        attempt="a",
        write_payload=write_payload,
        payload_bytes=0,
        state={},
        keep=Keep(last=1),
    )
    live = {}
    for name, parameter in hf.named_parameters():
        gathered = deepspeed.zero.GatheredParameters([parameter]) if stage == 3 else contextlib.nullcontext()
        with gathered:
            live[name] = parameter.detach().clone()
    if groups.rank == 0:
        torch.save(live, run / "live.pt")


def _make(tmp_path: Path, stage: int, ranks: int, tied: bool, dtype: str = "fp32", freeze: bool = False) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    tokenizer = tiny_tokenizer_folder(tmp_path, chat_template=TEMPLATE)
    run_ranks(train_and_save, ranks, run, tokenizer, stage, tied, dtype, freeze, timeout_seconds=200)
    return run


def _live_logits(run: Path, tied: bool) -> torch.Tensor:
    """Logits of plain transformers with the weights gathered from the live engine, in fp32."""
    model = LlamaForCausalLM(_config(tied))
    weights = {name: tensor.float() for name, tensor in torch.load(run / "live.pt").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    with torch.no_grad():
        return model.eval()(PROBE).logits


def _exported_logits(out: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(PROBE).logits


@pytest.mark.parametrize(
    ("stage", "ranks", "tied", "dtype", "freeze"),
    [
        (3, 2, True, "fp32", False),
        (3, 2, False, "fp32", True),
        (3, 1, False, "bf16", False),
        (2, 2, True, "fp32", True),
        (1, 2, False, "fp32", False),
    ],
)
def test_plain_transformers_gives_the_same_logits(
    tmp_path: Path, stage: int, ranks: int, tied: bool, dtype: str, freeze: bool
) -> None:
    run = _make(tmp_path, stage, ranks, tied, dtype, freeze)
    out = tmp_path / "exported" / "model"
    export_checkpoint(checkpoint_of(run), out, "bf16" if dtype == "bf16" else "fp32", max_shard_bytes=30_000)
    assert torch.equal(_exported_logits(out), _live_logits(run, tied))

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0].startswith("model-00001-of-000")
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    with safe_open(out / files[0], "pt") as weights:
        assert weights.get_tensor(next(iter(weights.keys()))).dtype == (
            torch.bfloat16 if dtype == "bf16" else torch.float32
        )
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == ("bfloat16" if dtype == "bf16" else "float32")
    assert "dsft" not in json.dumps(config)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert (out / "generation_config.json").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["model"], "no staging folder is left"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("trained"), stage=3, ranks=2, tied=True)


def test_bf16_rounds_the_master_weights_once(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint_of(trained), tmp_path / "out", "bf16")
    live = torch.load(trained / "live.pt")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(live)
        for name in weights.keys():  # noqa: SIM118  (not a dict)
            assert torch.equal(weights.get_tensor(name), live[name].to(torch.bfloat16))


def test_slices_of_a_tensor_are_read_side_by_side(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WeightReader(checkpoint_of(trained), torch.float32) as weights:
        split = [name for name, one in weights.tensors.items() if len(one.writers_of(0, one.num_elements)) == 2]
        expected = {name: weights[name] for name in split}
        both, fill = threading.Barrier(2), ShardReader.fill

        def fill_together(self: ShardReader, wanted: Iterable[Wanted]) -> None:
            both.wait(timeout=20)  # broken if one waits for the other to be done
            fill(self, wanted)

        monkeypatch.setattr(ShardReader, "fill", fill_together)
        assert len(split) > 3
        assert all(torch.equal(weights[name], expected[name]) for name in split)


def test_command_takes_a_run_folder(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(trained), str(out), "--dtype", "fp32", "--max-shard-size", "0.03MB"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "step-00000002" in result.output
    assert torch.equal(_exported_logits(out), _live_logits(trained, tied=True))
    assert len(list(out.glob("*.safetensors"))) > 1
    with pytest.raises(ConfigError, match="not empty"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)
    bad = CliRunner().invoke(command, [str(trained), str(tmp_path / "other"), "--max-shard-size", "5 apples"])
    assert bad.exit_code == 2
    assert "5 apples" in bad.output


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = next((run / "checkpoints").rglob("rank-00001.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 10] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        export_checkpoint(checkpoint_of(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_the_config_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoint = checkpoint_of(run)
    monkeypatch.setattr(hugging_face, "_check_small_files", lambda _: None)
    config = checkpoint / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"missing \['model\.layers\.2"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_a_failed_write_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", no_space)
    with pytest.raises(SaveError, match="no space left"):
        export_checkpoint(checkpoint_of(trained), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _weights_folder(run: Path, cache: Path) -> None:
    weights_folder(run, cache)


def test_weights_folder_is_exported_once_by_whoever_comes_first(trained: Path, tmp_path: Path) -> None:
    assert is_dsft_folder(trained)
    assert is_dsft_folder(checkpoint_of(trained))
    assert not is_dsft_folder(tmp_path)
    context = multiprocessing.get_context("spawn")
    askers = [context.Process(target=_weights_folder, args=(trained, tmp_path)) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(120)
        assert asker.exitcode == 0
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert folders[0].name.startswith("step-00000002-")
    before = folders[0].stat().st_mtime_ns
    assert weights_folder(checkpoint_of(trained), tmp_path) == folders[0]
    assert folders[0].stat().st_mtime_ns == before
    assert torch.equal(_exported_logits(folders[0]), _live_logits(trained, tied=True))


def _second_rank_first(groups: Groups, run: Path, cache: Path) -> Path:
    if groups.rank == 1:
        weights_folder(run, cache)
    groups.barrier()
    return weights_folder(run, cache)


def test_any_rank_of_a_started_run_exports_all_of_it(trained: Path, tmp_path: Path) -> None:
    (folder, same) = run_ranks(_second_rank_first, 2, trained, tmp_path)  # transformers saves on rank 0 only
    assert folder == same
    assert torch.equal(_exported_logits(folder), _live_logits(trained, tied=True))


def test_an_export_without_weights_does_not_appear(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hugging_face, "_save_offloaded", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"wrote no config\.json and no weights"):
        export_checkpoint(checkpoint_of(trained), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _hold(checkpoint: Path, cache: Path, ready: Any, done: Any) -> None:
    weights_folder(checkpoint, cache)
    ready.set()
    done.wait(120)


def test_exports_that_nobody_uses_are_removed(trained: Path, tmp_path: Path) -> None:
    first = checkpoint_of(trained)
    second = tmp_path / "other" / "checkpoints" / first.name
    shutil.copytree(first, second)
    manifest = second / MANIFEST_NAME
    manifest.write_text(manifest.read_text() + "\n")  # another content
    cache = tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(first, cache, ready, done))
    holder.start()
    assert ready.wait(120)
    of_second = weights_folder(second, cache)
    (of_first,) = (path for path in cache.glob("step-*") if path != of_second)
    done.set()
    holder.join(120)
    assert holder.exitcode == 0
    assert weights_folder(second, cache) == of_second
    assert [*cache.glob("step-*")] == [of_second], "in use by this process; the other's has ended"
    assert not of_first.exists()


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        checkpoint_of(tmp_path)
