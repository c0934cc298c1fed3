"""``torch.ops.dsft.pack_sequences``: pieces of documents become one packed row, with its supervised rows."""

from __future__ import annotations

import ctypes

import torch

from dsft.errors import KernelError
from dsft.ops import backend
from dsft.ops.native import load_cpu_library
from dsft.ops.reference import PackedRow, pack_error, pack_sequences_reference

_DTYPES = (torch.int32, torch.int64, torch.bool, torch.int32, torch.int64)


# Not torch.library.custom_op: its wrapper imports torch._dynamo at the first call, which takes seconds.
torch.library.define(
    "dsft::pack_sequences",
    "(Tensor tokens, Tensor piece_offsets, Tensor has_lookahead, Tensor spans, Tensor span_offsets, "
    "SymInt row_tokens, SymInt pad_id, SymInt? num_rows=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("dsft::pack_sequences", "CPU")
def _pack_cpu(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
    pad_id: int,
    num_rows: int | None = None,
) -> PackedRow:
    inputs = _checked(tokens, piece_offsets, has_lookahead, spans, span_offsets, row_tokens)
    if backend.current() == "reference":
        return pack_sequences_reference(*inputs, row_tokens, pad_id, num_rows)
    return _pack_sequences_native(*inputs, row_tokens, pad_id, num_rows)


def _pack_sequences_native(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
    pad_id: int,
    num_rows: int | None,
) -> PackedRow:
    library = load_cpu_library()
    num_pieces = has_lookahead.numel()
    found_rows, piece = ctypes.c_int64(), ctypes.c_int64()
    code = library.dsft_pack_sequences_check(
        tokens.numel(),
        piece_offsets.data_ptr(),
        has_lookahead.data_ptr(),
        num_pieces,
        spans.data_ptr(),
        span_offsets.data_ptr(),
        spans.shape[0],
        row_tokens,
        ctypes.byref(found_rows),
        ctypes.byref(piece),
    )
    if code:
        raise pack_error("pack_sequences", code, piece.value)
    if num_rows is not None and num_rows != found_rows.value:
        raise pack_error("pack_sequences", 7, num_pieces)
    outputs = _empty_outputs(tokens, num_pieces, row_tokens, found_rows.value)
    library.dsft_pack_sequences(
        tokens.data_ptr(),
        piece_offsets.data_ptr(),
        has_lookahead.data_ptr(),
        num_pieces,
        spans.data_ptr(),
        span_offsets.data_ptr(),
        row_tokens,
        pad_id,
        *(output.data_ptr() for output in outputs),
    )
    return outputs


@torch.library.impl("dsft::pack_sequences", "CUDA")
def _pack_cuda(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
    pad_id: int,
    num_rows: int | None = None,
) -> PackedRow:
    inputs = _checked(tokens, piece_offsets, has_lookahead, spans, span_offsets, row_tokens)
    library = backend.cuda_library()
    if library is None:
        return pack_sequences_reference(*inputs, row_tokens, pad_id, num_rows)
    if num_rows is None:
        num_rows = int((inputs[3][:, 1] - inputs[3][:, 0]).sum())
    with torch.cuda.device(tokens.device):
        stream = torch.cuda.current_stream().cuda_stream
        packed, status = launch_pack(library, *inputs, row_tokens, pad_id, num_rows, stream)
    torch._assert_async(status == 0, "pack_sequences: pieces, spans or num_rows that cannot be (see its errors)")
    return packed


def launch_pack(
    library: ctypes.CDLL,
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
    pad_id: int,
    num_rows: int,
    stream: int | None,
) -> tuple[PackedRow, torch.Tensor]:
    """Start the kernels of csrc/cuda on the current device and a stream of it, and wait for nothing.

    Returns:
        The row, and int64[1] on the device: 0, or ``16 * piece`` plus a number of ``PACK_ERRORS``.

    Raises:
        KernelError: a launch failed.
    """
    num_pieces, num_spans = has_lookahead.numel(), spans.shape[0]
    outputs = _empty_outputs(tokens, num_pieces, row_tokens, num_rows)
    span_rows, status = (tokens.new_empty(number, dtype=torch.int64) for number in (num_spans + 1, 1))
    code = library.dsft_cuda_pack_sequences(
        tokens.data_ptr(),
        tokens.numel(),
        piece_offsets.data_ptr(),
        has_lookahead.data_ptr(),
        num_pieces,
        spans.data_ptr(),
        span_offsets.data_ptr(),
        num_spans,
        row_tokens,
        pad_id,
        num_rows,
        *(output.data_ptr() for output in outputs),
        span_rows.data_ptr(),
        status.data_ptr(),
        stream,
    )
    if code != 0:
        raise KernelError(
            f"pack_sequences: the kernels for {num_pieces} pieces in a row of {row_tokens} tokens could not be "
            f"started: CUDA error {code}. See dsft ops info; kernels: reference runs without them."
        )
    return outputs, status


def _checked(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs, contiguous."""
    inputs = (tokens, piece_offsets, has_lookahead, spans, span_offsets)
    assert tuple(tensor.dtype for tensor in inputs) == _DTYPES, [tensor.dtype for tensor in inputs]
    assert all(tensor.device == tokens.device for tensor in inputs), [tensor.device for tensor in inputs]
    assert piece_offsets.numel() == span_offsets.numel() == has_lookahead.numel() + 1
    assert spans.dim() == 2
    assert spans.shape[1] == 2
    assert row_tokens < 2**31, "cu_seqlens are int32"
    return (
        tokens.contiguous(),
        piece_offsets.contiguous(),
        has_lookahead.contiguous(),
        spans.contiguous(),
        span_offsets.contiguous(),
    )


def _pack_sequences_fake(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
    pad_id: int,
    num_rows: int | None = None,
) -> PackedRow:
    rows = torch.library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    return _empty_outputs(tokens, has_lookahead.numel(), row_tokens, rows)


torch.library.register_fake("dsft::pack_sequences", _pack_sequences_fake)


def _empty_outputs(tokens: torch.Tensor, num_pieces: int, row_tokens: int, num_rows: int | torch.SymInt) -> PackedRow:
    return (
        tokens.new_empty(row_tokens, dtype=torch.int64),
        tokens.new_empty(row_tokens, dtype=torch.int64),
        tokens.new_empty(num_pieces + 2, dtype=torch.int32),
        tokens.new_empty(num_rows, dtype=torch.int64),
        tokens.new_empty(num_rows, dtype=torch.int64),
        tokens.new_empty(num_rows, dtype=torch.int64),
    )


def pack_sequences(
    tokens: torch.Tensor,
    piece_offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    spans: torch.Tensor,
    span_offsets: torch.Tensor,
    row_tokens: int,
    pad_id: int,
    num_rows: int | None = None,
) -> PackedRow:
    """Lay pieces side by side in one row and list the rows that are supervised. Tensors of one device.

    Args:
        tokens: int32[N], the pieces' tokens one after the other, each piece followed by one lookahead token if its
            document goes on.
        piece_offsets: int64[S + 1], borders of the pieces in ``tokens``, lookahead tokens included.
        has_lookahead: bool[S].
        spans: int32[K, 2], half-open intervals of supervised targets, perhaps empty: token numbers inside the piece,
            from 1 (token 0 is predicted by no row of this piece) to the lookahead token; ascending and disjoint.
        span_offsets: int64[S + 1], borders of the pieces in ``spans``.
        row_tokens: length L of the row.
        pad_id: token of the padding tail.
        num_rows: number n of supervised rows. None: counted, for which a call on CUDA waits for the device.

    Returns:
        input_ids int64[L]; position_ids int64[L], from 0 in each piece and in the tail; cu_seqlens int32[S + 2], where
        the last interval is the tail (empty if there is none); and per supervised row, ascending: rows int64[n] (its
        position), targets int64[n] (the token it predicts), row_piece int64[n]. Segment ids of the other positions are
        not made, since attention works with cu_seqlens.

    Raises:
        KernelError: pieces that do not fit, offsets or spans that cannot be, another num_rows; names the piece. On CUDA
            the device stops instead, without a name.
    """
    packed: PackedRow = torch.ops.dsft.pack_sequences(
        tokens, piece_offsets, has_lookahead, spans, span_offsets, row_tokens, pad_id, num_rows
    )
    return packed
