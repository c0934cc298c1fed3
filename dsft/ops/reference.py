"""Reference implementations of dsft's operations: the specification, the oracle of their tests, and the fallback."""

from __future__ import annotations

from itertools import pairwise

import torch

from dsft.errors import KernelError

PACK_ERRORS = {
    1: "piece_offsets do not ascend from 0 to the number of tokens",
    2: "a piece has no token of its own",
    3: "the pieces do not fit into row_tokens",
    4: "span_offsets do not ascend from 0 to the number of spans",
    5: "a span lies outside its piece's targets [1, length + lookahead), is empty, or overlaps the one before",
}
"""Why ``pack_sequences`` refuses an input; the numbers are those of ``PackError`` in csrc/core/pack.h."""

PackedRow = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What ``pack_sequences`` returns: input_ids, position_ids, cu_seqlens, rows, targets, row_weight, row_piece."""


def pack_error(code: int, piece: int) -> KernelError:
    """The error of an input that ``pack_sequences`` refuses."""
    return KernelError(f"pack_sequences: piece {piece}: {PACK_ERRORS[code]}. The batch was not built as it must be.")


def pack_sequences_reference(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    span_weights: torch.Tensor,
    row_tokens: int,
    pad_id: int,
) -> PackedRow:
    """Lay pieces side by side in one row. Arguments, results and errors: ``dsft.ops.pack.pack_sequences``."""
    offsets, span_borders = piece_offsets.tolist(), span_offsets.tolist()
    _check_offsets(offsets, tokens.numel(), 1)
    _check_offsets(span_borders, spans.shape[0], 4)
    input_ids = torch.full((row_tokens,), pad_id, dtype=torch.int64)
    position_ids = torch.empty(row_tokens, dtype=torch.int64)
    borders = [0]
    rows, targets, weights, owners = [], [], [], []
    for piece, (first, end) in enumerate(pairwise(offsets)):
        length = end - first - int(has_lookahead[piece])
        row_start = borders[-1]
        if length < 1:
            raise pack_error(2, piece)
        if row_start + length > row_tokens:
            raise pack_error(3, piece)
        input_ids[row_start : row_start + length] = tokens[first : first + length]
        position_ids[row_start : row_start + length] = torch.arange(length)
        previous = 1
        for span in range(span_borders[piece], span_borders[piece + 1]):
            begin, stop = spans[span].tolist()
            if not previous <= begin < stop <= end - first:
                raise pack_error(5, piece)
            rows.append(torch.arange(row_start + begin - 1, row_start + stop - 1))  # row t - 1 predicts token t
            targets.append(tokens[first + begin : first + stop].to(torch.int64))
            weights.append(span_weights[span].expand(stop - begin))
            owners.append(torch.full((stop - begin,), piece))
            previous = stop
        borders.append(row_start + length)
    position_ids[borders[-1] :] = torch.arange(row_tokens - borders[-1])
    return (
        input_ids,
        position_ids,
        torch.tensor([*borders, row_tokens], dtype=torch.int32),
        torch.cat([torch.empty(0, dtype=torch.int64), *rows]),
        torch.cat([torch.empty(0, dtype=torch.int64), *targets]),
        torch.cat([torch.empty(0, dtype=torch.float32), *weights]),
        torch.cat([torch.empty(0, dtype=torch.int64), *owners]),
    )


def _check_offsets(offsets: list[int], total: int, code: int) -> None:
    if offsets[0] != 0 or offsets[-1] != total:
        raise pack_error(code, 0)
    for piece, (first, end) in enumerate(pairwise(offsets)):
        if end < first:
            raise pack_error(code, piece)


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
