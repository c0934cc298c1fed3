// How the CUDA kernels of packing say what is wrong with their input: one number on the device, which the kernels that
// follow look at, and the caller's assertion too.
#pragma once

#include "../core/pack.h"
#include "block.h"

namespace dsft {

constexpr int64_t kNoError = INT64_MAX;
constexpr int64_t kStatusOk = 0;
constexpr int64_t kErrorCodes = 16;

// The first error by piece, then by code.
DSFT_INLINE int64_t encoded(PackError error, int64_t piece) {
  return error == kPackOk ? kNoError : piece * kErrorCodes + error;
}

DSFT_INLINE int64_t first_of(int64_t error, int64_t other) { return error < other ? error : other; }

// The error of borders that do not ascend from 0 to `total`. One block; `scratch` as in block_min.
__device__ inline int64_t offsets_error(const int64_t* offsets, int64_t num_pieces, int64_t total, PackError error,
                                        int64_t* scratch) {
  int64_t found = kNoError;
  const Share share = share_of(threadIdx.x, blockDim.x, num_pieces);
  for (int64_t p = share.first; p < share.end; ++p)
    if (offsets[p + 1] < offsets[p]) found = first_of(found, encoded(error, p));
  if (threadIdx.x == 0 && (offsets[0] != 0 || offsets[num_pieces] != total)) found = encoded(error, 0);
  return block_min(found, scratch);
}

}  // namespace dsft
