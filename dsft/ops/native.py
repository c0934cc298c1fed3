"""Load dsft's native library with ctypes: plain C functions over raw pointers, no torch header."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from dsft.errors import KernelError
from dsft.ops.build import build_cpu_library

_POINTER, _INT64, _INT32, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


@lru_cache(maxsize=1)
def load_cpu_library() -> ctypes.CDLL:
    """``libdsft_cpu.so`` with its functions' types, built if need be.

    Raises:
        KernelError: it cannot be built or loaded.
        SaveError: the cache folder cannot be written.
    """
    path = build_cpu_library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"{path} cannot be loaded ({error}). Remove its folder, so that it is built anew, or point DSFT_CACHE_DIR "
            "to a folder whose file system may hold executable code."
        ) from error
    check = library.dsft_pack_sequences_check
    check.restype = ctypes.c_int32
    check.argtypes = [_INT64, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER]
    pack = library.dsft_pack_sequences
    pack.restype = None
    pack.argtypes = [*[_POINTER] * 3, _INT64, *[_POINTER] * 3, _INT64, _INT64, *[_POINTER] * 7]
    rows = library.dsft_cross_entropy_rows
    rows.restype = _INT32
    rows.argtypes = [_INT32, _POINTER, *[_INT64] * 3, *[_POINTER] * 2, *[_DOUBLE] * 4, _INT32, *[_POINTER] * 5]
    rows.argtypes += [_INT64, _POINTER]
    return library
