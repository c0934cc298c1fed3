"""``dsft estimate``: what a run needs on given machines, and what each choice would change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.advise.machines import Machines
from dsft.advise.memory import Memory, memory_of, settings_of
from dsft.advise.shape import ModelShape, model_shape
from dsft.advise.speed import StepTime, step_time
from dsft.config.deepspeed import build_deepspeed_config
from dsft.config.models import RunConfig
from dsft.errors import ConfigError
from dsft.export.resolve import checkpoint_of, is_dsft_folder
from dsft.metrics.peaks import peak_flops
from dsft.model.load import DTYPES, read_hf_config

DEFAULT_MFU = 0.4
"""Share of the peak that training reaches where nobody has measured it: Llama 3 trained at 0.38 to 0.43 of it on H100
(arXiv 2407.21783, table 4)."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What cannot be read from the configuration.

    Attributes:
        mfu: share of the device's peak that is reached; tflops: or the reached operations themselves, in units of 1e12.
        price: money for one device and hour.
        supervised_share: of the tokens, those that are learned (1 for raw text).
        document_tokens: length of a typical document; None: as long as a pack.
        data_tokens: tokens of one epoch, for a run whose length is given in epochs.
    """

    mfu: float = DEFAULT_MFU
    tflops: float | None = None
    price: float | None = None
    supervised_share: float = 1.0
    document_tokens: int | None = None
    data_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run, and what it needs.

    Attributes:
        deepspeed: name of the DeepSpeed configuration. memory: of a rank, by part.
        fits: None where a host's memory would decide and is not known.
        step: None where the device's peak is not known.
    """

    name: str
    deepspeed: str
    checkpointing: bool
    micro_batch_packs: int
    memory: Memory
    fits: bool | None
    step: StepTime | None
    hours: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What :func:`estimate` found.

    Attributes:
        written: the run as its file says.
        largest_micro_batch_packs: the most packs a micro-batch that fit as written; 0: not even one.
        choices: one change each, from the run as written; then every configuration at its best.
        fastest: of the configurations at their best that fit, the fastest; None where none does or times are unknown.
        steps: optimizer steps of the run.
    """

    shape: ModelShape
    machines: Machines
    written: Choice
    largest_micro_batch_packs: int
    choices: tuple[Choice, ...]
    configurations: tuple[Choice, ...]
    fastest: Choice | None
    steps: int

    @property
    def device_hours(self) -> float | None:
        """Hours of all devices, for the run as written."""
        return None if self.written.hours is None else self.written.hours * self.machines.num_ranks


def estimate(
    config: RunConfig, machines: Machines, assumptions: Assumptions, deepspeed_files: Sequence[Path]
) -> Estimate:
    """What the run needs, what else would fit, and what it costs. Reads the model's config only; needs no GPU.

    Args:
        deepspeed_files: configurations to try beside the run's own.

    Raises:
        ConfigError: the run's length in tokens is not known, or DeepSpeed's configuration is not valid.
        ModelError: the model's config cannot be read.
    """
    hf_config = read_hf_config(_with_config_file(config).model, _vocab_tokens(config))
    shape = model_shape(hf_config, DTYPES[config.model.dtype], config.train.freeze, config.data.is_masked)
    ways = _Ways(config, shape, machines, assumptions, _steps(config, assumptions))
    written = ways.choice(config, "as written")
    most = max(1, config.train.global_batch_packs // machines.num_ranks)
    fitting = [packs for packs in range(1, most + 1) if ways.choice(_with(config, micro=packs), "").fits is not False]
    configurations = [
        choice
        for file in deepspeed_files
        for checkpointing in (False, True)
        for choice in ways.best(_with(config, deepspeed=str(file), checkpointing=checkpointing), most)
    ]
    timed = [choice for choice in configurations if choice.fits and choice.hours is not None]
    return Estimate(
        shape=shape,
        machines=machines,
        written=written,
        largest_micro_batch_packs=max(fitting, default=0),
        choices=ways.one_change_each(most),
        configurations=tuple(configurations),
        fastest=min(timed, key=lambda choice: choice.hours or 0.0, default=None),
        steps=ways.steps,
    )


@dataclass(frozen=True, slots=True)
class _Ways:
    """The run, to be asked for one variant of it after another."""

    config: RunConfig
    shape: ModelShape
    machines: Machines
    assumptions: Assumptions
    steps: int

    def choice(self, config: RunConfig, name: str) -> Choice:
        """What ``config``, which differs from the run in its settings only, needs."""
        deepspeed = build_deepspeed_config(config, self.machines.num_ranks, self.machines.device_type)
        packs, tokens = config.train.micro_batch_packs, config.data.pack_tokens
        settings = settings_of(
            deepspeed,
            dtype=config.model.dtype,
            checkpointing=config.model.activation_checkpointing,
            micro_batch_tokens=packs * tokens,
            supervised_share=self.assumptions.supervised_share,
            num_ranks=self.machines.num_ranks,
            ranks_per_host=self.machines.devices_per_host,
            on_cpu=self.machines.device_type == "cpu",
        )
        memory = memory_of(self.shape, settings)
        achieved = self._achieved_flops(config)
        step = None
        if achieved is not None:
            step = step_time(
                self.shape,
                settings,
                self.machines,
                packs=config.train.global_batch_packs,
                pack_tokens=tokens,
                document_tokens=self.assumptions.document_tokens or tokens,
                achieved_flops=achieved,
            )
        return Choice(
            name=name,
            deepspeed=config.deepspeed if isinstance(config.deepspeed, str) else "inline",
            checkpointing=config.model.activation_checkpointing,
            micro_batch_packs=packs,
            memory=memory,
            fits=fits(memory, self.machines),
            step=step,
            hours=None if step is None else step.total * self.steps / 3600,
        )

    def best(self, config: RunConfig, most: int) -> list[Choice]:
        """The fastest micro-batch of ``config`` that fits; the smallest where none does."""
        tried = [self.choice(_with(config, micro=packs), "") for packs in _powers_of_two(most)]
        usable = [choice for choice in tried if choice.fits is not False]
        return [min(usable, key=lambda choice: choice.hours or 0.0)] if usable else tried[:1]

    def one_change_each(self, most: int) -> tuple[Choice, ...]:
        """The run with each of its settings changed alone."""
        config = self.config
        on = config.model.activation_checkpointing
        changed = [(f"activation_checkpointing: {str(not on).lower()}", _with(config, checkpointing=not on))]
        changed += [
            (f"micro_batch_packs: {packs}", _with(config, micro=packs))
            for packs in sorted({max(1, config.train.micro_batch_packs // 2), 2 * config.train.micro_batch_packs})
            if packs != config.train.micro_batch_packs and packs <= most
        ]
        if config.data.pack_tokens > 1024:
            half = config.data.pack_tokens // 2
            data = config.data.model_copy(update={"pack_tokens": half})
            train = config.train.model_copy(update={"global_batch_packs": 2 * config.train.global_batch_packs})
            changed.append((f"pack_tokens: {half}", _keep_file(config, {"data": data, "train": train})))
        return tuple(self.choice(other, name) for name, other in changed)

    def _achieved_flops(self, config: RunConfig) -> float | None:
        if self.assumptions.tflops is not None:
            return self.assumptions.tflops * 1e12
        peak = peak_flops(self.machines.device_name, config.model.dtype)
        return None if peak is None else peak * self.assumptions.mfu


def fits(memory: Memory, machines: Machines) -> bool | None:
    """Whether devices and hosts hold it; None where that depends on a host memory that nobody stated."""
    on_cpu = machines.device_type == "cpu"
    if not on_cpu and memory.peak("device") > machines.device_bytes:
        return False
    need = memory.peak("host")
    if need == 0:
        return True
    return None if machines.host_bytes is None else need <= machines.host_bytes


def _powers_of_two(most: int) -> list[int]:
    return [2**exponent for exponent in range(int(math.log2(most)) + 1)]


def _with(
    config: RunConfig, *, deepspeed: str | None = None, checkpointing: bool | None = None, micro: int | None = None
) -> RunConfig:
    """The run with other settings."""
    update: dict[str, Any] = {}
    if deepspeed is not None:
        update["deepspeed"] = deepspeed
    if checkpointing is not None:
        update["model"] = config.model.model_copy(update={"activation_checkpointing": checkpointing})
    if micro is not None:
        update["train"] = config.train.model_copy(update={"micro_batch_packs": micro})
    return _keep_file(config, update)


def _keep_file(config: RunConfig, update: dict[str, Any]) -> RunConfig:
    other = config.model_copy(update=update)
    other.set_file(config.file)
    return other


def _with_config_file(config: RunConfig) -> RunConfig:
    """A dsft checkpoint is described by the config beside it; nothing is exported for an estimate."""
    path = config.model.path
    if path is None or not is_dsft_folder(Path(path)):
        return config
    folder = checkpoint_of(Path(path)) / "model"
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


def _vocab_tokens(config: RunConfig) -> int:
    """Size of the tokenizer; opened only where the model's own config does not say its vocabulary."""
    inline = config.model.config
    if not isinstance(inline, dict) or "vocab_size" in inline:
        return 0
    from dsft.train.setup import open_tokenizer

    return open_tokenizer(config).vocab_tokens


