"""From samples to documents: token ids, supervised spans, and the check that the spans say what they should."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from dsft.corpus.chat import ChatMarker, MarkedText, Region, Supervise, mark_completion
from dsft.corpus.control_tokens import has_private_spelling, has_reserved_character
from dsft.corpus.samples import BadRecord, Completion, Conversation, Sample, Text
from dsft.corpus.structure import structure_of
from dsft.corpus.tokenizer import Tokenizer
from dsft.store.types import Document


class Encoder:
    """Encodes the samples of one source.

    Args:
        tokenizer: the run's tokenizer.
        supervise: which part of a conversation is learned.
        marker: needed for conversations.
    """

    def __init__(self, tokenizer: Tokenizer, supervise: Supervise, marker: ChatMarker | None) -> None:
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._marker = marker
        self._prefix = np.array(tokenizer.prefix_ids, np.int32)
        self._suffix = np.array(tokenizer.suffix_ids, np.int32)

    def encode(self, samples: Sequence[Sample]) -> list[Document | BadRecord]:
        """One result a sample, in order: its document, or why there is none."""
        results: dict[int, Document | BadRecord] = {}
        texts: dict[int, str] = {}
        marked: dict[int, MarkedText] = {}
        for number, sample in enumerate(samples):
            try:
                _refuse_private_spelling(sample)
                if isinstance(sample, Text):
                    texts[number] = sample.text
                else:
                    marked[number] = self._mark(sample)
            except BadRecord as error:
                results[number] = error
        for number, ids in zip(texts, self._tokenizer.encode_batch(list(texts.values())), strict=True):
            results[number] = self._text_document(ids, texts[number])
        encodings = self._tokenizer.encode_batch_with_offsets([item.text for item in marked.values()])
        for (number, item), encoding in zip(marked.items(), encodings, strict=True):
            try:
                results[number] = self._marked_document(item, encoding)
            except BadRecord as error:
                results[number] = error
        return [results[number] for number in range(len(samples))]

    def _mark(self, sample: Completion | Conversation) -> MarkedText:
        if isinstance(sample, Completion):
            return mark_completion(sample.prompt, sample.completion)
        assert self._marker is not None
        return self._marker.mark(sample, self._supervise)

    def _text_document(self, ids: npt.NDArray[np.int32], text: str) -> Document:
        ids = np.concatenate([self._prefix, ids, self._suffix])
        num_bytes = len(text) if text.isascii() else len(text.encode())
        return Document(ids, np.array([[0, len(ids)]], np.int32), np.ones(1, np.float32), num_bytes)

    def _marked_document(self, marked: MarkedText, encoding: Encoding) -> Document:
        ids = np.array(encoding.ids, np.int32)
        offsets = encoding.offsets
        spans: list[tuple[int, int, float]] = []
        for region in marked.regions:
            start, end = _tokens_of(region, offsets)
            if region.weight:
                self._check(region, marked.text, ids, offsets, start, end)
            spans.append((start, end, region.weight))
        if marked.add_affixes:  # the end of the document belongs to what is learned last
            start, end, weight = spans[-1]
            spans[-1] = (start, end + len(self._suffix), weight)
            spans = [(s + len(self._prefix), e + len(self._prefix), w) for s, e, w in spans]
            ids = np.concatenate([self._prefix, ids, self._suffix])
        if marked.learn_rest:
            spans = _fill_gaps(spans, len(ids))
        spans = [span for span in spans if span[0] < span[1] and span[2] > 0]
        return Document(
            ids,
            np.array([span[:2] for span in spans], np.int32).reshape(-1, 2),
            np.array([span[2] for span in spans], np.float32),
            marked.num_bytes,
        )

    def _check(
        self,
        region: Region,
        text: str,
        ids: npt.NDArray[np.int32],
        offsets: list[tuple[int, int]],
        start: int,
        end: int,
    ) -> None:
        """Prove that tokens ``[start, end)`` say what the region should say, and nothing else but white space."""
        if start == end:
            if region.said:
                raise BadRecord(f"no token belongs to {region.where} alone, so it cannot be learned")
            return
        before = text[offsets[start][0] : region.start]
        after = text[region.end : offsets[end - 1][1]]
        if before.strip() or after.strip():
            raise BadRecord(
                f"a token straddles the border of {region.where}: it joins {region.said[:12]!r} with "
                f"{(before or after)!r} beside it; a space or a line break at that border would keep them apart"
            )
        expected = before + region.said + after
        found = self._tokenizer.decode_inside(ids, start, end)
        # Some tokenizers put a space before a text that follows a control token, as they do before the first word.
        added_space = " " if start > 0 and int(ids[start - 1]) in self._tokenizer.control.ids else ""
        if found in (expected, added_space + expected):
            return
        unknown = self._tokenizer.hf.unk_token_id
        if unknown is not None and unknown in ids[start:end]:
            raise BadRecord(f"{region.where} holds characters that the tokenizer does not know")
        # A tokenizer that normalises (NFC, for one) does not give back its input, but must give back its own output.
        alone = self._tokenizer.backend.encode(text[region.start : region.end], add_special_tokens=False).ids
        normalised = before + self._tokenizer.decode(alone) + after
        if found not in (normalised, added_space + normalised):
            raise BadRecord(
                f"the learned tokens of {region.where} say {found[:60]!r} where the data say {expected[:60]!r}; the "
                "tokenizer cannot represent this text"
            )


def _tokens_of(region: Region, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """Tokens ``[start, end)`` that hold a character of the region. Both columns of the offsets ascend."""
    start = bisect_right(offsets, region.start, key=lambda token: token[1])
    end = bisect_left(offsets, region.end, key=lambda token: token[0])
    return start, max(start, end)


def _fill_gaps(spans: list[tuple[int, int, float]], num_tokens: int) -> list[tuple[int, int, float]]:
    filled: list[tuple[int, int, float]] = []
    position = 0
    for start, end, weight in spans:
        filled.append((position, start, 1.0))
        filled.append((start, end, weight))
        position = end
    return [*filled, (position, num_tokens, 1.0)]


def _refuse_private_spelling(sample: Sample) -> None:
    if isinstance(sample, Text):
        found = has_private_spelling(sample.text)
    elif isinstance(sample, Completion):
        found = has_private_spelling(sample.prompt + sample.completion)
    else:
        structure = structure_of(sample)
        written = [structure.tools, *(turn.role + turn.extra for turn in structure.turns)]
        found = any(map(has_reserved_character, [*written, *(message.content for message in sample.messages)]))
    if found:
        raise BadRecord("the text holds Unicode noncharacters (U+FDD0 to U+FDD5) that dsft keeps for itself")
