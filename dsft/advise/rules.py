"""The rules of ``dsft advise``, all of them: supervised, unsupervised or both.

``RULES`` is read from the top and the first rule that applies decides. There is no score. Each threshold has the reason
for its value beside it: a publication, or "chosen" and the arithmetic behind it. They were written down before any of
the runs in ``benchmarks/four_arms.py`` was made, which then measures how often they are right.

Sources, by the names used below:
  DAPT         Gururangan et al. 2020, "Don't Stop Pretraining", arXiv 2004.10964
  LIMA         Zhou et al. 2023, "LIMA: Less Is More for Alignment", arXiv 2305.11206
  Gekhman      Gekhman et al. 2024, "Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?", arXiv 2405.05904
  Ibrahim      Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train LLMs", arXiv 2403.08763
  Jiang        Jiang et al. 2024, "Instruction-tuned Language Models are Better Knowledge Learners", arXiv 2402.12847
  Muennighoff  Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264
  Carlini      Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models", arXiv 2202.07646
  Lee          Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better", arXiv 2107.06499
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsft.advise.evidence import Evidence, Method

MIN_PAIRS = 100
"""Fewer cannot be both learned and tested. Chosen: a fifth is set aside, and the 95 % interval of a share near a half
that was measured on 20 answers is 0.44 wide, so hardly any training could be seen to help."""
ENOUGH_PAIRS = 1_000
"""As many carefully chosen pairs taught a 65B model to answer (LIMA). Fewer are a risk for a broad task."""
TEXT_PASSES = 4
"""Up to four passes over text are nearly as good as new text (Muennighoff)."""
MIN_UPDATES, SMALLEST_BATCH_TOKENS = 100, 4_096
"""Chosen: a learning rate that is warmed up and decayed again needs some hundred updates to do anything."""
MIN_TEXT_TOKENS = MIN_UPDATES * SMALLEST_BATCH_TOKENS // TEXT_PASSES
"""102,400."""
KNOWN_TEXT_RATIO = 1.05
"""Text that costs the model at most 5 % more bits per byte than general text is not another domain to it. Chosen; that
the gain grows with the distance is DAPT's finding."""
FOUND_IN_TEXT = 0.2
"""From this share of answers on, the text says what the pairs ask about. Chosen."""
ALREADY_RIGHT_F1 = 0.9
"""Chosen: people agree with each other at about 0.9 on SQuAD, which this F1 is from (arXiv 1606.05250)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    Attributes:
        applies: whether it decides. because: why, with the numbers. otherwise: what would change the recommendation.
        source: of the reasoning.
    """

    name: str
    method: Method
    applies: Callable[[Evidence], bool]
    because: Callable[[Evidence], str]
    otherwise: str
    source: str


def enough_text(evidence: Evidence) -> bool:
    """Four passes fill a hundred updates."""
    return evidence.text_tokens >= MIN_TEXT_TOKENS


def enough_pairs(evidence: Evidence) -> bool:
    """They can be learned and tested."""
    return evidence.num_pairs >= MIN_PAIRS


def text_is_news(evidence: Evidence) -> bool:
    """The model predicts it worse than general text, or it says what the pairs ask; unknown counts as news."""
    ratio, found = evidence.surprise, None if evidence.pairs is None else evidence.pairs.found_in_text_share
    return ratio is None or ratio > KNOWN_TEXT_RATIO or (found is not None and found >= FOUND_IN_TEXT)


def too_dear(evidence: Evidence, method: Method) -> bool:
    """Its estimated device-hours are over the stated budget."""
    budget, hours = evidence.situation.max_device_hours, evidence.device_hours.get(method)
    return budget is not None and hours is not None and hours > budget


def already_right(evidence: Evidence) -> bool:
    """The model answers the held-out prompts as well as people agree."""
    return evidence.pairs is not None and evidence.pairs.f1 >= ALREADY_RIGHT_F1


def _amounts(e: Evidence) -> str:
    return f"{e.num_pairs:,} pairs (needed: {MIN_PAIRS}) and {e.text_tokens:,} tokens of text ({MIN_TEXT_TOKENS:,})"


def _surprise(e: Evidence) -> str:
    if e.surprise is None:
        return "how new the text is to the model is not known, because no --general text was given"
    return f"the text costs the model {e.surprise:.2f} times the bits per byte of general text"


