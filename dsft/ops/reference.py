"""Reference implementations of dsft's operations: the specification, the oracle of their tests, and the fallback."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch

from dsft.errors import KernelError

PACK_ERRORS = {
    1: "piece_offsets do not ascend from 0 to the number of tokens",
    2: "a piece has no token of its own",
    3: "the pieces do not fit into row_tokens",
    4: "span_offsets do not ascend from 0 to the number of spans",
    5: "a span lies outside its piece's targets [1, length + lookahead), is reversed, or overlaps the one before",
    6: "a weight is negative or not finite",
    7: "the supervised rows are not num_rows",
}
"""Why packing refuses an input; the numbers are those of ``PackError`` in csrc/core/pack.h."""

LossReduction = Literal["token", "document", "message"]
LOSS_REDUCTIONS: tuple[LossReduction, ...] = ("token", "document", "message")
"""Their places are the numbers of ``LossReduction`` in csrc/core/loss_mask.h."""

PackedRow = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What ``pack_sequences`` returns: input_ids, position_ids, cu_seqlens, rows, targets, row_piece."""


def pack_error(operation: str, code: int, piece: int) -> KernelError:
    """The error of an input that packing refuses."""
    return KernelError(f"{operation}: piece {piece}: {PACK_ERRORS[code]}. The batch was not built as it must be.")


def pack_sequences_reference(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
    pad_id: int,
    num_rows: int | None,
) -> PackedRow:
    """Lay pieces side by side in one row. Arguments, results and errors: ``dsft.ops.pack.pack_sequences``."""
    offsets, span_borders = piece_offsets.tolist(), span_offsets.tolist()
    _check_offsets("pack_sequences", offsets, tokens.numel(), 1)
    _check_offsets("pack_sequences", span_borders, spans.shape[0], 4)
    device = tokens.device
    input_ids = torch.full((row_tokens,), pad_id, dtype=torch.int64, device=device)
    position_ids = torch.empty(row_tokens, dtype=torch.int64, device=device)
    borders = [0]
    none = torch.empty(0, dtype=torch.int64, device=device)
    rows, targets, owners = [none], [none], [none]
    for piece, (first, end) in enumerate(pairwise(offsets)):
        length = end - first - int(has_lookahead[piece])
        row_start = borders[-1]
        if length < 1:
            raise pack_error("pack_sequences", 2, piece)
        if row_start + length > row_tokens:
            raise pack_error("pack_sequences", 3, piece)
        input_ids[row_start : row_start + length] = tokens[first : first + length]
        position_ids[row_start : row_start + length] = torch.arange(length, device=device)
        previous = 1
        for span in range(span_borders[piece], span_borders[piece + 1]):
            begin, stop = spans[span].tolist()
            if not previous <= begin <= stop <= end - first:
                raise pack_error("pack_sequences", 5, piece)
            # Row t - 1 predicts token t.
            rows.append(torch.arange(row_start + begin - 1, row_start + stop - 1, device=device))
            targets.append(tokens[first + begin : first + stop].to(torch.int64))
            owners.append(torch.full((stop - begin,), piece, device=device))
            previous = stop
        borders.append(row_start + length)
    position_ids[borders[-1] :] = torch.arange(row_tokens - borders[-1], device=device)
    cu_seqlens = torch.tensor([*borders, row_tokens], dtype=torch.int32, device=device)
    packed = (input_ids, position_ids, cu_seqlens, torch.cat(rows), torch.cat(targets), torch.cat(owners))
    if num_rows is not None and num_rows != len(packed[3]):
        raise pack_error("pack_sequences", 7, len(borders) - 1)
    return packed


