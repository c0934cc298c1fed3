"""The models of a run's YAML file. One frozen class a section; a check lives beside the field it is about.

Everything is strict: an unknown key or a wrong type is an error (``dsft.config.load`` adds the file, the line and the
nearest known key). Lengths in tokens end in ``_tokens``, durations in ``_seconds``, counts of steps in ``_steps``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from dsft.config.columns import RecordFormat, check_columns
from dsft.config.evaluation import EvaluateSection
from dsft.config.objectives import FillInTheMiddleSection, MaskedLanguageModellingSection
from dsft.config.remote_path import is_remote
from dsft.config.schedule import ScheduleSection
from dsft.config.section import (
    Beta,
    DataPath,
    FolderPath,
    Items,
    Name,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    StorePath,
    UnitInterval,
)
from dsft.config.spikes import SpikeSection
from dsft.config.units import Count, PositiveCount


class RunSection(Section):
    """Who this run is and where it writes."""

    name: Name
    dir: FolderPath
    """Folder of the run: logs, checkpoints, resolved config. One live run may own it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    world_size: Annotated[int, Field(ge=1)] | None = None
    """Number of ranks this run must have. A run that finds another number stops at once (a hostfile that was not
    found otherwise trains on one host in silence)."""
    advice: str | None = None
    """The advice.json of ``dsft advise`` that this run follows; it is kept in the run's folder for ``dsft report``."""


