"""When held-out sets are measured in training, and what follows from it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dsft.batch.types import StepBatch
from dsft.config.bias import BiasSection
from dsft.config.evaluation import EvaluateSection
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import StoppedEarly
from dsft.evaluate.bias import BiasResult, BiasRise, bias_change, measure_bias, passed_limit
from dsft.evaluate.forgetting import Forgetting, forgetting
from dsft.evaluate.overfit import OverfitWatch
from dsft.evaluate.run import Evaluation, HeldOutSet, evaluate_all
from dsft.train.state import TrainState

if TYPE_CHECKING:
    from dsft.train.loop import Run


Ended = Literal["early_stop", "stopped"]
"""How training ends at an evaluation."""


@dataclass(slots=True)
class EvaluationPlan:
    """The held-out sets of a run, and what is to be done with their losses.

    Attributes:
        section: when to measure.
        sets: what to measure.
        watch: overfitting watch; its state travels in ``TrainState.overfit``.
        pack_tokens: most tokens of one forward of a bias test.
        _last_step, _last_losses: when the sets were measured last, and the loss of each.
    """

    section: EvaluateSection
    sets: tuple[HeldOutSet, ...]
    tokenizer: Tokenizer
    watch: OverfitWatch
    pack_tokens: int
    _last_step: int = -1
    _last_losses: dict[str, float] = field(default_factory=dict)

    def at_start(self, run: Run, state: TrainState) -> Ended | None:
        """Measure the untrained state, if asked for; on a resume, what the attempt before was stopped in."""
        if state.is_unmeasured or (self.section.at_start and state.step == 0):
            return self.measure(run, state)
        return None

    def at_end(self, run: Run, state: TrainState) -> Ended | None:
        """Measure the final state, unless it was just measured."""
        if self.section.at_end and self._last_step != state.step:
            return self.measure(run, state)
        return None

    def go_back(self, state: TrainState) -> None:
        """The run goes on from an older state."""
        self.watch = OverfitWatch.from_json(self.watch.patience, state.overfit)
        self._last_step = -1

    def losses_at(self, step: int) -> dict[str, float]:
        """Loss of each set, if they were measured after this step; else nothing."""
        return self._last_losses if step == self._last_step else {}

    def due(self, state: TrainState, batch: StepBatch) -> bool:
        """Whether the step that was just taken ends an interval or a stage. Equal on all ranks."""
        every = self.section.every_steps
        by_step = every is not None and state.step % every == 0
        return self._measures and (by_step or (self.section.at_stage_ends and batch.plan.ends_stage))

    def watch_training(self, state: TrainState, record: dict[str, Any]) -> None:
        """Add a step record's losses (already reduced over ranks) to the training loss since the last evaluation."""
        for name, loss in record["loss_by_source"].items():
            weight = record["weight_by_source"][name]
            total, weights = state.train_loss.get(name, (0.0, 0.0))
            if math.isfinite(loss):
                state.train_loss[name] = [total + loss * weight, weights + weight]

    def measure(self, run: Run, state: TrainState) -> Ended | None:
        """Measure all sets and bias tests (collective), write their records, warn of what has passed its limit.

        Returns:
            ``early_stop``: a set is overfitted and ``evaluate.early_stop`` is set, a set's loss has risen by more than
            its ``max_rise``, or a bias test's value has and it says ``on_rise: stop``. ``stopped``: on request, before
            all was measured; nothing of it is kept, and the next start measures it anew.
        """
        if not self._measures:
            return None
        started = time.perf_counter()
        try:
            evaluation = self._evaluate(run, state)
            bias = [self._measure_bias(run, test) for test in self.section.bias]
        except StoppedEarly:
            state.is_unmeasured = True
            return "stopped"
        for record in evaluation.records:
            run.recorder.write("evaluation", record)
        forgotten = self._forgotten(evaluation, state)
        biased = self._bias_rises(run, state, bias)
        messages = [found.message for found in evaluation.overfitting]
        messages += [found.message for found in forgotten] + [found.message for found in biased]
        for message in messages + self._memorised(evaluation):
            run.recorder.warn(message)
        state.train_loss, state.is_unmeasured = {}, False
        self._last_step = state.step
        self._last_losses = {r["set"]: r["loss"] for r in evaluation.records if math.isfinite(r["loss"])}
        state.overfit = self.watch.to_json()
        run.step_log.exclude(time.perf_counter() - started)
        is_overfitted = bool(evaluation.overfitting) and self.section.early_stop is not None
        return "early_stop" if forgotten or is_overfitted or any(found.stops for found in biased) else None

    @property
    def _measures(self) -> bool:
        return bool(self.sets or self.section.bias)

    def _evaluate(self, run: Run, state: TrainState) -> Evaluation:
        return evaluate_all(
            self.sets,
            run.engine.module,
            self.tokenizer,
            run.groups,
            self.watch,
            device=run.engine.device,
            step=state.step,
            tokens_trained=state.tokens_trained,
            train_losses={name: total / weight for name, (total, weight) in state.train_loss.items() if weight > 0},
            seed=run.seed,
            stop=run.stop,
        )

    def _measure_bias(self, run: Run, test: BiasSection) -> BiasResult:
        return measure_bias(
            run.engine.module,
            test,
            self.tokenizer,
            run.groups,
            device=run.engine.device,
            pack_tokens=self.pack_tokens,
            seed=run.seed,
            stop=run.stop,
        )

    def _bias_rises(self, run: Run, state: TrainState, results: list[BiasResult]) -> list[BiasRise]:
        """Write the bias tests' records; the first values of their items stay in the state."""
        passed = []
        for test, result in zip(self.section.bias, results, strict=True):
            before = state.first_bias.setdefault(test.name, list(result.each))
            change = bias_change(test, before, result.each, seed=run.seed)
            run.recorder.write(
                "bias",
                {
                    "step": state.step,
                    "tokens_trained": state.tokens_trained,
                    "set": test.name,
                    "test": test.kind,
                    "change": change.value,
                    "change_interval": (change.low, change.high),
                    **result.record(),
                },
            )
            passed.append(passed_limit(test, result, change))
        return [one for one in passed if one is not None]

    def _forgotten(self, evaluation: Evaluation, state: TrainState) -> list[Forgetting]:
        """Sets whose loss is above their limit; the losses of the first evaluation are remembered in the state."""
        found = []
        for held_out, record in zip(self.sets, evaluation.records, strict=True):
            name = held_out.section.name
            first_loss = state.first_loss.setdefault(name, record["loss"])
            found.append(forgetting(name, first_loss, record["loss"], held_out.section.max_rise))
        return [one for one in found if one is not None]

    def _memorised(self, evaluation: Evaluation) -> list[str]:
        """A warning for each set of which more is reproduced than its limit allows."""
        messages = []
        for held_out, record in zip(self.sets, evaluation.records, strict=True):
            probe = held_out.section.memorisation
            if probe is not None and probe.max_share is not None and record["memorised_share"] > probe.max_share:
                messages.append(
                    f"set {held_out.section.name!r} is being memorised: {record['memorised_share']:.1%} of "
                    f"{record['num_probed']} documents are continued word for word (limit: max_share "
                    f"{probe.max_share:g}). Remove duplicates, train for fewer epochs, or lower the learning rate."
                )
        return messages