def expand_loss_mask_reference(
    spans: torch.Tensor,
    span_weights: torch.Tensor,
    span_offsets: torch.Tensor,
    piece_start: torch.Tensor,
    piece_targets: torch.Tensor,
    document_tokens: torch.Tensor,
    piece_weight: torch.Tensor,
    reduction: LossReduction,
    num_rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans of pieces and weights of rows. Arguments, results and errors: ``dsft.ops.loss_mask.expand_loss_mask``."""
    borders = span_offsets.tolist()
    _check_offsets("expand_loss_mask", borders, spans.shape[0], 4)
    clipped, weights = torch.empty_like(spans), []
    windows = zip(piece_start.tolist(), piece_targets.tolist(), document_tokens.tolist(), strict=True)
    for piece, (start, targets, tokens) in enumerate(windows):
        factor, own = float(piece_weight[piece]), slice(borders[piece], borders[piece + 1])
        of_spans = span_weights[own].tolist()
        if not all(0 <= weight < math.inf for weight in (factor, *of_spans)):
            raise pack_error("expand_loss_mask", 6, piece)
        edges = [0, *spans[own].flatten().tolist()]
        if any(left > right for left, right in pairwise(edges)):
            raise pack_error("expand_loss_mask", 5, piece)
        # Of the whole document, without token 0, which nothing predicts, and what is cut off behind it.
        counts = [max(0, min(end, tokens) - max(begin, 1)) for begin, end in spans[own].tolist()]
        counts = [count if weight > 0 else 0 for count, weight in zip(counts, of_spans, strict=True)]
        last = max(1, min(targets, tokens - start))
        for span, (count, weight) in enumerate(zip(counts, of_spans, strict=True), start=borders[piece]):
            divisor = {"token": 1, "document": sum(counts), "message": count}[reduction]
            of_row = torch.tensor(weight * factor / divisor if count else 0.0, dtype=torch.float32)
            begin, end = (min(max(int(edge) - start, 1), last) for edge in spans[span])
            clipped[span, 0], clipped[span, 1] = begin, end if of_row > 0 else begin
            weights.append(of_row.expand(int(clipped[span, 1]) - begin))
    row_weight = torch.cat([torch.empty(0), *weights]).to(spans.device)
    if num_rows is not None and num_rows != len(row_weight):
        raise pack_error("expand_loss_mask", 7, len(borders) - 1)
    return clipped, row_weight


def _check_offsets(operation: str, offsets: list[int], total: int, code: int) -> None:
    if offsets[0] != 0 or offsets[-1] != total:
        raise pack_error(operation, code, 0)
    for piece, (first, end) in enumerate(pairwise(offsets)):
        if end < first:
            raise pack_error(operation, code, piece)


IGNORED_TARGET = -100
"""Target of a row that has no loss."""

CrossEntropyRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What ``masked_cross_entropy_rows_`` returns: loss, nll, log_normaliser, entropy, correct."""


def target_error(row: int, target: int, vocab: int) -> KernelError:
    """The error of a target that is no column of the logits."""
    return KernelError(
        f"masked_cross_entropy_rows_: row {row} has target {target}, but the logits have {vocab} columns. The tokens "
        "were made with a larger vocabulary than the model's: use the model's own tokenizer."
    )


def masked_cross_entropy_rows_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
) -> CrossEntropyRows:
    """Loss of each row and its gradient in place. Arguments, results and errors: ``masked_cross_entropy_rows_``."""
    vocab = logits.shape[1]
    masked = targets == IGNORED_TARGET
    if logits.device.type == "cpu":
        for row in torch.nonzero(~masked & ((targets < 0) | (targets >= vocab)))[:1, 0].tolist():
            raise target_error(row, int(targets[row]), vocab)
    column = targets.masked_fill(masked, 0).unsqueeze(1)
    values = logits if logits.dtype == row_weight.dtype else logits.to(row_weight.dtype)
    if scale != 1.0:
        values.mul_(scale)
    slope = None
    if soft_cap is not None:
        values.div_(soft_cap)
        slope = 1.0 - torch.tanh(values) ** 2 if with_gradient else None
        values.tanh_().mul_(soft_cap)
    log_normaliser = torch.logsumexp(values, dim=1)
    log_normaliser.masked_fill_(log_normaliser == torch.inf, torch.nan)  # as log_softmax has it
    target_logit = values.gather(1, column).squeeze(1)
    nll = log_normaliser - target_logit
    loss = nll + z_loss * log_normaliser**2
    if label_smoothing > 0:
        loss += label_smoothing * (target_logit - values.mean(1))
    first_largest = torch.where(values == values.amax(1, keepdim=True), 1.0, 0.0).argmax(1)
    correct = (first_largest == targets) & ~nll.isnan()
    values.sub_(log_normaliser.unsqueeze(1)).exp_()  # probabilities
    entropy = torch.special.entr(values).sum(1)
    if with_gradient:
        values.mul_((1.0 + 2.0 * z_loss * log_normaliser).unsqueeze(1)).sub_(label_smoothing / vocab)
        values.scatter_add_(1, column, torch.full_like(column, label_smoothing - 1.0, dtype=values.dtype))
        values.mul_((row_weight * scale).unsqueeze(1))
        if slope is not None:
            values.mul_(slope)
        values.masked_fill_((masked | (row_weight == 0)).unsqueeze(1), 0.0)
        if values is not logits:
            logits.copy_(values)
    results = (result.masked_fill_(masked, 0) for result in (loss, nll, log_normaliser, entropy, correct))
    return tuple(results)  # type: ignore[return-value]
