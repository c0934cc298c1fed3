"""Where a DeepSpeed engine (ZeRO 1, 2 and 3) keeps this rank's part of the weights and of the optimizer's state.

Everything DeepSpeed-specific about checkpoints is here. Trained parameters live in flat fp32 tensors that the wrapped
optimizer updates, one a parameter group (stages 1 and 2) or sub-group (stage 3); its states are keyed by them. These
are the tensors behind ``safe_get_local_fp32_param`` and ``_hp_mapping``, without their copies to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from dsft.checkpoint.layout import MASTER, Layout, StoredTensor
from dsft.constants import MODEL_PREFIX
from dsft.errors import ConfigError

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_OPTIMIZERS = ("Adam", "AdamW", "DeepSpeedCPUAdam")


@dataclass(frozen=True, slots=True)
class LocalSlice:
    """Elements ``[start, stop)`` of a tensor that this rank holds.

    Attributes:
        flat: number of the flat tensor they are in; None for what is not trained.
        at: where they begin in it.
    """

    tensor: StoredTensor
    start: int
    stop: int
    flat: int | None = None
    at: int = 0


class EngineState:
    """An engine's tensors by Hugging Face name, and this rank's part of each."""

    def __init__(self, engine: Any) -> None:
        """Raises ConfigError when the engine keeps its state in a way that cannot be saved."""
        self.engine = engine
        self.rank, self.num_ranks = int(engine.global_rank), int(engine.world_size)
        self.zero_stage = int(engine.zero_optimization_stage())
        self._optimizer = engine.optimizer
        self._basic = engine.optimizer.optimizer
        self._refuse_unsupported()
        self._plain: dict[str, torch.Tensor] = {}
        self._homes: dict[str, tuple[int, int]] = {}
        self._parameters = {
            name.removeprefix(MODEL_PREFIX): parameter for name, parameter in engine.module.named_parameters()
        }
        cuts = self._cuts_of_trained()
        self.tensors = tuple(
            [self._parameter(name, parameter, cuts) for name, parameter in self._parameters.items()]
            + [self._buffer(name, buffer) for name, buffer in _persistent_buffers(engine.module)]
        )

    # ------------------------------------------------------------------------------------------------ what is where

    @property
    def flats(self) -> list[torch.Tensor]:
        """This rank's flat fp32 tensors."""
        names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
        found: list[torch.Tensor] = next(getattr(self._optimizer, n) for n in names if hasattr(self._optimizer, n))
        return found

    def slices_to_write(self) -> list[LocalSlice]:
        """What this rank stores: over all ranks, every element once."""
        found = []
        for tensor in self.tensors:
            start, stop = tensor.slice_of(self.rank)
            if start < stop:
                found.append(LocalSlice(tensor, start, stop, *self._homes.get(tensor.name, (None, 0))))
        return found

    def slices_to_fill(self) -> list[LocalSlice]:
        """What this rank needs: its part of what is cut, all of what every rank holds whole."""
        own = {one.tensor.name: one for one in self.slices_to_write()}
        whole = [LocalSlice(tensor, 0, tensor.num_elements) for tensor in self.tensors if self._is_whole(tensor)]
        return [one for one in own.values() if not self._is_whole(one.tensor)] + whole

    def view(self, one: LocalSlice, key: str) -> torch.Tensor:
        """The live memory of a slice, flat. A flat tensor on NVMe must be :meth:`resident`."""
        if one.flat is None:
            whole = self._plain[one.tensor.name]
            first = one.start if self._is_whole(one.tensor) else 0
            return whole.view(-1)[first : first + one.stop - one.start]
        flat = self.flats[one.flat]
        home = flat if key == MASTER else self._basic.state[flat][key]
        view: torch.Tensor = home.detach()[one.at : one.at + one.stop - one.start]
        return view

    def dtype(self, one: LocalSlice) -> str:
        """Torch's name of the type in which a slice is stored."""
        home = self._plain[one.tensor.name] if one.flat is None else self.flats[one.flat]
        return str(home.dtype).removeprefix("torch.")

    def batches(self) -> list[frozenset[int | None]]:
        """Flat tensors to load together: all that are in memory (and, as None, what is not trained), NVMe's alone."""
        on_nvme = [number for number in range(len(self.flats)) if self.is_on_nvme(number)]
        in_memory: set[int | None] = {None, *range(len(self.flats))}
        return [frozenset(in_memory.difference(on_nvme)), *(frozenset({number}) for number in on_nvme)]

    def is_on_nvme(self, number: int | None) -> bool:
        """Whether a flat tensor and its states are swapped out between steps."""
        swaps = number is not None and bool(getattr(self._optimizer, "swap_optimizer", False))
        return swaps and bool(self._optimizer._swappable_optimizer_subgroup(number))

    @contextmanager
    def resident(self, number: int | None, *, changed: bool = False) -> Iterator[None]:
        """Bring a flat tensor and its states back from NVMe, if that is where they are; write back what was changed."""
        if not self.is_on_nvme(number):
            yield
            return
        self._optimizer._optimizer_states_and_gradient_swap_in(number)
        try:
            yield
        finally:
            if changed:
                self._optimizer._optimizer_states_and_gradient_swap_out(number)
            else:
                self._optimizer._release_swap_buffers(number)

    def states(self) -> tuple[str, ...]:
        """Names of the optimizer's states; none before its first update."""
        state = self._basic.state.get(self.flats[0], {})
        return tuple(sorted(key for key, value in state.items() if key != "step" and torch.is_tensor(value)))

    def step(self) -> int:
        """Updates the optimizer has made."""
        steps = {int(self._basic.state.get(flat, {}).get("step", 0)) for flat in self.flats}
        assert len(steps) == 1, f"parameter groups have made different numbers of updates: {sorted(steps)}"
        return steps.pop()

    def layout(self) -> Layout:
        """What a checkpoint of this engine holds."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        aliases = {}
        for name, parameter in self.engine.module.named_parameters(remove_duplicate=False):
            short = name.removeprefix(MODEL_PREFIX)
            if short != names[id(parameter)]:
                aliases[short] = names[id(parameter)]
        return Layout(
            num_ranks=self.num_ranks,
            zero_stage=self.zero_stage,
            optimizer=type(self._basic).__name__,
            step=self.step(),
            states=self.states(),
            groups=tuple(self._groups(names)),
            counters={name: int(getattr(self.engine, name)) for name in COUNTERS},
            tensors=self.tensors,
            aliases=aliases,
            versions={"deepspeed": version("deepspeed"), "torch": version("torch")},
        )

    # ------------------------------------------------------------------------------------------------ after a load

    def prepare_optimizer(self, step: int, states: Sequence[str]) -> None:
        """Make the optimizer's states, which do not exist before its first update, and set its step counters.

        New ones hold anything where a slice will be loaded: to touch them twice would cost as much as to read them.
        """
        for number, flat in enumerate(self.flats):
            with self.resident(number, changed=True):
                state = self._basic.state[flat]
                if not states:
                    state.clear()
                    continue
                state["step"] = self._step_counter(flat, step)
                for key in states:
                    if key not in state:
                        state[key] = self._zero_around_slices(number, torch.empty_like(flat.detach()))
        if self.zero_stage != 3:  # DeepSpeed's own views of the states, which its functions for parameters use
            self._optimizer._hp_optimizer_states_linked = False
            if states:
                self._optimizer._lazy_init_hp_params_optimizer_state()

    def _zero_around_slices(self, number: int, state: torch.Tensor) -> torch.Tensor:
        """What only pads a new state of a flat tensor becomes zero, as the optimizer itself would have made it."""
        end = 0
        for one in sorted((one for one in self.slices_to_fill() if one.flat == number), key=lambda one: one.at):
            state[end : one.at] = 0.0
            end = one.at + one.stop - one.start
        state[end:] = 0.0
        return state

    def use_masters(self, counters: dict[str, int]) -> None:
        """Bring the masters into the model's own weights. Collective: stages 1 and 2 gather them whole."""
        optimizer = self._optimizer
        with torch.no_grad():
            if self.zero_stage == 3:
                for number in range(len(self.flats)):
                    with self.resident(number):
                        optimizer._reassign_or_swap_out_partitioned_parameters(number)
                persistent = optimizer.persistent_parameters  # stay gathered, so they would keep their old values
                if persistent:
                    persistent[0].partition(persistent)
                optimizer.checkpoint_event_epilogue()
            else:
                optimizer.update_lp_params()
                if hasattr(optimizer, "_update_model_bit16_weights"):
                    for number in range(len(self.flats)):
                        optimizer._update_model_bit16_weights(number)
        for name in COUNTERS:
            setattr(self.engine, name, counters[name])

    # ------------------------------------------------------------------------------------------------ DeepSpeed's ways

    def _refuse_unsupported(self) -> None:
        name = type(self._basic).__name__
        reason = None
        if name not in _OPTIMIZERS:
            reason = f"the optimizer {name}; it knows {', '.join(_OPTIMIZERS)}"
        elif int(self.engine.dp_world_size) != self.num_ranks:
            reason = f"ranks that share their data ({self.engine.dp_world_size} groups of {self.num_ranks} ranks)"
        elif getattr(self._optimizer, "params_in_nvme_and_cpu", False) and any(
            not parameter.requires_grad for parameter in self.engine.module.parameters()
        ):
            reason = "frozen parameters (train.freeze) whose weights are on NVMe (offload_param); use device cpu"
        elif type(self._optimizer).__name__.startswith("SuperOffload"):
            reason = "offload_optimizer.super_offload, which updates weights during the backward; leave it out"
        if reason is not None:
            raise ConfigError(f"deepspeed: checkpoints cannot hold the state of {reason}.")

    def _cuts_of_trained(self) -> dict[int, tuple[int, int]]:
        """(slice_elements, offset_elements) of each trained parameter, by id; notes where each lies in the flats."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        optimizer, cuts = self._optimizer, {}
        if self.zero_stage == 3:
            for number, group in enumerate(optimizer.fp16_groups):
                at = 0
                for parameter in group:
                    cuts[id(parameter)] = (int(parameter.partition_numel()), 0)
                    self._homes[names[id(parameter)]] = (number, at)
                    at += int(parameter.partition_numel())
            return cuts
        for number, flat in enumerate(self.flats):
            for parameter, offset in self._places_in_group(number):
                cuts[id(parameter)] = (flat.numel(), offset)
                at = max(0, offset - self.rank * flat.numel())
                self._homes[names[id(parameter)]] = (number, at)
                _check_place(parameter, self.rank * flat.numel() - offset, at)
        return cuts

    def _places_in_group(self, number: int) -> list[tuple[torch.Tensor, int]]:
        """Parameters of a group of stages 1 and 2, and where each begins in the group's concatenation."""
        optimizer = self._optimizer
        if hasattr(optimizer, "round_robin_bit16_groups"):
            return list(
                zip(
                    optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number], strict=True
                )
            )
        places, offset = [], 0
        for parameter in optimizer.bf16_groups[number]:
            places.append((parameter, offset))
            offset += parameter.numel()
        return places

    def _parameter(self, name: str, parameter: Any, cuts: dict[int, tuple[int, int]]) -> StoredTensor:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        dtype = str(parameter.dtype).removeprefix("torch.")
        if id(parameter) in cuts:
            return StoredTensor(name, "trained", shape, dtype, *cuts[id(parameter)])
        if self.zero_stage == 3:
            self._plain[name] = parameter.ds_tensor.detach()
            return StoredTensor(name, "frozen", shape, dtype, int(parameter.partition_numel()), 0)
        self._plain[name] = parameter.detach()
        return StoredTensor(name, "frozen", shape, dtype, -(-parameter.numel() // self.num_ranks), 0)

    def _buffer(self, name: str, buffer: torch.Tensor) -> StoredTensor:
        self._plain[name] = buffer.detach()
        dtype = str(buffer.dtype).removeprefix("torch.")
        return StoredTensor(name, "buffer", tuple(buffer.shape), dtype, max(1, buffer.numel()), 0)

    def _is_whole(self, tensor: StoredTensor) -> bool:
        """Whether every rank holds all of it."""
        return tensor.kind == "buffer" or (tensor.kind == "frozen" and self.zero_stage != 3)

    def _groups(self, names: dict[int, str]) -> Iterator[dict[str, Any]]:
        """Parameter groups with their hyper-parameters, by Hugging Face names."""
        lists: list[list[str]] = [[] for _ in self._basic.param_groups]
        if self.zero_stage == 3:
            owner = self._optimizer.sub_group_to_group_id
            for number, group in enumerate(self._optimizer.fp16_groups):
                lists[owner[number]] += [names[id(parameter)] for parameter in group]
        else:
            for number in range(len(lists)):
                lists[number] += [names[id(parameter)] for parameter, _ in self._places_in_group(number)]
        for group, members in zip(self._basic.param_groups, lists, strict=True):
            kept = {key: value for key, value in group.items() if key not in ("params", "names")}
            yield {"hyper_parameters": kept, "parameters": members}

    def _step_counter(self, flat: torch.Tensor, step: int) -> int | torch.Tensor:
        """As the optimizer itself would make it: DeepSpeedCPUAdam counts in an int, torch in a tensor."""
        if type(self._basic).__name__ == "DeepSpeedCPUAdam":
            return step
        on_device = self._basic.defaults.get("fused") or self._basic.defaults.get("capturable")
        return torch.tensor(float(step), dtype=torch.float32, device=flat.device if on_device else "cpu")


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the model's state, each once."""
    owners = dict(module.named_modules())
    for name, buffer in module.named_buffers():
        owner, _, own_name = name.rpartition(".")
        if own_name not in owners[owner]._non_persistent_buffers_set:
            yield name.removeprefix(MODEL_PREFIX), buffer


def _check_place(parameter: Any, first: int, at: int) -> None:
    """DeepSpeed's own mapping of this rank's fragment must be what the offsets say: else it cuts in another way now."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    found = (mapping.lp_fragment_address.start, mapping.hp_fragment_address.start)
    assert found == (max(0, first), at), f"DeepSpeed maps a fragment to {found}, dsft to {(max(0, first), at)}"
