"""``torch.ops.dsft.pack_sequences``: pieces of documents become one packed row, with its supervised rows."""

from __future__ import annotations

import ctypes

import torch

from dsft.ops import backend
from dsft.ops.native import load_cpu_library
from dsft.ops.reference import PackedRow, pack_error, pack_sequences_reference

_DTYPES = (torch.int32, torch.int64, torch.bool, torch.int32, torch.int64, torch.float32)


# Not torch.library.custom_op: its wrapper imports torch._dynamo at the first call, which takes seconds.
torch.library.define(
    "dsft::pack_sequences",
    "(Tensor tokens, Tensor piece_offsets, Tensor has_lookahead, Tensor spans, Tensor span_offsets, "
    "Tensor span_weights, SymInt row_tokens, SymInt pad_id) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("dsft::pack_sequences", "CPU")
def _pack_sequences(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    span_weights: torch.Tensor,
    row_tokens: int,
    pad_id: int,
) -> PackedRow:
    inputs = (tokens, piece_offsets, has_lookahead, spans, span_offsets, span_weights)
    assert tuple(tensor.dtype for tensor in inputs) == _DTYPES, [tensor.dtype for tensor in inputs]
    num_pieces = has_lookahead.numel()
    assert piece_offsets.numel() == span_offsets.numel() == num_pieces + 1
    assert spans.shape == (span_weights.numel(), 2)
    assert row_tokens < 2**31, "cu_seqlens are int32"
    if backend.current() == "reference":
        return pack_sequences_reference(*inputs, row_tokens, pad_id)
    return _pack_sequences_native(
        tokens.contiguous(),
        piece_offsets.contiguous(),
        has_lookahead.contiguous(),
        spans.contiguous(),
        span_offsets.contiguous(),
        span_weights.contiguous(),
        row_tokens,
        pad_id,
    )


def _pack_sequences_native(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    span_weights: torch.Tensor,
    row_tokens: int,
    pad_id: int,
) -> PackedRow:
    library = load_cpu_library()
    num_pieces = has_lookahead.numel()
    num_rows, piece = ctypes.c_int64(), ctypes.c_int64()
    code = library.dsft_pack_sequences_check(
        tokens.numel(),
        piece_offsets.data_ptr(),
        has_lookahead.data_ptr(),
        num_pieces,
        spans.data_ptr(),
        span_offsets.data_ptr(),
        spans.shape[0],
        row_tokens,
        ctypes.byref(num_rows),
        ctypes.byref(piece),
    )
    if code:
        raise pack_error(code, piece.value)
    outputs = _empty_outputs(tokens, num_pieces, row_tokens, num_rows.value)
    library.dsft_pack_sequences(
        tokens.data_ptr(),
        piece_offsets.data_ptr(),
        has_lookahead.data_ptr(),
        num_pieces,
        spans.data_ptr(),
        span_offsets.data_ptr(),
        span_weights.data_ptr(),
        row_tokens,
        pad_id,
        *(output.data_ptr() for output in outputs),
    )
    return outputs


def _pack_sequences_fake(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    span_weights: torch.Tensor,
    row_tokens: int,
    pad_id: int,
) -> PackedRow:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return _empty_outputs(tokens, has_lookahead.numel(), row_tokens, num_rows)


torch.library.register_fake("dsft::pack_sequences", _pack_sequences_fake)


def _empty_outputs(tokens: torch.Tensor, num_pieces: int, row_tokens: int, num_rows: int | torch.SymInt) -> PackedRow:
    return (
        tokens.new_empty(row_tokens, dtype=torch.int64),
        tokens.new_empty(row_tokens, dtype=torch.int64),
        tokens.new_empty(num_pieces + 2, dtype=torch.int32),
        tokens.new_empty(num_rows, dtype=torch.int64),
        tokens.new_empty(num_rows, dtype=torch.int64),
        tokens.new_empty(num_rows, dtype=torch.float32),
        tokens.new_empty(num_rows, dtype=torch.int64),
    )


def pack_sequences(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    span_weights: torch.Tensor,
    row_tokens: int,
    pad_id: int,
) -> PackedRow:
    """Lay pieces side by side in one row and list the rows that are supervised. CPU tensors.

    Args:
        tokens: int32[N], the pieces' tokens one after the other, each piece followed by one lookahead token if its
            document goes on.
        piece_offsets: int64[S + 1], borders of the pieces in ``tokens``, lookahead tokens included.
        has_lookahead: bool[S].
        spans: int32[K, 2], half-open intervals of supervised targets: token numbers inside the piece, from 1 (token 0
            is predicted by no row of this piece) to the lookahead token; ascending and disjoint in each piece.
        span_offsets: int64[S + 1], borders of the pieces in ``spans``.
        span_weights: float32[K].
        row_tokens: length L of the row.
        pad_id: token of the padding tail.

    Returns:
        input_ids int64[L]; position_ids int64[L], from 0 in each piece and in the tail; cu_seqlens int32[S + 2], where
        the last interval is the tail (empty if there is none); and per supervised row, ascending: rows int64[n] (its
        position), targets int64[n] (the token it predicts), row_weight float32[n], row_piece int64[n].

    Raises:
        KernelError: pieces that do not fit, offsets or spans that cannot be; names the piece.
    """
    packed: PackedRow = torch.ops.dsft.pack_sequences(
        tokens, piece_offsets, has_lookahead, spans, span_offsets, span_weights, row_tokens, pad_id
    )
    return packed
