"""Builds a run from its configuration. The only place that sees the whole of it; every builder gets its own section."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dsft.batch.collate import BatchSpec
from dsft.batch.loader import Loader
from dsft.config.evaluation import EvaluationSetSection
from dsft.config.models import RunConfig, SourceSection
from dsft.config.objectives import FillInTheMiddleSection, MaskedLanguageModellingSection
from dsft.corpus.chat import ChatMarker
from dsft.corpus.progress import PrepareProgress, ProgressLines
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.dist import DeviceType, Groups, without_prints
from dsft.errors import ModelError, StoppedEarly
from dsft.export.hugging_face import MODEL_FOLDER
from dsft.export.resolve import checkpoint_of, is_dsft_folder, weights_folder
from dsft.fsio import save_error
from dsft.launch.stop import StopFlag
from dsft.model.flops import ModelCost
from dsft.model.load import check_loadable, load_model
from dsft.model.packed import PackedCausalLM
from dsft.model.parameters import freeze, parameter_groups
from dsft.model.positions import check_positions
from dsft.sampling.balance import pack_costs
from dsft.sampling.fim import FillInTheMiddle, FimOrder
from dsft.sampling.mlm import MaskedLanguageModelling, mlm_order
from dsft.sampling.objectives import Objective, order_of
from dsft.sampling.packing import planned_lengths
from dsft.sampling.plan import Planner
from dsft.sampling.types import Growth, PlannedSource, Stage
from dsft.store.reader import SourceStore
from dsft.train.optimizer import build_optimizer
from dsft.train.stores import open_stores
from dsft.train.streamed_files import Streaming

logger = logging.getLogger(__name__)

Objectives = tuple[Objective | None, ...]
"""One a source, in the configuration's order."""


@dataclass(frozen=True, slots=True)
class Data:
    """Tokenizer and opened token stores of a run.

    Attributes:
        stores: one a training source, in configuration order.
        held_out: one a held-out set, in configuration order.
    """

    tokenizer: Tokenizer
    stores: tuple[SourceStore, ...]
    held_out: tuple[SourceStore, ...]


def model_folder(config: RunConfig) -> str | None:
    """Where weights come from; a dsft checkpoint is exported once and read as an ordinary folder.

    Raises:
        ModelError: ``model.path`` is a path on this host and nothing is there.
    """
    path = config.model.path
    if path is None:
        return None
    if is_dsft_folder(Path(path)):
        return str(weights_folder(Path(path), trust_remote_code=config.model.trust_remote_code))
    check_there("model.path", path)
    return path


def check_there(key: str, path: str) -> None:
    """Raise ModelError for a local path with nothing there, which transformers would look for on the hub.

    A hub name is ``name`` or ``owner/name``; what has another form, or lies in a folder that exists here, is a path.
    """
    place = Path(path)
    is_local = path.startswith((".", "/", "~")) or len(place.parts) > 2 or path.endswith("/")
    if not place.exists() and (is_local or (len(place.parts) == 2 and place.parent.is_dir())):
        raise ModelError(
            f"{key}: there is no folder {path} (looked from {Path.cwd()}). Give a Hugging Face folder, a dsft run or "
            "checkpoint, or a hub name."
        )


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's one tokenizer. Of a dsft checkpoint it is read where it lies, without exporting the weights."""
    section = config.model
    if section.tokenizer is not None:
        check_there("model.tokenizer", section.tokenizer)
        path = section.tokenizer
    else:
        assert section.path is not None, "the configuration demands a tokenizer when there is no model folder"
        check_there("model.path", section.path)
        is_dsft = is_dsft_folder(Path(section.path))
        path = str(checkpoint_of(Path(section.path)) / MODEL_FOLDER) if is_dsft else section.path
    return load_tokenizer(
        path,
        section.revision if section.tokenizer is None else None,
        section.trust_remote_code,
        section.add_tokens,
        config.data.chat_template,
        sorted({token for source in config.data.sources for token in _sentinels(source)}),
    )


def _sentinels(source: SourceSection) -> tuple[str, ...]:
    return source.objective.sentinels if isinstance(source.objective, FillInTheMiddleSection) else ()


def objectives_in_ids(config: RunConfig, tokenizer: Tokenizer) -> Objectives:
    """Per source, its objective in token ids; None: it predicts the next token."""
    return tuple(_in_ids(source, tokenizer, config.data.pack_tokens) for source in config.data.sources)


def _in_ids(source: SourceSection, tokenizer: Tokenizer, pack_tokens: int) -> Objective | None:
    section = source.objective
    if section == "next_token":
        return None
    if isinstance(section, MaskedLanguageModellingSection):
        mask_id = tokenizer.hf.mask_token_id
        if mask_id is None:
            raise ModelError(
                f"data.sources: objective mlm of {source.name!r} needs a mask token, and the tokenizer has none: take "
                "an encoder with its own tokenizer (BERT, RoBERTa, ModernBERT, ...)."
            )
        return MaskedLanguageModelling(
            rate=section.rate,
            mask_share=section.mask_share,
            random_share=section.random_share,
            mask_id=int(mask_id),
            special_ids=tuple(sorted(tokenizer.control.ids)),
            vocab_tokens=tokenizer.vocab_tokens,
            pack_tokens=pack_tokens,
        )
    return FillInTheMiddle(
        rate=section.rate,
        spm_rate=section.spm_rate,
        prefix_id=tokenizer.control.id_of(section.prefix),
        suffix_id=tokenizer.control.id_of(section.suffix),
        middle_id=tokenizer.control.id_of(section.middle),
        num_leading=len(tokenizer.prefix_ids),
        num_trailing=len(tokenizer.suffix_ids),
    )


