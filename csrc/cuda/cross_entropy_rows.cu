// masked_cross_entropy_rows_ on CUDA: a thread block reads a row once for its loss and once more, from the second-level
// cache if it fits there, to overwrite it with its gradient. Sums have one order: no atomics.
#include "../core/cross_entropy.h"
#include "device.h"

namespace {

using namespace dsft;

constexpr int kThreads = 512;
constexpr int64_t kMaxBlocks = 1 << 20;  // rows beyond are taken in turn

template <typename A, typename S>
struct Rows {
  S* logits;
  int64_t num_rows, vocab, row_stride;
  const int64_t* targets;
  const A* row_weight;
  LossOptions<A> options;
  bool with_gradient;
  A *loss, *nll, *log_normaliser, *entropy;
  uint8_t* correct;
};

template <typename S>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(S);
  S values[kSize];
};

// A row as packs of 16 bytes, with single elements before the first aligned address and after the last whole pack.
struct Layout {
  int64_t head, packs;
};

template <typename S>
DSFT_INLINE Layout layout_of(const S* row, int64_t vocab) {
  const int64_t unaligned = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(S);
  const int64_t head = unaligned < vocab ? unaligned : vocab;
  return {head, (vocab - head) / Pack<S>::kSize};
}

// State of kCount logits from column `first`. The target counts in the total only.
template <int kCount, typename A, typename S>
DSFT_INLINE SoftmaxState<A> state_of(const S* raw, int64_t first, int64_t target, const LossOptions<A>& options) {
  SoftmaxState<A> state = empty_state<A>();
  A z[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    z[i] = transformed(static_cast<A>(load(raw + i)), options);
    state.total += z[i];
    if (first + i == target) z[i] = A(-INFINITY);
    if (z[i] > state.max) {
      state.max = z[i];
      state.argmax = first + i;
    }
  }
  const A reference = finite_reference(state.max);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A difference = z[i] - reference, exponential = exp_nonpositive(difference);
    state.sum += exponential;
    state.weighted += entropy_term(exponential, difference);
  }
  return state;
}

template <typename A, typename S>
__device__ SoftmaxState<A> thread_state(const S* row, int64_t vocab, int64_t target, const LossOptions<A>& options) {
  constexpr int kSize = Pack<S>::kSize;
  const Layout layout = layout_of(row, vocab);
  SoftmaxState<A> state = empty_state<A>();
  if (threadIdx.x < layout.head) state = state_of<1>(row + threadIdx.x, threadIdx.x, target, options);
  for (int64_t p = threadIdx.x; p < layout.packs; p += blockDim.x) {
    const int64_t first = layout.head + p * kSize;
    const Pack<S> pack = *reinterpret_cast<const Pack<S>*>(row + first);
    state = merged(state, state_of<kSize>(pack.values, first, target, options));
  }
  const int64_t last = layout.head + layout.packs * kSize + threadIdx.x;
  if (last < vocab) state = merged(state, state_of<1>(row + last, last, target, options));
  return state;
}

template <typename A>
__device__ SoftmaxState<A> warp_state(SoftmaxState<A> state) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    SoftmaxState<A> other;
    other.max = __shfl_xor_sync(kWholeWarp, state.max, lanes);
    other.sum = __shfl_xor_sync(kWholeWarp, state.sum, lanes);
    other.weighted = __shfl_xor_sync(kWholeWarp, state.weighted, lanes);
    other.total = __shfl_xor_sync(kWholeWarp, state.total, lanes);
    other.argmax = __shfl_xor_sync(kWholeWarp, static_cast<long long>(state.argmax), lanes);
    state = merged(state, other);
  }
  return state;
}

template <typename A, typename S>
__device__ void write_gradient(S* row, int64_t target, A row_weight, const RowResult<A>& result,
                               const Rows<A, S>& rows) {
  constexpr int kSize = Pack<S>::kSize;
  const Layout layout = layout_of(row, rows.vocab);
  const GradientFactors<A> factors = gradient_factors(result, row_weight, rows.vocab, rows.options);
  const auto gradient = [&](S* at, int64_t column) {
    const A raw = static_cast<A>(load(at));
    store(at, column == target ? gradient_of_target(raw, result.target_factor, row_weight, rows.options)
                               : gradient_of(raw, result.max, factors, rows.options));
  };
  if (threadIdx.x < layout.head) gradient(row + threadIdx.x, threadIdx.x);
  for (int64_t p = threadIdx.x; p < layout.packs; p += blockDim.x) {
    const int64_t first = layout.head + p * kSize;
    Pack<S> pack = *reinterpret_cast<const Pack<S>*>(row + first);
#pragma unroll
    for (int i = 0; i < kSize; ++i) gradient(pack.values + i, first + i);
    *reinterpret_cast<Pack<S>*>(row + first) = pack;
  }
  const int64_t last = layout.head + layout.packs * kSize + threadIdx.x;
  if (last < rows.vocab) gradient(row + last, last);
}

