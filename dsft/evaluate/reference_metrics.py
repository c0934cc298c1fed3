"""ROUGE, BLEU and chrF of answers, as their reference libraries compute them (extra ``eval``).

ROUGE: rouge-score (Lin 2004), F-measure with the stemmer, mean over answers. BLEU and chrF: sacrebleu (Post 2018), of
the whole set, in [0, 100], with sacrebleu's own bootstrap interval.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from dsft.errors import ConfigError
from dsft.evaluate.bootstrap import NUM_RESAMPLES

ROUGE = ("rouge1", "rouge2", "rougeL")


def require_packages(metrics: Sequence[str]) -> None:
    """Raise ConfigError where a package of these metrics is not installed."""
    for package, name in (("rouge_score", "rouge-score"), ("sacrebleu", "sacrebleu")):
        wanted = [metric for metric in metrics if (metric in ROUGE) == (package == "rouge_score")]
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the metric {wanted[0]} needs the package {name}, which is not installed: pip install 'dsft[eval]'."
            )


def require_harness() -> None:
    """Raise ConfigError where lm-evaluation-harness is not installed (extra ``lm-eval``)."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.lm_eval needs lm-evaluation-harness, which is not installed: pip install 'dsft[lm-eval]'."
        )


def rouge(kinds: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F-measure of each answer, by kind (``rouge1``, ``rouge2``, ``rougeL``), in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {kind: [float(score[kind].fmeasure) for score in scores] for kind in kinds}


def corpus_score(kind: str, answers: Sequence[str], references: Sequence[str]) -> tuple[float, tuple[float, float]]:
    """``bleu`` or ``chrf`` of the whole set and its 95 % interval, both in [0, 100]."""
    from sacrebleu.metrics import BLEU, CHRF

    metric: Any = {"bleu": BLEU, "chrf": CHRF}[kind]()
    score = float(metric.corpus_score(list(answers), [list(references)]).score)
    if len(answers) < 2:  # nothing to resample
        return score, (score, score)
    resampled = metric.corpus_score(list(answers), [list(references)], n_bootstrap=NUM_RESAMPLES)
    said = json.loads(resampled.format(width=12, is_json=True, signature=str(metric.get_signature())))
    if "confidence_mean" not in said:  # sacrebleu's way to say that every resample scored 0
        return score, (score, score)
    middle, half = float(said["confidence_mean"]), float(said["confidence_var"])
    return score, (middle - half, middle + half)