def planned_sources(
    config: RunConfig, stores: Sequence[SourceStore], objectives: Objectives, growth: Sequence[Growth] = ()
) -> tuple[PlannedSource, ...]:
    """The sources as the plan sees them; ``growth``: of each, where the run went on with a source that had grown."""
    return tuple(
        PlannedSource(
            source.name,
            store.num_shards,
            partial(_lengths, store),
            None if objective is None else order_of(objective, config.run.seed, source.name),
            source.exhausted,
            store.files.will_need,
            grown,
        )
        for source, store, objective, grown in zip(
            config.data.sources, stores, objectives, growth or ((),) * len(stores), strict=True
        )
    )


def _lengths(store: SourceStore, shard: int) -> npt.NDArray[np.int32]:
    return store.index(shard).lengths


def open_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    stop: StopFlag,
    streaming: Streaming | None = None,
    *,
    worker: int,
    num_workers: int,
) -> Data:
    """Prepare what is not prepared (all workers together) but what ``streaming`` opens, and open the stores.

    Raises:
        StoppedEarly: a stop was requested meanwhile, of this worker or another.
    """
    say = ProgressLines(logger.info)

    def report(progress: PrepareProgress) -> None:
        say(progress)
        if stop.requested is not None:
            raise StoppedEarly(
                f"stopped on request ({stop.requested}) while the data was prepared. Nothing was trained; what is "
                "prepared stays, and the next start goes on there."
            )

    sections: list[SourceSection | EvaluationSetSection] = [*config.data.sources, *config.evaluate.sets]
    streamed = {} if streaming is None else streaming.open(config, tokenizer)
    prepared = [section for number, section in enumerate(sections) if number not in streamed]
    opened = iter(open_stores(config, prepared, tokenizer, report, worker=worker, num_workers=num_workers))
    stores = [streamed[number] if number in streamed else next(opened) for number in range(len(sections))]
    num_sources = len(config.data.sources)
    return Data(tokenizer, tuple(stores[:num_sources]), tuple(stores[num_sources:]))


def train_tokens(config: RunConfig, sources: Sequence[PlannedSource]) -> int | None:
    """Length of the run in document tokens; None when it is given in steps."""
    if config.train.epochs is None:
        return config.train.tokens
    if not isinstance(sources[0].objective, FimOrder):
        return round(config.train.epochs * _pass_tokens(config, sources[0], 0))
    whole = int(config.train.epochs)  # each pass has sentinels in other documents
    tokens = sum(_pass_tokens(config, sources[0], epoch) for epoch in range(whole))
    part = config.train.epochs - whole
    return tokens + (round(part * _pass_tokens(config, sources[0], whole)) if part else 0)


def _pass_tokens(config: RunConfig, source: PlannedSource, epoch: int) -> int:
    """Tokens of one pass over a source under the overlong policy."""
    lengths = (source.lengths_in(epoch, shard) for shard in range(source.num_shards))
    planned = (planned_lengths(column, config.data.pack_tokens, config.data.overlong) for column in lengths)
    return sum(int(column.sum(dtype="int64")) for column in planned)


def build_planner(config: RunConfig, data: Data, growth: Sequence[Growth] = ()) -> Planner:
    """The plan over the run's sources and stages; ``growth``: as in :func:`planned_sources`."""
    objectives = objectives_in_ids(config, data.tokenizer)
    return plan_sources(config, planned_sources(config, data.stores, objectives, growth))


def plan_sources(config: RunConfig, sources: Sequence[PlannedSource]) -> Planner:
    """The plan of a configuration over its sources."""
    section = config.data
    stages = [
        Stage(
            stage.name or f"stage-{i}",
            stage.until_tokens,
            tuple(stage.weights.get(s.name, 0.0) for s in section.sources),
        )
        for i, stage in enumerate(section.stages)
    ]
    if stages:  # the last stage runs to the end of training
        stages[-1] = Stage(stages[-1].name, None, stages[-1].weights)
    else:
        stages = [Stage("all", None, tuple(source.weight for source in section.sources))]
    return Planner(
        sources,
        stages,
        seed=config.run.seed,
        pack_tokens=section.pack_tokens,
        global_batch_packs=config.train.global_batch_packs,
        window_documents=section.window_documents,
        window_tokens=section.window_tokens,
        group_shards=section.group_shards,
        overlong=section.overlong,
        train_tokens=train_tokens(config, sources),
        packing=section.packing,
    )