class ModelSection(Section):
    """The model: a folder, a hub name, a dsft checkpoint, or a config to train from scratch."""

    path: str | None = None
    """Hugging Face folder, hub name, or a dsft checkpoint folder (its weights only)."""
    config: str | dict[str, Any] | None = None
    """Train from scratch: a config.json (or its folder), or its keys inline with ``model_type``."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default is the model's own."""
    revision: str | None = None
    """Hub revision. Resolved to a commit at the start and kept in the run, so that a resume sees the same files."""
    trust_remote_code: bool = False
    dtype: Literal["fp32", "bf16"] = "bf16"
    attention: Literal["auto", "varlen", "sdpa"] = "auto"
    """auto: torch's varlen kernel on CUDA, one scaled-dot-product call per document on the CPU."""
    activation_checkpointing: bool = False
    add_tokens: Items[str] = ()
    """Tokens to add to the tokenizer and model; new rows start at the mean of the old ones."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either model.path (start from weights) or model.config (train from scratch)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("model.config (train from scratch) needs model.tokenizer")
        return self


class SourceSection(Section):
    """One source of training documents."""

    name: Name
    path: DataPath
    """File, folder, glob, URL (s3://, gs://, hf://, https://), or a list of them: .jsonl .jsonl.gz .jsonl.zst .parquet
    .txt .arrow, .json (one array; not those inside a folder), a folder that ``datasets.save_to_disk`` wrote, or a
    dataset of the hub: hub://OWNER/NAME@COMMIT/CONFIG/SPLIT."""
    format: RecordFormat | Literal["tokens"] = "text"
    """tokens: Megatron's .bin and datatrove's .ds files, with their indices beside them, trained on where they lie."""
    objective: (
        Literal["next_token"]
        | Annotated[FillInTheMiddleSection | MaskedLanguageModellingSection, Field(discriminator="kind")]
    ) = "next_token"
    """next_token; ``{kind: fim, rate: 0.5}``: fill-in-the-middle; ``{kind: mlm, rate: 0.15}``: masked language
    modelling, for encoder models."""
    text_field: str = "text"
    columns: dict[str, str] = Field(default_factory=dict)
    """The format's field -> the data's name for it, where they differ: ``{prompt: question, completion: answer}``."""
    weight: NonNegativeFloat = 1.0
    """Share of the tokens drawn, relative to the other sources; 0 means not drawn."""
    exhausted: Literal["repeat", "stop", "error"] = "repeat"
    """When all documents of this source are used and the mixture asks for one more: repeat: its next pass begins, in a
    new order; stop: training ends there; error."""
    loss_weight: NonNegativeFloat = 1.0
    """Factor on this source's rows in the loss; 0 means never supervised."""
    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which part of a conversation is learned. Raw text is always learned whole."""

    @model_validator(mode="after")
    def _known_columns(self) -> SourceSection:
        check_columns(self.format, self.columns)
        if self.format == "tokens" and (self.supervise, self.text_field) != ("assistant", "text"):  # the defaults
            raise ValueError("supervise, text_field: the format tokens has no text and no mask; every token is learned")
        return self

    @model_validator(mode="after")
    def _objective_is_for_text(self) -> SourceSection:
        if self.objective != "next_token" and self.format not in ("text", "tokens"):
            raise ValueError(
                f"objective: {self.objective.kind} is for raw text; the format of this source is {self.format}"
            )
        return self

    @property
    def is_masked(self) -> bool:
        """Whether hidden tokens are predicted, by an encoder."""
        return isinstance(self.objective, MaskedLanguageModellingSection)


class StageSection(Section):
    """Weights that hold until a number of trained tokens; the last stage runs to the end of training."""

    name: Name | None = None
    until_tokens: PositiveCount
    weights: dict[str, NonNegativeFloat]


class AuditSection(Section):
    """What ``dsft data audit`` looks for, and the limits beyond which it fails: shares of a source's rows."""

    ngram_words: Annotated[int, Field(ge=2)] = 13
    """Words in a row that a training row must share with a held-out set to count as contaminated (13: GPT-3's)."""
    near_duplicate_jaccard: UnitInterval = 0.8
    """Share of equal five-word runs from which two rows are near-duplicates."""
    max_bad_share: UnitInterval | None = None
    max_refused_share: UnitInterval | None = None
    max_empty_share: UnitInterval | None = None
    max_unsupervised_share: UnitInterval | None = None
    max_end_of_turn_cut_share: UnitInterval | None = None
    max_duplicate_share: UnitInterval | None = None
    max_near_duplicate_share: UnitInterval | None = None
    max_contaminated_share: UnitInterval | None = None
    """Of each held-out set."""
    max_broken_encoding_share: UnitInterval | None = None
    min_supervised_share: UnitInterval | None = None
    """Least share of the tokens that is learned."""


class DataSection(Section):
    """Sources, their mixture and how documents become packs."""

    pack_tokens: PositiveCount
    sources: Annotated[Items[SourceSection], Field(min_length=1)]
    stages: Items[StageSection] = ()
    chat_template: str | None = None
    """File with a Jinja chat template, or the name of a built-in one (chatml). Default: the tokenizer's own."""
    store_dir: StorePath | None = None
    """Where token stores are kept, shared by runs; default: ``store`` beside the run's folder. A URL (s3://, gs://,
    hf://, https://): stores that were prepared in a folder and copied there; nothing is prepared then."""
    cache_dir: FolderPath | None = None
    """Where token shards of a ``store_dir`` at a URL are kept on each host, shared by ranks and runs; default:
    ``store-cache`` beside the run's folder."""
    cache_bytes: PositiveCount = 100_000_000_000
    """Most bytes in ``cache_dir``; what is in use is never removed, even where it alone is more."""
    streaming: bool = False
    """Begin to train when the first shards of the order are tokenised; the rest is tokenised ahead, in the background.
    The batches are the same."""
    bad_records: Literal["error", "skip"] = "error"
    overlong: Literal["split", "truncate", "drop"] = "split"
    """What happens to a document longer than pack_tokens. Counted per source."""
    packing: Literal["best_fit_decreasing", "next_fit", "concat_and_split"] = "best_fit_decreasing"
    """best_fit_decreasing: the fullest packs without cutting a document that fits one; next_fit: documents in the order
    drawn, a pack ends before one that does not fit; concat_and_split: as drawn, cut wherever a pack is full."""
    window_documents: PositiveCount = 65_536
    window_tokens: PositiveCount = 16_000_000
    group_shards: Annotated[int, Field(ge=1)] = 16
    """Documents are shuffled within this many consecutive shards of the shuffled shard order."""

    audit: AuditSection = AuditSection()

    @property
    def is_masked(self) -> bool:
        """Whether this run trains an encoder by masked language modelling; all of its sources are alike."""
        return self.sources[0].is_masked

    @model_validator(mode="after")
    def _one_kind_of_model(self) -> DataSection:
        if len({source.is_masked for source in self.sources}) > 1:
            raise ValueError(
                "data.sources: objective mlm trains an encoder, which sees what comes next, and the others a decoder, "
                "which does not: give all sources objective mlm, or none"
            )
        return self

    @model_validator(mode="after")
    def _streams_into_a_folder(self) -> DataSection:
        if self.streaming and self.store_dir is not None and is_remote(self.store_dir):
            raise ValueError(
                f"data.streaming tokenises into data.store_dir while training, and {self.store_dir} is a URL, where "
                "nothing is prepared: give a folder that all hosts see, or leave data.streaming out"
            )
        return self

    @model_validator(mode="after")
    def _masked_documents_are_cut_at_packs(self) -> DataSection:
        if self.is_masked and self.packing == "concat_and_split":
            raise ValueError(
                "data.packing: concat_and_split cuts documents anywhere, and objective mlm must know beforehand where "
                "a part begins: take best_fit_decreasing or next_fit"
            )
        return self

    @model_validator(mode="after")
    def _stages_name_sources(self) -> DataSection:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(
                f"data.sources: two sources share a name: {sorted(n for n in names if names.count(n) > 1)[0]!r}"
            )
        previous = 0
        for position, stage in enumerate(self.stages):
            unknown = sorted(set(stage.weights) - set(names))
            if unknown:
                raise ValueError(
                    f"data.stages[{position}].weights: no source is called {unknown[0]!r}; sources are {names}"
                )
            if not any(stage.weights.values()):
                raise ValueError(f"data.stages[{position}].weights: every weight is 0, so nothing could be drawn")
            if stage.until_tokens <= previous:
                raise ValueError(
                    f"data.stages[{position}].until_tokens must be greater than the stage before ({previous})"
                )
            previous = stage.until_tokens
            if not any(stage.weights.get(source.name) and source.loss_weight for source in self.sources):
                raise ValueError(
                    f"data.stages[{position}].weights: every source drawn has loss_weight 0, so nothing is learned"
                )
        if not self.stages and not any(source.weight for source in self.sources):
            raise ValueError("data.sources: every weight is 0, so nothing could be drawn")
        if not self.stages and not any(source.weight and source.loss_weight for source in self.sources):
            raise ValueError("data.sources: every source drawn has loss_weight 0, so nothing is learned")
        return self


class TrainSection(Section):
    """Length, batch, optimizer and loss."""

    tokens: PositiveCount | None = None
    """Document tokens to draw in all (no padding, no fillers). May be raised on resume."""
    steps: PositiveCount | None = None
    epochs: PositiveFloat | None = None
    """Passes over the only source. With several sources give tokens."""
    global_batch_packs: PositiveCount
    """Packs in one optimizer step, over all ranks."""
    micro_batch_packs: Annotated[int, Field(ge=1)] = 1
    lr: PositiveFloat
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applies to matrices; norms, biases and other vectors have none."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Global gradient norm; 0 means no clipping."""
    schedule: ScheduleSection = ScheduleSection()
    loss_reduction: Literal["token", "document", "message"] = "token"
    """What weighs the same: supervised tokens; documents; messages (an answer, a completion, a raw text)."""
    freeze: Items[str] = ()
    """fnmatch patterns over parameter names; a pattern that matches nothing is an error."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 5
    """Steps in a row that may be skipped for a loss or gradient that is not finite, before the run stops (or, with
    ``spikes``, goes back)."""
    spikes: SpikeSection | None = None
    """Going back when the loss spikes; ``{}`` takes the values below, left out: a run never goes back."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if sum(value is not None for value in (self.tokens, self.steps, self.epochs)) != 1:
            raise ValueError("train: give exactly one of tokens, steps, epochs")
        self.schedule.check_fits("tokens" if self.steps is None else "steps", self.steps or self.tokens)
        return self


class CheckpointSection(Section):
    """When state is saved, and how much of it is kept. A run always saves at its end and when asked to stop.

    Training goes on while a checkpoint is written.
    """

    every_steps: PositiveCount | Literal["auto"] | None = None
    """``auto``: as often as costs no more than 3.5 % of the training time, by what each save has cost."""
    keep_last: Annotated[int, Field(ge=1)] = 3
    """So many newest checkpoints stay."""
    keep_every_steps: PositiveCount | None = None
    """Besides, the first checkpoint of each so many steps stays."""
    keep_best: str | None = None
    """Besides, the checkpoint with the lowest held-out loss of this set of ``evaluate.sets`` stays, among those of
    steps at which it was measured."""
    local_dir: FolderPath | None = None
    """Folder on a disk of each host, under the same path on all: shards are written there, each with a copy on the next
    host, and only what is small goes to the run folder. Default: all goes to the run folder."""
    max_failed_saves: Annotated[int, Field(ge=1)] = 3
    """Saves in a row that may fail (disk full, folder gone) before the run ends; training goes on until then."""
    snapshot_bytes: Count = 1_000_000_000
    """Host memory of each rank for what is not yet written when the next optimizer step begins; when it is full, the
    step waits for the writer. No more is taken than the rank's part of masters and optimizer states."""


class LogSection(Section):
    """What is written while training. A JSON line per logged step is always written."""

    every_steps: PositiveCount = 1
    sinks: Items[Literal["jsonl", "tensorboard", "wandb", "mlflow"]] = ("jsonl",)
    project: Name = "dsft"
    """Weights & Biases' project and MLflow's experiment. Server, key and mode are said by their own environment
    variables (WANDB_API_KEY, WANDB_MODE=offline, MLFLOW_TRACKING_URI; without the last, files in the run folder)."""


class RunConfig(Section):
    """A whole run, as one YAML file states it."""

    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    deepspeed: str | dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 3}})
    """Path of a DeepSpeed JSON file (``ds_configs/``), or its keys inline; "auto" values are filled in by dsft."""
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()
    kernels: Literal["auto", "native", "reference"] = "auto"
    """native: dsft's compiled operations, an error where they are missing; reference: their Python specification; auto:
    native where they can be built. The choice is printed."""
    _file: str = PrivateAttr(default="the run's YAML file")

    @property
    def file(self) -> str:
        """Name of the YAML file this came from; for messages only."""
        return self._file

    def set_file(self, name: str) -> None:
        """Remember the YAML file's name for messages (``load_config`` calls this)."""
        self._file = name

    @model_validator(mode="after")
    def _across_sections(self) -> RunConfig:
        names = {source.name for source in self.data.sources}
        for position, held_out in enumerate(self.evaluate.sets):
            if held_out.source is not None and held_out.source not in names:
                raise ValueError(
                    f"evaluate.sets[{position}].source: no source is called {held_out.source!r}; "
                    f"sources are {sorted(names)}"
                )
        sets = [held_out.name for held_out in self.evaluate.sets]
        if self.checkpoint.keep_best is not None and self.checkpoint.keep_best not in sets:
            raise ValueError(
                f"checkpoint.keep_best: no evaluation set is called {self.checkpoint.keep_best!r}; sets are {sets}"
            )
        if self.train.loss_reduction == "message":
            for position, source in enumerate(self.data.sources):
                if source.objective != "next_token" or (
                    source.format not in ("text", "tokens") and source.supervise == "all"
                ):
                    raise ValueError(
                        f"train.loss_reduction: message; data.sources[{position}] learns tokens that belong to no "
                        "message (supervise: all, or objective fim or mlm): set loss_reduction: document"
                    )
        if self.data.is_masked:
            if self.evaluate.bias or self.evaluate.lm_eval is not None:
                key = "bias" if self.evaluate.bias else "lm_eval"
                raise ValueError(
                    f"evaluate.{key} reads sentences from left to right, and objective mlm trains an encoder"
                )
            for held_out in self.evaluate.sets:
                if held_out.format != "text" or held_out.memorisation is not None:
                    raise ValueError(
                        f"evaluate.sets: {held_out.name!r} needs a model that writes on (format other than text, or "
                        "memorisation), and objective mlm trains an encoder: measure raw text only"
                    )
        if self.train.epochs is not None and len(self.data.sources) > 1:
            raise ValueError("train.epochs needs a single source; with several sources give train.tokens")
        if self.train.epochs is not None and self.data.streaming:
            raise ValueError(
                "train.epochs is counted in the lengths of all documents, and with data.streaming they are not known "
                "at the start: give train.tokens or train.steps"
            )
        if self.train.spikes is not None and self.checkpoint.every_steps is None:
            raise ValueError(
                "train.spikes goes back to a checkpoint, so there must be some: give checkpoint.every_steps"
            )
        if self.data.stages and self.train.tokens is None:
            raise ValueError("data.stages are borders in tokens, so the run's length must be too: give train.tokens")
        return self
