"""``torch.ops.dsft.masked_cross_entropy_rows_``: loss of rows of logits, their gradient written over them."""

from __future__ import annotations

import ctypes

import torch

from dsft.errors import KernelError
from dsft.ops import backend
from dsft.ops.native import load_cpu_library
from dsft.ops.reference import (
    IGNORED_TARGET,
    CrossEntropyRows,
    masked_cross_entropy_rows_reference,
    target_error,
)

_DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
"""``LogitsDtype`` in csrc/core/cross_entropy.h."""

torch.library.define(
    "dsft::masked_cross_entropy_rows_",
    "(Tensor(a!) logits, Tensor targets, Tensor row_weight, float scale, float? soft_cap, float label_smoothing, "
    "float z_loss, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("dsft::masked_cross_entropy_rows_", "CPU")
def _rows_cpu(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
) -> CrossEntropyRows:
    _check(logits, targets, row_weight, scale, soft_cap)
    if backend.current() == "reference":
        return masked_cross_entropy_rows_reference(
            logits, targets, row_weight, scale, soft_cap, label_smoothing, z_loss, with_gradient
        )
    targets, row_weight = targets.contiguous(), row_weight.contiguous()
    results = _empty_results(logits)
    row = ctypes.c_int64()
    code = load_cpu_library().dsft_cross_entropy_rows(
        _DTYPE_NUMBERS[logits.dtype],
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        targets.data_ptr(),
        row_weight.data_ptr(),
        scale,
        soft_cap or 0.0,
        label_smoothing,
        z_loss,
        with_gradient,
        *(result.data_ptr() for result in results),
        torch.get_num_threads(),
        ctypes.byref(row),
    )
    if code == 1:
        raise target_error(row.value, int(targets[row.value]), logits.shape[1])
    assert code == 0, code
    return results


@torch.library.impl("dsft::masked_cross_entropy_rows_", "CUDA")
def _rows_cuda(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
) -> CrossEntropyRows:
    _check(logits, targets, row_weight, scale, soft_cap)
    options = (scale, soft_cap, label_smoothing, z_loss, with_gradient)
    # Checked on the device, as torch's own loss does: the host would have to wait for the answer.
    known = (targets == IGNORED_TARGET) | ((targets >= 0) & (targets < logits.shape[1]))
    torch._assert_async(known.all(), "masked_cross_entropy_rows_: a target is no column of the logits")
    library = backend.cuda_library()
    if library is None:
        return masked_cross_entropy_rows_reference(logits, targets, row_weight, *options)
    with torch.cuda.device(logits.device):
        stream = torch.cuda.current_stream().cuda_stream
        return launch_rows(library, logits, targets, row_weight, *options, stream)


def launch_rows(
    library: ctypes.CDLL,
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
    stream: int | None,
) -> CrossEntropyRows:
    """Start the kernel of csrc/cuda on the current device and a stream of it, and wait for nothing.

    Raises:
        KernelError: the launch failed.
    """
    targets, row_weight = targets.contiguous(), row_weight.contiguous()
    results = _empty_results(logits)
    code = library.dsft_cuda_cross_entropy_rows(
        _DTYPE_NUMBERS[logits.dtype],
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        targets.data_ptr(),
        row_weight.data_ptr(),
        scale,
        soft_cap or 0.0,
        label_smoothing,
        z_loss,
        with_gradient,
        *(result.data_ptr() for result in results),
        stream,
    )
    if code != 0:
        raise KernelError(
            f"masked_cross_entropy_rows_: the kernel for logits {logits.dtype} {tuple(logits.shape)} could not be "
            f"started: CUDA error {code}. See dsft ops info; kernels: reference runs without it."
        )
    return results


def _check(
    logits: torch.Tensor, targets: torch.Tensor, row_weight: torch.Tensor, scale: float, soft_cap: float | None
) -> None:
    number = logits.shape[:1]
    problem = None
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.dtype not in _DTYPE_NUMBERS:
        problem = "logits must be float32, float64 or bfloat16 [rows, vocabulary]"
    elif logits.stride(1) != 1 and logits.shape[1] > 1:
        problem = "a row of logits must be contiguous"
    elif targets.dtype != torch.int64 or targets.shape != number:
        problem = "targets must be int64, one a row"
    elif row_weight.dtype != result_dtype(logits) or row_weight.shape != number:
        problem = f"row_weight must be {result_dtype(logits)}, one a row"
    elif scale <= 0 or (soft_cap is not None and soft_cap <= 0):
        problem = f"scale {scale} and soft_cap {soft_cap} must be positive"
    if problem is not None:
        raise KernelError(
            f"masked_cross_entropy_rows_: {problem}; got logits {logits.dtype} {tuple(logits.shape)}, targets "
            f"{targets.dtype} {tuple(targets.shape)}, row_weight {row_weight.dtype} {tuple(row_weight.shape)}."
        )


def _rows_fake(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
    with_gradient: bool,
) -> CrossEntropyRows:
    return _empty_results(logits)


torch.library.register_fake("dsft::masked_cross_entropy_rows_", _rows_fake)


def result_dtype(logits: torch.Tensor) -> torch.dtype:
    """What sums over logits, or products with such weights, are kept in: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _empty_results(logits: torch.Tensor) -> CrossEntropyRows:
    rows, dtype = logits.shape[0], result_dtype(logits)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=torch.bool),
    )


def masked_cross_entropy_rows_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    with_gradient: bool = True,
) -> CrossEntropyRows:
    """Cross-entropy of each row of logits, and its gradient written over them.

    The softmax sees ``z = soft_cap * tanh(scale * logits / soft_cap)``, without the tanh when ``soft_cap`` is None.

    Args:
        logits: float32, bfloat16 or float64 [c, V], raw; rows contiguous. Overwritten with the gradient of
            ``sum(row_weight * loss)`` by the raw logits if ``with_gradient``; else its contents are undefined.
        targets: int64[c]; IGNORED_TARGET (-100): the row has no loss, its logits are not looked at, its gradient is 0.
        row_weight: float32[c] (float64[c] for float64 logits); 0: the gradient is 0 whatever the logits are.
        label_smoothing: share of the target distribution that is spread evenly over the vocabulary.
        z_loss: factor of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5).

    Returns:
        Per row, in row_weight's dtype and unweighted: loss, with smoothing and z-loss; nll = -log softmax(z)[target];
        log_normaliser = log sum exp z; entropy of softmax(z) in nats; and bool correct: the target is the first of the
        largest logits. NaN where log_softmax is.

    Raises:
        KernelError: shapes or dtypes that do not fit; on the CPU, a target that is no column (names the row).
    """
    rows: CrossEntropyRows = torch.ops.dsft.masked_cross_entropy_rows_(
        logits, targets, row_weight, scale, soft_cap, label_smoothing, z_loss, with_gradient
    )
    return rows