def build_batch_spec(config: RunConfig, data: Data) -> BatchSpec:
    """How packs of the training sources become tensors."""
    return BatchSpec(
        stores=data.stores,
        loss_weights=tuple(source.loss_weight for source in config.data.sources),
        loss_reduction=config.train.loss_reduction,
        pack_tokens=config.data.pack_tokens,
        pad_id=data.tokenizer.pad_id,
        truncate_overlong=config.data.overlong == "truncate",
        objectives=tuple(
            source.objective
            for source in planned_sources(config, data.stores, objectives_in_ids(config, data.tokenizer))
        ),
    )


def build_loader(
    config: RunConfig, data: Data, planner: Planner, cost: ModelCost, *, rank: int, num_ranks: int
) -> Loader:
    """The prefetching loader of this rank."""
    return Loader(
        planner,
        build_batch_spec(config, data),
        rank=rank,
        num_ranks=num_ranks,
        micro_batch_packs=config.train.micro_batch_packs,
        costs=partial(pack_costs, a=cost.flops_per_token, b=cost.flops_per_token_pair),
    )


def build_engine(
    config: RunConfig,
    data: Data,
    groups: Groups,
    folder: str | None,
    deepspeed_config: dict[str, Any],
    device_type: DeviceType,
) -> tuple[Any, Any]:
    """Model, optimizer and DeepSpeed engine; returns the engine and the model's Hugging Face config. Collective."""
    import deepspeed

    section = config.model if folder == config.model.path else config.model.model_copy(update={"path": folder})
    with groups.together():  # one host may lack the model; what comes after it is collective
        check_loadable(section, data.tokenizer.vocab_tokens, config.data.is_masked)
    model: PackedCausalLM = load_model(
        section,
        vocab_tokens=data.tokenizer.vocab_tokens,
        added_tokens=data.tokenizer.num_added,
        seed=config.run.seed,
        device_type=device_type,
        deepspeed_config=deepspeed_config,
        is_masked=config.data.is_masked,
    )
    check_positions(model.hf, config.data.pack_tokens)
    freeze(model, config.train.freeze)
    optimizer = build_optimizer(
        parameter_groups(model, config.train.weight_decay),
        config.train,
        offloaded=is_offloaded(deepspeed_config),
        device_type=device_type,
    )
    with without_prints():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    return engine, model.hf.config


def held_out_spec(config: RunConfig, tokenizer: Tokenizer, store: SourceStore) -> BatchSpec:
    """How a held-out set becomes tensors: one pack a forward, every supervised token with the same weight.

    For an encoder the hidden tokens are the same in every evaluation of every run, so that scores can be compared.
    """
    objective = objectives_in_ids(config, tokenizer)[0]
    masked = objective if isinstance(objective, MaskedLanguageModelling) else None
    return BatchSpec(
        stores=(store,),
        loss_weights=(1.0,),
        loss_reduction="token",
        pack_tokens=config.data.pack_tokens,
        pad_id=tokenizer.pad_id,
        objectives=() if masked is None else (mlm_order(masked, 0, store.name, "mlm held out"),),
    )


def write_model_folder(folder: Path, hf_config: Any, tokenizer: Tokenizer, model: PackedCausalLM) -> None:
    """Write what an export needs beside the weights: config, generation config, tokenizer, chat template.

    Generation stops at the end of a document and, where the chat template has one, at the token that ends a turn: the
    model learns to write that one after an answer.

    Raises:
        SaveError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hf_config.save_pretrained(folder)
        if model.is_causal:
            generation = copy.deepcopy(model.hf.generation_config)
            generation.eos_token_id, generation.pad_token_id = stop_ids(tokenizer), tokenizer.pad_id
            generation.save_pretrained(folder)
        tokenizer.hf.save_pretrained(folder)
    except OSError as error:
        raise save_error(folder, error) from error


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer."""
    ids = [tokenizer.eos_id]
    if tokenizer.chat_template is not None:
        end_of_turn = ChatMarker(tokenizer).end_of_turn_id()
        ids += [end_of_turn] if end_of_turn not in (None, tokenizer.eos_id) else []
    return [token for token in ids if token is not None]


def choose_device_type(environ: Mapping[str, str]) -> DeviceType:
    """``cuda`` where there is a device, else ``cpu``; DS_ACCELERATOR=cpu decides for the CPU on a machine with GPUs."""
    return "cuda" if torch.cuda.is_available() and environ.get("DS_ACCELERATOR", "cuda") == "cuda" else "cpu"


def is_offloaded(deepspeed_config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lives in host memory or on NVMe."""
    return _offload_device(deepspeed_config, "offload_optimizer") != "none"


def uses_nvme(deepspeed_config: dict[str, Any]) -> bool:
    """Whether optimizer states or weights live on NVMe, which needs DeepSpeed's ``async_io``."""
    return "nvme" in {_offload_device(deepspeed_config, key) for key in ("offload_optimizer", "offload_param")}


def _offload_device(deepspeed_config: dict[str, Any], key: str) -> str:
    offload = deepspeed_config.get("zero_optimization", {}).get(key) or {}
    return str(offload.get("device", "none"))