def _steps(config: RunConfig, assumptions: Assumptions) -> int:
    """Optimizer steps of the run (packs are full but for a fraction of a percent)."""
    if config.train.steps is not None:
        return config.train.steps
    tokens = config.train.tokens
    if tokens is None:
        assert config.train.epochs is not None
        if assumptions.data_tokens is None:
            raise ConfigError(
                f"{config.file}: train.epochs says nothing of the length in tokens before the data is prepared; give "
                "--data-tokens, the tokens of one epoch (dsft data stats shows them)."
            )
        tokens = round(assumptions.data_tokens * config.train.epochs)
    return math.ceil(tokens / (config.train.global_batch_packs * config.data.pack_tokens))


def to_json(result: Estimate, assumptions: Assumptions) -> dict[str, Any]:
    """The estimate as plain values: bytes, hours, and money where a price was given."""
    machines, written = result.machines, result.written
    device_hours = result.device_hours
    return {
        "machines": {
            "hosts": machines.num_hosts,
            "devices_per_host": machines.devices_per_host,
            "device": machines.device_name,
            "device_bytes": machines.device_bytes,
            "host_bytes": machines.host_bytes,
        },
        "model": {"parameters": result.shape.num_parameters, "trained_parameters": result.shape.num_trained},
        "assumptions": {"mfu": assumptions.mfu, "tflops": assumptions.tflops, "measured": False},
        "steps": result.steps,
        "written": choice_to_json(written),
        "largest_micro_batch_packs": result.largest_micro_batch_packs,
        "choices": [choice_to_json(choice) for choice in result.choices],
        "configurations": [choice_to_json(choice) for choice in result.configurations],
        "fastest": None if result.fastest is None else choice_to_json(result.fastest),
        "device_hours": device_hours,
        "money": None if device_hours is None or assumptions.price is None else device_hours * assumptions.price,
    }


def choice_to_json(choice: Choice) -> dict[str, Any]:
    """One choice as plain values."""
    memory = choice.memory
    return {
        "name": choice.name,
        "deepspeed": choice.deepspeed,
        "activation_checkpointing": choice.checkpointing,
        "micro_batch_packs": choice.micro_batch_packs,
        "fits": choice.fits,
        "device_peak_bytes": memory.peak("device"),
        "host_peak_bytes": memory.peak("host"),
        "nvme_bytes": memory.peak("nvme"),
        "parts": [
            {"name": part.name, "place": part.place, "bytes_per_rank": part.num_bytes, "when": part.when}
            for part in memory.parts
        ],
        "step_seconds": None
        if choice.step is None
        else {
            "compute": choice.step.compute,
            "exposed_communication": choice.step.exposed_communication,
            "offload": choice.step.offload,
        },
        "hours": choice.hours,
    }
