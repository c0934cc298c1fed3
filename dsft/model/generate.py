"""Answers of the model that is being trained, greedy or sampled, also while ZeRO-3 holds it in slices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsft.model.attention import plain_attention
from dsft.model.packed import PackedCausalLM


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; > 0.
        top_p: draw from the most likely tokens that together have this probability.
        seeds: one a prompt; a prompt's draws depend on its seed alone, whatever else is in the batch.
    """

    temperature: float
    top_p: float
    seeds: tuple[int, ...]

    def only(self, numbers: Sequence[int]) -> Sampling:
        """The same for some of the prompts."""
        return Sampling(self.temperature, self.top_p, tuple(self.seeds[number] for number in numbers))


def generate(
    model: PackedCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    synced: bool,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """The most likely continuation of each prompt (or a sampled one), as one left-padded batch.

    Args:
        prompts: token ids, each non-empty. May be empty with ``synced``: the rank only takes part in forwards.
        max_new_tokens: most tokens generated; equal on all ranks.
        eos_ids: a prompt's answer ends before the first of these.
        pad_id: fills the batch; never returned.
        synced: every rank runs as many forwards as the one that needs most, because under ZeRO-3 each forward gathers
            weights from all. Every rank must then make the same number of calls.

    Returns:
        New tokens of each prompt, without the end token.
    """
    if not prompts and not synced:
        return []
    device = model.head().weight.device
    batch = prompts or [[pad_id]]
    longest = max(len(prompt) for prompt in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    with _generating(model, max_new_tokens, eos_ids, pad_id):
        output = model.hf.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            synced_gpus=synced,
            logits_processor=_processors(sampling) if prompts else None,
        )
    return [_until_end(row, set(eos_ids)) for row in output[:, longest:].tolist()][: len(prompts)]


class _GumbelNoise:
    """Makes the greedy choice a draw: argmax(logits + Gumbel noise) is distributed as softmax(logits).

    (Gumbel 1954; Maddison et al. 2014, "A* sampling", section 2.) Each row has a generator of its own on the CPU, so
    that its draws depend neither on the batch nor on the device.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tiny = torch.finfo(torch.float32).tiny
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g) for g in self._generators]).clamp_min_(tiny)
        return scores.float() - torch.log(-torch.log(uniform)).to(scores.device)


def _processors(sampling: Sampling | None) -> Any:
    if sampling is None:
        return None
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*processors, _GumbelNoise(sampling.seeds)])


def _until_end(tokens: list[int], eos_ids: set[int]) -> list[int]:
    end = next((position for position, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tokens[:end]


@contextlib.contextmanager
def _generating(model: PackedCausalLM, max_new_tokens: int, eos_ids: Sequence[int], pad_id: int) -> Iterator[None]:
    """Plain attention, dropout off, and nothing but the largest score (a model's own generation config may sample)."""
    from transformers import GenerationConfig

    hf: Any = model.hf
    soft_capped = getattr(hf.config.get_text_config(), "attn_logit_softcapping", None) is not None
    was_training, own_config = model.training, hf.generation_config
    hf.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(eos_ids) or None, pad_token_id=pad_id
    )
    model.eval()
    try:
        with torch.no_grad(), plain_attention(hf, "eager" if soft_capped else "sdpa"):
            yield
    finally:
        hf.generation_config = own_config
        model.train(was_training)
