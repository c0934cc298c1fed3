"""Instruction pairs out of raw text by rules: the questions are a rule's, the answers are the text's own words.

The rules are of the kind that Cheng, Huang and Wei mine ("Adapting Large Language Models via Reading Comprehension",
arXiv:2309.09530, table 2); the cloze is Taylor's ("Cloze Procedure", 1953).

    cloze      a sentence with one word left out -> the word
    section    the title and a heading that is no question -> what stands below the heading
    question   a heading that is a question, begins with "How to", or is the subject of the first sentence below it
               ("A page fault is ...") -> what stands below it

What is chosen is a function of (seed, purpose, text of the document, text of the pair): neither the files nor their
order change it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dsft.corpus.sections import TextSection, blocks, is_prose, split_sections

Rule = Literal["cloze", "section", "question"]
RULES: tuple[Rule, ...] = get_args(Rule)
BLANK = "____"

_PURPOSE = "bridge pairs"
_MOST_SENTENCE_WORDS = 60
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"(?<![\w.\-/`*])[^\W\d_]{4,}(?![\w\-/(`*])")
_ASKING = re.compile(
    r"(how|what|why|when|where|who)\s+(is|are|was|were|do|does|did|can|could|should|will|would|has|have)\s",
    re.IGNORECASE,
)
_HOW_TO = re.compile(r"how\s+to\s+", re.IGNORECASE)
_DEFINITION = re.compile(r"(?P<subject>((An?|The)\s+)?(?P<noun>[^.,;:!?()]{2,60}?))\s+(?P<verb>is|are)\s")
_MARKS = str.maketrans("", "", '*`_"')
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "about after also because been before being between both could does each even every from have here into just "
        "like made make many more most much must only other over same should since some such than that their them then "
        "there these they this those through under used very were what when where which while whom whose will with "
        "without would your",
    )
)
"""Words that say nothing about a domain. English; in other languages every word of four letters may be left out."""
_CLOZE_PROMPTS = (
    f"Fill in the missing word ({BLANK}).",
    f"Which one word stands at {BLANK}?",
    f"One word is left out of this sentence and shown as {BLANK}. Give the word.",
)


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """What is made of a document.

    Attributes:
        rules: which of ``RULES``.
        per_document: most pairs of each rule from one document.
        min_words: least words of a sentence that is made a cloze, and of an answer that is a section.
        max_answer_characters: an answer ends with the last whole block up to this length.
        seed: of the choice.
    """

    rules: tuple[Rule, ...] = RULES
    per_document: int = 4
    min_words: int = 8
    max_answer_characters: int = 2_000
    seed: int = 17


@dataclass(frozen=True, slots=True)
class BridgePair:
    """One pair.

    Attributes:
        rule: that made it.
        prompt: what is asked.
        answer: verbatim from the document.
        said: the sentence that is filled in, or the answer: what must not be said twice.
        evidence: the paragraph or section that it comes from.
    """

    rule: Rule
    prompt: str
    answer: str
    said: str
    evidence: str


def bridge_pairs(text: str, settings: BridgeSettings) -> list[BridgePair]:
    """The pairs of one document, rule by rule, each in the order of the text."""
    document = _hash(settings.seed, _PURPOSE, text)
    sections = split_sections(text)
    found = [*_clozes(sections, document, settings.min_words), *_section_pairs(sections, document, settings)]
    return [
        pair
        for rule in settings.rules
        for pair in _chosen([pair for pair in found if pair.rule == rule], document, settings.per_document)
    ]


def _clozes(sections: Sequence[TextSection], document: int, min_words: int) -> Iterator[BridgePair]:
    for section in sections:
        for begin, end in blocks(section.body):
            paragraph = section.body[begin:end]
            if not is_prose(paragraph) or BLANK in paragraph:
                continue
            for sentence in _sentences(paragraph):
                if min_words <= len(sentence.split()) <= _MOST_SENTENCE_WORDS:
                    yield from _cloze(sentence, paragraph, document)


def _cloze(sentence: str, paragraph: str, document: int) -> Iterator[BridgePair]:
    lower = sentence.lower()
    words = [
        match
        for match in _WORD.finditer(sentence)
        if match[0].lower() not in _COMMON and lower.count(match[0].lower()) == 1
    ]
    if words:
        key = _hash(document, sentence)
        word = words[key % len(words)]
        blanked = sentence[: word.start()] + BLANK + sentence[word.end() :]
        asked = _CLOZE_PROMPTS[_hash(key) % len(_CLOZE_PROMPTS)]
        yield BridgePair("cloze", f"{asked}\n\n{blanked}", word[0], sentence, paragraph)


def _sentences(paragraph: str) -> Iterator[str]:
    """Whole sentences: they end with a mark, and what follows them does not begin with a small letter."""
    begin = 0
    for border in [*_SENTENCE_END.finditer(paragraph), None]:
        end, after = (border.start(), border.end()) if border else (len(paragraph), len(paragraph))
        if paragraph[after : after + 1].islower():
            continue
        if begin < end and paragraph[end - 1] in ".!?" and not paragraph[begin].islower():
            yield paragraph[begin:end]
        begin = after


def _section_pairs(sections: Sequence[TextSection], document: int, settings: BridgeSettings) -> Iterator[BridgePair]:
    title = _title(sections)
    for number, section in enumerate(sections):
        answer = _answer(section.body, settings.max_answer_characters)
        if section.heading and len(answer.split()) >= settings.min_words:
            above = "" if number == 0 else title
            question = _question(section.heading, section.body)
            if question:
                rule: Rule = "question"
                prompt = f"{above}: {question}" if above else question
            else:
                rule, prompts = "section", _section_prompts(section.heading, above)
                prompt = prompts[_hash(document, section.heading) % len(prompts)]
            yield BridgePair(rule, prompt, answer, answer, section.body)


def _title(sections: Sequence[TextSection]) -> str:
    """The first heading, where no other one is of its depth: else they are equals, and it is no title of them."""
    first = sections[0] if sections else None
    if first is None or any(section.style == first.style for section in sections[1:]):
        return ""
    return first.heading


def _question(heading: str, body: str) -> str | None:
    """The question that a heading asks by its own words and those of the first sentence below it."""
    if heading.endswith("?"):
        return heading
    if how_to := _HOW_TO.match(heading):
        verb = heading[how_to.end() :]
        return f"How do I {verb[:1].lower()}{verb[1:]}?"
    if _ASKING.match(heading):
        return f"{heading}?"
    definition = _DEFINITION.match(body)
    if definition and _singular(definition["noun"]) == _singular(heading):
        subject = " ".join(definition["subject"].translate(_MARKS).split())
        is_common = definition[2] or (definition["verb"] == "are" and not subject[1:2].isupper())  # no name
        begin = subject[:1].lower() if is_common else subject[:1]
        return f"What {definition['verb']} {begin}{subject[1:]}?"
    return None


def _singular(noun: str) -> str:
    """For comparing only: "Value Patterns" and "*value pattern*" are the same."""
    return " ".join(noun.translate(_MARKS).casefold().split()).removesuffix("s")


def _section_prompts(heading: str, title: str) -> tuple[str, ...]:
    if title:
        return (
            f'Write the section "{heading}" of "{title}".',
            f'What does "{title}" say under "{heading}"?',
            f'{title}. What is there to say about "{heading}"?',
        )
    return f'Write the text with the heading "{heading}".', f'What is there to say about "{heading}"?'


def _answer(body: str, max_characters: int) -> str:
    """The first whole blocks of a body; empty where the first one is too long already."""
    ends = [end for _, end in blocks(body) if end <= max_characters]
    return body[: ends[-1]] if ends else ""


def _chosen(pairs: Sequence[BridgePair], document: int, most: int) -> list[BridgePair]:
    """At most so many: those with the lowest hashes, in the order of the text."""
    ranked = sorted(range(len(pairs)), key=lambda number: _hash(document, pairs[number].prompt, number))
    return [pairs[number] for number in sorted(ranked[:most])]


def _hash(*parts: int | str) -> int:
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
