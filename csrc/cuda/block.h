// What the threads of one block do together over an array that one block can handle.
#pragma once

#include "device.h"

namespace dsft {

constexpr int kBlockThreads = 256;

// Elements [first, end) of `count` that belong to this thread: neighbours, thread after thread.
struct Share {
  int64_t first, end;
};

DSFT_INLINE Share share_of(int64_t thread, int64_t threads, int64_t count) {
  const int64_t size = (count + threads - 1) / threads;
  const int64_t first = thread * size < count ? thread * size : count;
  return {first, first + size < count ? first + size : count};
}

// The smallest of the threads' values. `scratch` has kBlockThreads elements.
__device__ inline int64_t block_min(int64_t value, int64_t* scratch) {
  __syncthreads();  // nobody reads what was in the scratch before
  scratch[threadIdx.x] = value;
  __syncthreads();
  int64_t smallest = scratch[0];
  for (unsigned t = 1; t < blockDim.x; ++t) smallest = scratch[t] < smallest ? scratch[t] : smallest;
  return smallest;
}

// Calls put(i, sum of the values before i) for each of `count` elements; returns the sum of all.
template <typename Value, typename Put>
__device__ int64_t block_scan(int64_t count, Value value, Put put, int64_t* scratch) {
  const Share share = share_of(threadIdx.x, blockDim.x, count);
  int64_t own = 0;
  for (int64_t i = share.first; i < share.end; ++i) own += value(i);
  __syncthreads();  // nobody reads what was in the scratch before
  scratch[threadIdx.x] = own;
  __syncthreads();
  int64_t before = 0, total = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) {
    if (t < threadIdx.x) before += scratch[t];
    total += scratch[t];
  }
  for (int64_t i = share.first; i < share.end; ++i) {
    put(i, before);
    before += value(i);
  }
  return total;
}

}  // namespace dsft
