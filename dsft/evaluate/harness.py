"""Tasks of lm-evaluation-harness, kept on disk, on a model that may lie in slices over the ranks (extra ``lm-eval``).

Every rank builds the same requests (the harness sees one process), and the likelihoods and answers to them are made by
all ranks together. Prompts, scoring and windows over long texts are the harness's, so a task gives what its own model
class for transformers gives; dsft's part is the forwards.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from dsft.config.evaluation import LmEvalSection
from dsft.errors import ConfigError, DataError
from dsft.evaluate.answers import ask, seed_of
from dsft.evaluate.bootstrap import interval
from dsft.evaluate.likelihood import Scored, log_likelihoods
from dsft.model.generate import Sampling

if TYPE_CHECKING:
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.model.packed import PackedCausalLM


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task's scores.

    Attributes:
        num_documents: asked.
        scores: metric -> value, as the harness aggregates it; ``metric,filter`` where a filter was applied.
        intervals: metric -> 95 %, by bootstrap over documents; of the metrics that are means.
        each: the same metrics, document by document.
    """

    num_documents: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    each: dict[str, list[float]]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def check_tasks(section: LmEvalSection) -> None:
    """Raise ConfigError where the folder or one of the names is not there."""
    if not Path(section.path).is_dir():
        raise ConfigError(f"evaluate.lm_eval.path: there is no folder {section.path} with the tasks' YAML files.")
    known = _manager(section).all_tasks
    if missing := sorted(set(section.tasks) - set(known)):
        raise ConfigError(
            f"evaluate.lm_eval.tasks: {missing[0]!r} is not in {section.path}; there are {', '.join(sorted(known))}."
        )


