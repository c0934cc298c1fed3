"""Other programs for the loss that ``dsft ops bench`` times beside dsft's, and which of them are here.

Each is called as its own documentation says, with its own defaults; where a program has a setting that trades memory
for time (Liger's chunks) or exactness for time (Apple's gradient filter), both ends of it are a side.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from dsft.ops.linear_cross_entropy import masked_linear_cross_entropy

IGNORED = -100
LIGER_LARGE_CHUNKS = 16
"""Liger's ``chunk_mem_const``: so many times the logits of its default at once. Its pull request 1472 gives 16 as the
fastest of those tried at a vocabulary of 128 k."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [N, H], weight [V, H], targets int64[N] with -100 where masked) -> mean loss."""


@dataclass(frozen=True, slots=True)
class Side:
    """One program.

    Attributes:
        loss: None where it cannot be used here.
        about: its version; or why it is absent.
    """

    name: str
    loss: Loss | None
    about: str


def sides(device_type: str) -> list[Side]:
    """dsft's loss and every other that the table knows, in the table's order, whether it is here or not."""
    return [
        Side("dsft", _dsft, "this one"),
        Side("torch eager", torch_eager, torch.__version__),
        _torch_chunked(),
        *_liger(device_type),
        *_apple(device_type),
        _trl(),
    ]


def torch_eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits at once: ``F.linear`` and ``F.cross_entropy``."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def _dsft(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    rows = torch.nonzero(targets != IGNORED)[:, 0]  # in training the loader knows them
    row_weight = torch.full(rows.shape, 1.0 / max(1, len(rows)), device=hidden.device)
    return masked_linear_cross_entropy(hidden, weight, None, rows, targets[rows], row_weight).loss


def _torch_chunked() -> Side:
    name = "torch linear_cross_entropy"
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return Side(name, None, f"absent: torch {torch.__version__} has no LinearCrossEntropyOptions")

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, options=options())

    return Side(name, loss, torch.__version__)


def _liger(device_type: str) -> list[Side]:
    names = ("Liger", "Liger, large chunks")
    function, about = _find("liger-kernel", "liger_kernel.transformers.functional", device_type)
    if function is None:
        return [Side(name, None, about) for name in names]
    fused = function.liger_fused_linear_cross_entropy

    def default(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _first(fused(hidden, weight, targets))

    def large(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _first(fused(hidden, weight, targets, chunk_mem_const=LIGER_LARGE_CHUNKS))

    return [Side(name, loss, about) for name, loss in zip(names, (default, large), strict=True)]


def _apple(device_type: str) -> list[Side]:
    names = ("Apple CCE", "Apple CCE, no filter")
    module, about = _find("cut-cross-entropy", "cut_cross_entropy", device_type)
    if module is None:
        return [Side(name, None, about) for name in names]

    def default(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _first(module.linear_cross_entropy(hidden, weight, targets))

    def no_filter(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _first(module.linear_cross_entropy(hidden, weight, targets, filter_eps=None))

    return [Side(name, loss, about) for name, loss in zip(names, (default, no_filter), strict=True)]


def _trl() -> Side:
    """TRL's head of tiles (its SFTTrainer's ``loss_type: nll``) on a model that gives the hidden states it is given.

    On CUDA it computes the supervised positions only; elsewhere, by its own choice, all.
    """
    module, about = _find("trl", "trl.trainer.utils", None)
    if module is None or not hasattr(module, "add_fused_lm_head"):
        reason = about if module is None else f"absent: TRL {about} has no add_fused_lm_head; 1.16 has"
        return Side("TRL chunked", None, reason)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        model = _ModelOfHiddenStates(hidden, weight)
        module.add_fused_lm_head(model)
        return _first(model.forward(shift_labels=targets.unsqueeze(0), fused_lm_head=True).loss)

    return Side("TRL chunked", loss, about)


class _ModelOfHiddenStates:
    """What TRL's ``add_fused_lm_head`` asks of a transformers model: a backbone, here a constant, and a head."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(logit_scale=1.0))
        self._hidden, self._head = hidden, SimpleNamespace(weight=weight, bias=None)

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._hidden.unsqueeze(0))

    def get_output_embeddings(self) -> SimpleNamespace:
        return self._head

    def forward(self, **_: Any) -> Any:
        """TRL puts its own in this one's place."""
        return self._hidden


def _first(result: Any) -> torch.Tensor:
    """The loss alone, where a version returns more beside it."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, torch.Tensor)
    return found


def _find(package: str, module: str, device_type: str | None) -> tuple[Any, str]:
    """The module and its version; or None and why not. ``device_type``: of a package that is for CUDA only."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None, f"absent: {package} is not installed (pip install 'dsft[bench]')"
    if device_type not in (None, "cuda"):
        return None, f"absent: {package} {version} runs on CUDA only"
    try:
        return importlib.import_module(module), version
    except (ImportError, AttributeError, RuntimeError) as error:  # made for another torch, transformers or triton
        return None, f"absent: {package} {version} cannot be imported here: {type(error).__name__}: {error}"