template <typename A, typename S>
__device__ void write_results(const Rows<A, S>& rows, int64_t r, const RowResult<A>& result) {
  rows.loss[r] = result.loss;
  rows.nll[r] = result.nll;
  rows.log_normaliser[r] = result.log_normaliser;
  rows.entropy[r] = result.entropy;
  rows.correct[r] = result.correct;
}

template <typename A, typename S>
__device__ void do_row(const Rows<A, S>& rows, int64_t r, SoftmaxState<A>* of_warps, RowResult<A>* of_row) {
  S* row = rows.logits + r * rows.row_stride;
  const int64_t target = rows.targets[r];
  const A row_weight = rows.row_weight[r];
  if (target == kIgnoredTarget) {
    if (threadIdx.x == 0) write_results(rows, r, RowResult<A>{});
  } else {
    const SoftmaxState<A> state = warp_state(thread_state(row, rows.vocab, target, rows.options));
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = state;
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const bool is_warp = threadIdx.x < blockDim.x / kWarp;
      const SoftmaxState<A> others = warp_state(is_warp ? of_warps[threadIdx.x] : empty_state<A>());
      if (threadIdx.x == 0) {
        // A target outside the vocabulary gives NaN; the caller has asked the device to stop at it.
        const bool inside = target >= 0 && target < rows.vocab;
        const A own = inside ? transformed(static_cast<A>(load(row + target)), rows.options) : A(NAN);
        of_row[0] = finish_row(others, own, target, rows.vocab, rows.options);
        write_results(rows, r, of_row[0]);
      }
    }
    __syncthreads();
  }
  if (!rows.with_gradient) return;
  if (target == kIgnoredTarget || row_weight == 0) {
    for (int64_t j = threadIdx.x; j < rows.vocab; j += blockDim.x) store(row + j, A(0));
  } else {
    write_gradient(row, target, row_weight, of_row[0], rows);
  }
}

template <typename A, typename S>
__global__ void cross_entropy_rows(Rows<A, S> rows) {
  DSFT_SHARED(SoftmaxState<A>, of_warps, kThreads / kWarp);
  DSFT_SHARED(RowResult<A>, of_row, 1);
  // No barrier between rows: of_row is overwritten only after the next row's first barrier, of_warps before it, but
  // after this row's second.
  for (int64_t r = blockIdx.x; r < rows.num_rows; r += gridDim.x) do_row(rows, r, of_warps, of_row);
}

}  // namespace

// As dsft_cross_entropy_rows in csrc/cpu, on the device and stream given, with device pointers; waits for nothing.
// Returns 0, a cudaError_t, or -kCrossEntropyDtype.
extern "C" __attribute__((visibility("default"))) int32_t dsft_cuda_cross_entropy_rows(
    int32_t dtype, void* logits, int64_t num_rows, int64_t vocab, int64_t row_stride, const int64_t* targets,
    const void* row_weight, double scale, double soft_cap, double label_smoothing, double z_loss,
    int32_t with_gradient, void* loss, void* nll, void* log_normaliser, void* entropy, uint8_t* correct,
    void* stream) {
  if (num_rows == 0) return 0;
  const auto run = [&](auto accumulator, auto storage) {
    using A = decltype(accumulator);
    using S = decltype(storage);
    const LossOptions<A> options = {static_cast<A>(scale), static_cast<A>(soft_cap), static_cast<A>(label_smoothing),
                                    static_cast<A>(z_loss)};
    const Rows<A, S> rows = {static_cast<S*>(logits), num_rows, vocab, row_stride, targets,
                             static_cast<const A*>(row_weight), options, with_gradient != 0, static_cast<A*>(loss),
                             static_cast<A*>(nll), static_cast<A*>(log_normaliser), static_cast<A*>(entropy), correct};
    const int64_t blocks = num_rows < kMaxBlocks ? num_rows : kMaxBlocks;
    DSFT_LAUNCH((cross_entropy_rows<A, S>), blocks, kThreads, stream, rows);
    return launch_error();
  };
  switch (dtype) {
    case kFloat32: return run(float{}, float{});
    case kFloat64: return run(double{}, double{});
    case kBFloat16: return run(float{}, BFloat16{});
    default: return -static_cast<int32_t>(kCrossEntropyDtype);
  }
}

#ifndef __CUDACC__
// For tests: the order in which a block's threads run between barriers: 0 forward, 1 reverse, 2 shuffled.
extern "C" __attribute__((visibility("default"))) void dsft_simulation_order(int32_t order) {
  dsft::simulation::order = static_cast<dsft::simulation::Order>(order);
}
#endif