def measure_task(
    name: str,
    section: LmEvalSection,
    model: PackedCausalLM,
    tokenizer: Tokenizer,
    groups: Groups,
    *,
    device: torch.device,
    pack_tokens: int,
    seed: int,
) -> dict[str, TaskResult]:
    """Measure a task, or each task of a group. Collective; equal on all ranks.

    Raises:
        DataError: the task's data cannot be read, or an answer is longer than ``pack_tokens``.
    """
    lm = HarnessModel(model, tokenizer, groups, device=device, pack_tokens=pack_tokens, seed=seed, name=name)
    loaded = _load(name, section, groups, seed)
    with _quiet_unless_first(groups):
        found: Any = evaluate(
            lm, loaded, limit=section.limit, bootstrap_iters=0, apply_chat_template=section.chat_template
        )
    return {task: _result(loaded["tasks"][task], samples, found, seed) for task, samples in found["samples"].items()}


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """What the harness asks a model, answered by all ranks together; each rank gets all answers.

    Args:
        pack_tokens: most tokens of one text; longer contexts lose their beginning, as in the harness's own model.
        seed: of sampled answers, with ``name`` and the request's position.
    """

    def __init__(
        self,
        model: PackedCausalLM,
        tokenizer: Tokenizer,
        groups: Groups,
        *,
        device: torch.device,
        pack_tokens: int,
        seed: int,
        name: str,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.hf
        self.max_length = pack_tokens - 1  # the harness counts what goes in, and the last token does not
        self._model, self._dsft_tokenizer, self._groups = model, tokenizer, groups
        self._place, self._seed, self._name = device, seed, name

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._dsft_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Only a key of the harness's caches, which dsft does not use."""
        return self._dsft_tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self._dsft_tokenizer.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, as the harness's own model for transformers makes them."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        sequences = []
        for texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise DataError(
                    f"task {self._name}: an answer ({str(texts)[:80]!r}) has {len(continuation):,} tokens, more than "
                    f"data.pack_tokens ({self.max_length + 1:,}) has room for; raise data.pack_tokens."
                )
            ids = (*context, *continuation)[-self.max_length - 1 :]
            sequences.append(Scored(ids, len(ids) - len(continuation)))
        found = log_likelihoods(
            self._model,
            sequences,
            self._groups,
            device=self._place,
            pack_tokens=self.max_length + 1,
            pad_id=self._dsft_tokenizer.pad_id,
            what=f"task {self._name}",
        )
        is_greedy = found.num_correct == found.num_tokens
        return list(zip(found.log_likelihood.tolist(), is_greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows where they are long."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            ):
                owners.append(number)
                windows.append((None, *utils.make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop texts."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            texts = [requests[number].args[0] for number in numbers]
            for number, answer in zip(
                numbers, self._generate(texts, requests[numbers[0]].args[1], numbers), strict=True
            ):
                answers[number] = answer
        return answers

    def _generate(self, texts: Sequence[str], settings: dict[str, Any], numbers: Sequence[int]) -> list[str]:
        wanted: Mapping[str, Any] = normalize_gen_kwargs(settings)
        stops = handle_stop_sequences([*wanted["until"]], eos=self.tokenizer.decode(self.eot_token_id))
        most_new = int(wanted["max_gen_toks"])
        room = self.max_length - most_new
        if room < 1:
            raise DataError(
                f"task {self._name} wants answers of {most_new:,} tokens (max_gen_toks), which leaves no room for a "
                f"prompt in data.pack_tokens ({self.max_length + 1:,}); set max_gen_toks in the task, or raise "
                "data.pack_tokens."
            )
        sampling = None
        if wanted["do_sample"]:
            seeds = tuple(seed_of(self._seed, f"task/{self._name}", number) for number in numbers)
            sampling = Sampling(float(wanted["temperature"]), float(wanted.get("top_p", 1.0)), seeds)
        ids = ask(
            self._model,
            [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in texts],
            self._groups,
            max_new_tokens=most_new,
            eos_ids=[self.eot_token_id, *self._single_tokens(stops)],
            pad_id=self._dsft_tokenizer.pad_id,
            sampling=sampling,
        )
        decoded = [self.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        return [str(postprocess_generated_text(text, stops, think_end_token=None)) for text in decoded]

    def _single_tokens(self, stops: Sequence[str]) -> Iterator[int]:
        """Tokens that say a stop text and no more: generation need not go on behind them."""
        for stop in stops:
            ids = self.tokenizer.encode(stop, add_special_tokens=False)
            if len(ids) == 1 and self.tokenizer.decode(ids) == stop:
                yield int(ids[0])


def _manager(section: LmEvalSection) -> TaskManager:
    return TaskManager(include_path=section.path, include_defaults=False)


def _load(name: str, section: LmEvalSection, groups: Groups, seed: int) -> Any:
    """The task with its data. Rank 0 first: the others find what it has put into the cache of ``datasets``."""
    loaded: Any = None
    for is_first in (True, False):
        with groups.together():
            if (groups.rank == 0) == is_first:
                try:
                    loaded = _manager(section).load([name])
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"task {name} of {section.path} cannot be loaded: {' '.join(str(error).split())[:600]}. A task "
                        "on disk names its data by dataset_path: json and dataset_kwargs: {data_files: ...}."
                    ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


@contextlib.contextmanager
def _quiet_unless_first(groups: Groups) -> Iterator[None]:
    """The harness's progress bars of rank 0 only: it takes every rank for the only one."""
    with contextlib.nullcontext() if groups.rank == 0 else contextlib.redirect_stderr(io.StringIO()):
        yield


def _result(task: Any, samples: Sequence[Mapping[str, Any]], found: Mapping[str, Any], seed: int) -> TaskResult:
    name = task.config.task
    scores = {
        _metric_name(key): float(value)
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    means = {metric for metric, function in task.aggregation().items() if function is mean}
    each: dict[str, list[float]] = {}
    for sample in samples:
        for metric in means & set(sample["metrics"]):
            each.setdefault(_metric_name(f"{metric},{sample['filter']}"), []).append(float(sample[metric]))
    for metric, values in each.items():
        assert abs(statistics.fmean(values) - scores[metric]) < 1e-9, (name, metric)
    return TaskResult(
        num_documents=len({sample["doc_id"] for sample in samples}),
        scores=scores,
        intervals={
            metric: interval(values, None, seed=seed, purpose=f"{name}/{metric}") for metric, values in each.items()
        },
        each=dict(sorted(each.items())),
    )


def _metric_name(key: str) -> str:
    """``acc,none`` (the harness: metric and filter) is ``acc``."""
    return key.removesuffix(",none")
