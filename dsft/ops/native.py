"""Load dsft's native libraries with ctypes: plain C functions over raw pointers, no torch header."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsft.errors import KernelError
from dsft.ops.build import CUDA_ARCHITECTURES, build_cpu_library, build_cuda_library

_POINTER, _INT64, _INT32, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


_CROSS_ENTROPY_ROWS: list[Any] = [
    _INT32,
    _POINTER,
    *[_INT64] * 3,
    *[_POINTER] * 2,
    *[_DOUBLE] * 4,
    _INT32,
    *[_POINTER] * 5,
]
_EXPAND_LOSS_MASK: list[Any] = [*[_POINTER] * 3, *[_INT64] * 2, *[_POINTER] * 4, _INT32]


@lru_cache(maxsize=1)
def load_cpu_library() -> ctypes.CDLL:
    """``libdsft_cpu.so`` with its functions' types, built if need be.

    Raises:
        KernelError: it cannot be built or loaded.
        SaveError: the cache folder cannot be written.
    """
    library = _load(build_cpu_library())
    check = library.dsft_pack_sequences_check
    check.restype = ctypes.c_int32
    check.argtypes = [_INT64, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER]
    pack = library.dsft_pack_sequences
    pack.restype = None
    pack.argtypes = [*[_POINTER] * 3, _INT64, *[_POINTER] * 2, _INT64, _INT64, *[_POINTER] * 6]
    library.dsft_expand_loss_mask_spans.restype = _INT32
    library.dsft_expand_loss_mask_spans.argtypes = [*_EXPAND_LOSS_MASK, *[_POINTER] * 4]
    library.dsft_expand_loss_mask_rows.restype = None
    library.dsft_expand_loss_mask_rows.argtypes = [_POINTER, _POINTER, _INT64, _POINTER]
    rows = library.dsft_cross_entropy_rows
    rows.restype = _INT32
    rows.argtypes = [*_CROSS_ENTROPY_ROWS, _INT64, _POINTER]
    return library


@lru_cache(maxsize=1)
def load_cuda_library() -> ctypes.CDLL:
    """``libdsft_cuda.so`` with its functions' types, built if need be.

    Raises:
        KernelError: it cannot be built or loaded, or the current device is older than all that it is built for.
        SaveError: the cache folder cannot be written.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < int(CUDA_ARCHITECTURES[0]):
        raise KernelError(
            f"{torch.cuda.get_device_name()} is an sm_{major}{minor}; dsft's CUDA operations need "
            f"sm_{CUDA_ARCHITECTURES[0]} (Ampere) or newer. Set kernels: reference."
        )
    return with_cuda_types(_load(build_cuda_library()))


def with_cuda_types(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of the functions in csrc/cuda set."""
    rows = library.dsft_cuda_cross_entropy_rows
    rows.restype = _INT32
    rows.argtypes = [*_CROSS_ENTROPY_ROWS, _POINTER]
    pack = library.dsft_cuda_pack_sequences
    pack.restype = _INT32
    pack.argtypes = [_POINTER, _INT64, *[_POINTER] * 2, _INT64, *[_POINTER] * 2, *[_INT64] * 4, *[_POINTER] * 9]
    library.dsft_cuda_expand_loss_mask_spans.restype = _INT32
    library.dsft_cuda_expand_loss_mask_spans.argtypes = [*_EXPAND_LOSS_MASK, *[_POINTER] * 5]
    library.dsft_cuda_expand_loss_mask_rows.restype = _INT32
    library.dsft_cuda_expand_loss_mask_rows.argtypes = [*[_POINTER] * 2, *[_INT64] * 2, *[_POINTER] * 3]
    return library


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"{path} cannot be loaded ({error}). Remove its folder, so that it is built anew, or point DSFT_CACHE_DIR "
            "to a folder whose file system may hold executable code."
        ) from error