RULES: tuple[Rule, ...] = (
    Rule(
        "too little of both",
        "none",
        lambda e: not enough_pairs(e) and not enough_text(e),
        lambda e: f"there are {_amounts(e)}: nothing that can be learned and tested",
        f"{MIN_PAIRS} pairs, or {MIN_TEXT_TOKENS:,} tokens of text",
        "chosen (see MIN_PAIRS, MIN_TEXT_TOKENS)",
    ),
    Rule(
        "control without pairs",
        "none",
        lambda e: e.situation.control == "high" and not enough_pairs(e),
        lambda e: f"answers must keep a form, which raw text does not teach, and there are {e.num_pairs:,} pairs",
        f"{MIN_PAIRS} pairs that show the form, or --control low",
        "LIMA: form and style come from pairs",
    ),
    Rule(
        "text that must not be given out, without pairs",
        "none",
        lambda e: e.situation.sensitivity == "high" and not enough_pairs(e),
        lambda e: (
            "models give out what they were trained on word for word, the more often it is repeated, and the text "
            f"must not be given out; there are {e.num_pairs:,} pairs to train on instead"
        ),
        f"a text that was read and cleaned (--sensitivity medium), or {MIN_PAIRS} pairs",
        "Carlini",
    ),
    Rule(
        "too few pairs",
        "unsupervised",
        lambda e: not enough_pairs(e),
        lambda e: (
            f"{e.num_pairs:,} pairs are fewer than {MIN_PAIRS}: use them as a test; the {e.text_tokens:,} tokens of "
            "text can be learned"
        ),
        f"{MIN_PAIRS} pairs",
        "chosen (see MIN_PAIRS)",
    ),
    Rule(
        "text that must not be given out",
        "supervised",
        lambda e: e.situation.sensitivity == "high",
        lambda e: f"the text must not be given out, and the {e.num_pairs:,} pairs can be read by people first",
        "a text that was read and cleaned (--sensitivity medium)",
        "Carlini",
    ),
    Rule(
        "too little text",
        "supervised",
        lambda e: not enough_text(e),
        lambda e: (
            f"{e.text_tokens:,} tokens of text are fewer than {MIN_TEXT_TOKENS:,}: {TEXT_PASSES} passes over it are "
            f"not {MIN_UPDATES} updates of {SMALLEST_BATCH_TOKENS:,} tokens; the {e.num_pairs:,} pairs can be learned"
        ),
        f"{MIN_TEXT_TOKENS:,} tokens of text",
        "Muennighoff for the passes; the number of updates is chosen",
    ),
    Rule(
        "answers are right already, and the text is known",
        "none",
        lambda e: already_right(e) and not text_is_news(e),
        lambda e: f"its answers have F1 {e.pairs.f1:.2f} before any training, and {_surprise(e)}" if e.pairs else "",
        f"harder pairs (F1 under {ALREADY_RIGHT_F1}), or text of another domain",
        "SQuAD's human agreement",
    ),
    Rule(
        "answers are right already",
        "unsupervised",
        already_right,
        lambda e: f"its answers have F1 {e.pairs.f1:.2f} before any training; {_surprise(e)}" if e.pairs else "",
        f"harder pairs (F1 under {ALREADY_RIGHT_F1})",
        "SQuAD's human agreement",
    ),
    Rule(
        "the text is known",
        "supervised",
        lambda e: not text_is_news(e),
        lambda e: f"{_surprise(e)} (from {KNOWN_TEXT_RATIO} it is another domain), and does not hold the answers",
        "text of another domain, or text that says what the pairs ask about",
        "DAPT: the gain shrinks with the distance to what was learned before",
    ),
    Rule(
        "narrow task with enough pairs",
        "supervised",
        lambda e: e.situation.task == "narrow" and e.num_pairs >= ENOUGH_PAIRS,
        lambda e: f"one kind of question, and {e.num_pairs:,} pairs show it ({ENOUGH_PAIRS:,} are enough)",
        "--task broad: other questions than these pairs ask",
        "LIMA for the number; that a narrow task needs no new knowledge is an assumption, check it with both",
    ),
    Rule(
        "budget",
        "supervised",
        lambda e: too_dear(e, "both") and not too_dear(e, "supervised"),
        lambda e: (
            f"both would take {e.device_hours['both']:.2f} device-hours of the {e.situation.max_device_hours:g} that "
            f"there are, supervised alone {e.device_hours['supervised']:.2f}"
        ),
        "a larger --max-device-hours",
        "dsft estimate",
    ),
    Rule(
        "both",
        "both",
        lambda e: True,
        lambda e: (
            f"there is enough of both ({_amounts(e)}), and {_surprise(e)}: knowledge from the text first, the form of "
            "answers from the pairs after it, mixed with text"
        ),
        "less of one of the two, a narrow task, a text that is known, a smaller budget",
        "DAPT; Gekhman: pairs alone teach new facts slowly and invite invention; Jiang: text and pairs together",
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say.

    Attributes:
        method: the recommendation. rule: the one that decided; because: its reason with the numbers.
        passed_over: rules before it, which did not apply.
    """

    method: Method
    rule: str
    because: str
    otherwise: str
    source: str
    passed_over: tuple[str, ...]


def decide(evidence: Evidence) -> Verdict:
    """The first rule that applies."""
    for position, rule in enumerate(RULES):
        if rule.applies(evidence):
            passed_over = tuple(earlier.name for earlier in RULES[:position])
            return Verdict(rule.method, rule.name, rule.because(evidence), rule.otherwise, rule.source, passed_over)
    raise AssertionError("the last rule always applies")
