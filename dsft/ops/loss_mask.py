"""``torch.ops.dsft.expand_loss_mask``: supervised spans of documents become a weight for each supervised row."""

from __future__ import annotations

import ctypes

import torch

from dsft.errors import KernelError
from dsft.ops import backend
from dsft.ops.native import load_cpu_library
from dsft.ops.reference import LOSS_REDUCTIONS, LossReduction, expand_loss_mask_reference, pack_error

_DTYPES = (torch.int32, torch.float32, torch.int64, torch.int64, torch.int64, torch.int64, torch.float64)

torch.library.define(
    "dsft::expand_loss_mask",
    "(Tensor spans, Tensor span_weights, Tensor span_offsets, Tensor piece_start, Tensor piece_targets, "
    "Tensor document_tokens, Tensor piece_weight, str reduction, SymInt? num_rows=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("dsft::expand_loss_mask", "CPU")
def _expand_cpu(
    spans: torch.Tensor,
    span_weights: torch.Tensor,
    span_offsets: torch.Tensor,
    piece_start: torch.Tensor,
    piece_targets: torch.Tensor,
    document_tokens: torch.Tensor,
    piece_weight: torch.Tensor,
    reduction: LossReduction,
    num_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = _checked(
        (spans, span_weights, span_offsets, piece_start, piece_targets, document_tokens, piece_weight), reduction
    )
    if backend.current() == "reference":
        return expand_loss_mask_reference(*inputs, reduction, num_rows)
    library = load_cpu_library()
    clipped, row_weights = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    found_rows, piece = ctypes.c_int64(), ctypes.c_int64()
    code = library.dsft_expand_loss_mask_spans(
        *_input_pointers(inputs, reduction),
        clipped.data_ptr(),
        row_weights.data_ptr(),
        ctypes.byref(found_rows),
        ctypes.byref(piece),
    )
    if code:
        raise pack_error("expand_loss_mask", code, piece.value)
    if num_rows is not None and num_rows != found_rows.value:
        raise pack_error("expand_loss_mask", 7, piece_start.numel())
    row_weight = torch.empty(found_rows.value, dtype=torch.float32)
    library.dsft_expand_loss_mask_rows(
        clipped.data_ptr(), row_weights.data_ptr(), row_weights.numel(), row_weight.data_ptr()
    )
    return clipped, row_weight


@torch.library.impl("dsft::expand_loss_mask", "CUDA")
def _expand_cuda(
    spans: torch.Tensor,
    span_weights: torch.Tensor,
    span_offsets: torch.Tensor,
    piece_start: torch.Tensor,
    piece_targets: torch.Tensor,
    document_tokens: torch.Tensor,
    piece_weight: torch.Tensor,
    reduction: LossReduction,
    num_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = _checked(
        (spans, span_weights, span_offsets, piece_start, piece_targets, document_tokens, piece_weight), reduction
    )
    library = backend.cuda_library()
    if library is None:
        return expand_loss_mask_reference(*inputs, reduction, num_rows)
    with torch.cuda.device(spans.device):
        stream = torch.cuda.current_stream().cuda_stream
        clipped, row_weight, status = launch_expand(library, inputs, reduction, num_rows, stream)
    torch._assert_async(status == 0, "expand_loss_mask: spans, weights or num_rows that cannot be (see its errors)")
    return clipped, row_weight


Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]  # the tensors of the schema, contiguous


def launch_expand(
    library: ctypes.CDLL, inputs: Inputs, reduction: LossReduction, num_rows: int | None, stream: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start the kernels of csrc/cuda on the current device and a stream of it; waits only where num_rows is None.

    Returns:
        The clipped spans, the rows' weights, and int64[1] on the device: 0, or ``16 * piece`` plus a number of
        ``PACK_ERRORS``.

    Raises:
        KernelError: a launch failed.
    """
    num_spans = inputs[0].shape[0]
    clipped, row_weights = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    # Zeros: where the input is refused, no kernel writes the number of rows.
    span_rows, status = (inputs[2].new_zeros(number) for number in (num_spans + 1, 1))
    code = library.dsft_cuda_expand_loss_mask_spans(
        *_input_pointers(inputs, reduction),
        clipped.data_ptr(),
        row_weights.data_ptr(),
        span_rows.data_ptr(),
        status.data_ptr(),
        stream,
    )
    number = num_rows
    if code == 0 and number is None:
        number = int(span_rows[-1])
    row_weight = inputs[1].new_empty(number or 0)
    code = code or library.dsft_cuda_expand_loss_mask_rows(
        row_weights.data_ptr(),
        span_rows.data_ptr(),
        num_spans,
        row_weight.numel(),
        row_weight.data_ptr(),
        status.data_ptr(),
        stream,
    )
    if code != 0:
        raise KernelError(
            f"expand_loss_mask: the kernels for {num_spans} spans could not be started: CUDA error {code}. See "
            "dsft ops info; kernels: reference runs without them."
        )
    return clipped, row_weight, status


def _input_pointers(inputs: Inputs, reduction: LossReduction) -> tuple[int, ...]:
    """What both C functions are called with first."""
    spans, span_weights, span_offsets, *of_pieces = inputs
    return (
        spans.data_ptr(),
        span_weights.data_ptr(),
        span_offsets.data_ptr(),
        spans.shape[0],
        span_offsets.numel() - 1,
        *(column.data_ptr() for column in of_pieces),
        LOSS_REDUCTIONS.index(reduction),
    )


def _checked(inputs: Inputs, reduction: str) -> Inputs:
    """The inputs, contiguous."""
    spans, span_weights, span_offsets, *of_pieces = inputs
    assert tuple(tensor.dtype for tensor in inputs) == _DTYPES, [tensor.dtype for tensor in inputs]
    assert all(tensor.device == spans.device for tensor in inputs), [tensor.device for tensor in inputs]
    assert spans.shape == (span_weights.numel(), 2)
    assert all(column.numel() == span_offsets.numel() - 1 for column in of_pieces)
    assert reduction in LOSS_REDUCTIONS, reduction
    return tuple(tensor.contiguous() for tensor in inputs)  # type: ignore[return-value]


def _expand_fake(
    spans: torch.Tensor,
    span_weights: torch.Tensor,
    span_offsets: torch.Tensor,
    piece_start: torch.Tensor,
    piece_targets: torch.Tensor,
    document_tokens: torch.Tensor,
    piece_weight: torch.Tensor,
    reduction: LossReduction,
    num_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    return torch.empty_like(spans, memory_format=torch.contiguous_format), span_weights.new_empty(rows)


torch.library.register_fake("dsft::expand_loss_mask", _expand_fake)


def expand_loss_mask(
    spans: torch.Tensor,
    span_weights: torch.Tensor,
    span_offsets: torch.Tensor,
    piece_start: torch.Tensor,
    piece_targets: torch.Tensor,
    document_tokens: torch.Tensor,
    piece_weight: torch.Tensor,
    reduction: LossReduction,
    num_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the supervised spans of whole documents to the pieces of a row, and weigh each supervised row.

    A row weighs ``span_weight * piece_weight / divisor`` (in fp64, rounded to fp32 once). The divisor is taken from the
    *whole* document, so it does not change when the document is split or packed otherwise:

    - token: 1;
    - document: number of supervised targets of the document;
    - message: number of supervised targets of the span;
    - source: ``token`` with 1 / (sum of the source's weights in the global batch) in ``piece_weight``, because no rank
      has that sum alone.

    Token 0 of a document is never a target; a span or piece of weight 0 has none.

    Args:
        spans: int32[K, 2], half-open intervals of the targets of whole documents, ascending and disjoint in each piece
            (two pieces of one document bring its spans twice).
        span_weights: float32[K], at least 0.
        span_offsets: int64[S + 1], borders of the pieces in ``spans``.
        piece_start: int64[S], where the piece begins in its document.
        piece_targets: int64[S], tokens of the piece, at least 1, and its lookahead token if its document goes on.
        document_tokens: int64[S], length of the whole document; targets beyond are cut off.
        piece_weight: float64[S], at least 0; factor of all the piece's rows.
        num_rows: number n of supervised rows. None: counted, for which a call on CUDA waits for the device.

    Returns:
        The spans as ``pack_sequences`` takes them (int32[K, 2], counted from the piece's start, empty where no row is
        supervised), and the weight of each supervised row (float32[n], above 0).

    Raises:
        KernelError: offsets or spans that cannot be, a weight that is negative or not finite, another num_rows; names
            the piece. On CUDA the device stops instead, without a name.
    """
    expanded: tuple[torch.Tensor, torch.Tensor] = torch.ops.dsft.expand_loss_mask(
        spans,
        span_weights,
        span_offsets,
        piece_start,
        piece_targets,
        document_tokens,
        piece_weight,
        reduction,
        num_rows,
    )
    return expanded
