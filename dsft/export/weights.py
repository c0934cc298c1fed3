"""Whole weights out of DeepSpeed's sharded checkpoint files, under the Hugging Face names.

The fp32 master weights of ZeRO stages 1 to 3 lie in flat slices, one a rank; ``deepspeed.utils.zero_to_fp32`` knows
their padding, their order, the frozen parameters (kept apart) and which names share one tensor. It is used lazily: a
tensor is put together when it is converted, so the host holds one copy in the output type and not also one in fp32.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.errors import CheckpointError
from dsft.model.parameters import hf_name

if TYPE_CHECKING:
    import torch


def read_weights(payload: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer, whole, on the CPU; names that share a tensor share it in the result too.

    Args:
        payload: folder with DeepSpeed's ``*_model_states.pt`` and ``*_optim_states.pt``, of any number of ranks. The
            files are pickles: only read those of a checkpoint that was verified and whose origin is trusted.
        dtype: type of floating-point tensors in the result; other tensors keep theirs.

    Raises:
        CheckpointError: the files are not those of a whole DeepSpeed checkpoint.
    """
    lazy = _lazy_state(payload)
    converted: dict[int, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name in list(lazy):
        tensor = lazy[name]
        if id(tensor) not in converted:
            whole = tensor.contiguous()
            converted[id(tensor)] = whole.to(dtype) if whole.is_floating_point() else whole
        weights[hf_name(name)] = converted[id(tensor)]
    return weights


def _lazy_state(payload: Path) -> dict[str, Any]:
    """Name -> tensor or DeepSpeed's GatheredTensor; shared names hold the same object."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not any(payload.rglob("*_model_states.pt")):
        raise CheckpointError(
            f"{payload} holds no DeepSpeed model state (*_model_states.pt): it is not the payload of a whole "
            "checkpoint. Choose another checkpoint of the run."
        )
    if not any(payload.rglob("*_optim_states.pt")):
        return _stage_0_state(payload)
    folder = next(payload.rglob("*_model_states.pt")).parent
    try:
        # It reports its progress with print and a progress bar: a library has no business on this terminal.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise CheckpointError(
            f"the DeepSpeed files in {folder} do not make a whole model: {error}. A rank's file may be missing; "
            "choose another checkpoint of the run."
        ) from error
    return dict(state)


def _stage_0_state(payload: Path) -> dict[str, Any]:
    """Without ZeRO there is one file with whole weights; shared tensors are shared storages in it."""
    import torch

    file = next(payload.rglob("*_model_states.pt"))
    module: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    first_of: dict[tuple[int, torch.Size], torch.Tensor] = {}
    return {name: first_of.setdefault((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in module.items()}
