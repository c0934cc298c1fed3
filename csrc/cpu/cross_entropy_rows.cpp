// masked_cross_entropy_rows_ on the CPU: one pass over a row for its loss, one for its gradient. A row is one thread's
// work and its sums have one order, so the result does not depend on the number of threads.
#include "../core/cross_entropy.h"

#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

#include "export.h"

namespace {

using namespace dsft;

constexpr int64_t kBlock = 1024;                  // logits held in the first-level cache; sums of sums are double
constexpr int64_t kElementsPerThread = 1 << 17;  // a thread for less costs more than it saves

template <typename A, typename S>
struct Rows {
  S* logits;
  int64_t vocab, row_stride;
  const int64_t* targets;
  const A* row_weight;
  LossOptions<A> options;
  bool with_gradient;
  A *loss, *nll, *log_normaliser, *entropy;
  uint8_t* correct;
};

// Two loops, so that the one without a cap stays short.
template <typename A, typename S>
DSFT_INLINE void load_block(const S* logits, int64_t count, const LossOptions<A>& options, A* values) {
  if (options.soft_cap > 0) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = transformed(static_cast<A>(load(logits + i)), options);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<A>(load(logits + i)) * options.scale;
  }
}

// Lanes are written out: the compiler makes no vectors of a maximum over numbers that may be NaN, nor of these sums.
constexpr int64_t kLanes = 32;

template <typename A>
DSFT_INLINE A max_of(const A* values, int64_t count) {
  A lanes[kLanes], max = A(-INFINITY);
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = A(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
  }
  for (; i < count; ++i) max = values[i] > max ? values[i] : max;
  for (int64_t l = 0; l < kLanes; ++l) max = lanes[l] > max ? lanes[l] : max;
  return max;
}

// Sum of left[i] * right[i].
template <typename A>
DSFT_INLINE A dot_of(const A* left, const A* right, int64_t count) {
  A lanes[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += left[i + l] * right[i + l];
  }
  for (; i < count; ++i) sum += left[i] * right[i];
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

template <typename A>
DSFT_INLINE A sum_of(const A* values, int64_t count) {
  A lanes[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
  }
  for (; i < count; ++i) sum += values[i];
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

template <typename A>
DSFT_INLINE SoftmaxState<double> block_state(const A* values, int64_t count) {
  A differences[kBlock], exponentials[kBlock];
  const A max = max_of(values, count);
  const A reference = finite_reference(max);
  // Two loops: where this bound and that inside exp_nonpositive meet, the compiler makes branches and no vectors.
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) differences[i] = entropy_factor(values[i] - reference);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) exponentials[i] = exp_nonpositive(differences[i]);
  const A sum = sum_of(exponentials, count), weighted = dot_of(exponentials, differences, count);
  return {max, sum, weighted, 0, INT64_MAX};
}

template <typename A>
LossOptions<double> in_double(const LossOptions<A>& options) {
  return {options.scale, options.soft_cap, options.label_smoothing, options.z_loss};
}

template <typename A, typename S>
DSFT_INLINE RowResult<double> row_result(const S* logits, int64_t target, const Rows<A, S>& rows) {
  SoftmaxState<double> others = empty_state<double>();
  A values[kBlock], target_logit = 0;
  for (int64_t start = 0; start < rows.vocab; start += kBlock) {
    const int64_t count = rows.vocab - start < kBlock ? rows.vocab - start : kBlock;
    load_block(logits + start, count, rows.options, values);
    const double total = rows.options.label_smoothing > 0 ? sum_of(values, count) : 0.0;
    if (start <= target && target < start + count) {
      target_logit = values[target - start];
      values[target - start] = A(-INFINITY);
    }
    SoftmaxState<double> block = block_state(values, count);
    block.total = total;
    // The first of the largest so far; looked for only where a block has a larger one than all before it.
    for (int64_t i = 0; block.max > others.max && i < count && block.argmax == INT64_MAX; ++i)
      if (values[i] == block.max) block.argmax = start + i;
    others = merged(others, block);
  }
  return finish_row<double>(others, target_logit, target, rows.vocab, in_double(rows.options));
}

template <typename A, typename S>
DSFT_INLINE void write_gradient(S* logits, int64_t target, A row_weight, const RowResult<double>& result,
                                const Rows<A, S>& rows) {
  const GradientFactors<double> exact =
      gradient_factors<double>(result, row_weight, rows.vocab, in_double(rows.options));
  const GradientFactors<A> factors = {static_cast<A>(exact.exponential), static_cast<A>(exact.constant)};
  const LossOptions<A> options = rows.options;
  const A max = static_cast<A>(result.max);
  const A target_raw = static_cast<A>(load(logits + target));
  const A own = gradient_of_target(target_raw, static_cast<A>(result.target_factor), row_weight, options);
  if (options.soft_cap > 0) {
#pragma omp simd
    for (int64_t j = 0; j < rows.vocab; ++j)
      store(logits + j, gradient_of(static_cast<A>(load(logits + j)), max, factors, options));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < rows.vocab; ++j) {
      const A exponential = exp_nonpositive(static_cast<A>(load(logits + j)) * options.scale - max);
      store(logits + j, factors.exponential * exponential - factors.constant);
    }
  }
  store(logits + target, own);
}

template <typename A, typename S>
DSFT_INLINE void run_rows(const Rows<A, S>& rows, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    S* logits = rows.logits + r * rows.row_stride;
    const int64_t target = rows.targets[r];
    RowResult<double> result{};
    if (target != kIgnoredTarget) result = row_result(logits, target, rows);
    rows.loss[r] = static_cast<A>(result.loss);
    rows.nll[r] = static_cast<A>(result.nll);
    rows.log_normaliser[r] = static_cast<A>(result.log_normaliser);
    rows.entropy[r] = static_cast<A>(result.entropy);
    rows.correct[r] = result.correct;
    if (!rows.with_gradient) continue;
    if (target == kIgnoredTarget || rows.row_weight[r] == 0) {
      memset(static_cast<void*>(logits), 0, rows.vocab * sizeof(S));
    } else {
      write_gradient(logits, target, rows.row_weight[r], result, rows);
    }
  }
}

DSFT_CLONES void run_some(const Rows<float, float>& rows, int64_t first, int64_t last) { run_rows(rows, first, last); }
DSFT_CLONES void run_some(const Rows<double, double>& rows, int64_t first, int64_t last) {
  run_rows(rows, first, last);
}
DSFT_CLONES void run_some(const Rows<float, BFloat16>& rows, int64_t first, int64_t last) {
  run_rows(rows, first, last);
}

template <typename A, typename S>
void run_all(const Rows<A, S>& rows, int64_t num_rows, int64_t num_threads) {
  const int64_t useful = num_rows * rows.vocab / kElementsPerThread + 1;
  if (num_threads > useful) num_threads = useful;
  if (num_threads > num_rows) num_threads = num_rows;
  std::vector<std::thread> threads;
  int64_t first = 0;
  for (int64_t t = 0; t + 1 < num_threads; ++t) {
    const int64_t last = num_rows * (t + 1) / num_threads;
    try {
      threads.emplace_back([&rows, first, last] { run_some(rows, first, last); });
    } catch (const std::system_error&) {
      break;  // the system gives no more threads: this one does the rest
    }
    first = last;
  }
  run_some(rows, first, num_rows);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// Loss of each row of logits[num_rows, vocab] (rows row_stride elements apart), and with_gradient its gradient by the
// raw logits in their place. row_weight and the results are double for kFloat64, else float. Returns a
// dsft::CrossEntropyError, with *where the row it is about; then nothing has been written.
DSFT_EXPORT int32_t dsft_cross_entropy_rows(int32_t dtype, void* logits, int64_t num_rows, int64_t vocab,
                                            int64_t row_stride, const int64_t* targets, const void* row_weight,
                                            double scale, double soft_cap, double label_smoothing, double z_loss,
                                            int32_t with_gradient, void* loss, void* nll, void* log_normaliser,
                                            void* entropy, uint8_t* correct, int64_t num_threads, int64_t* where) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if ((targets[r] < 0 || targets[r] >= vocab) && targets[r] != kIgnoredTarget) {
      *where = r;
      return kCrossEntropyTarget;
    }
  }
  const auto run = [&](auto accumulator, auto storage) {
    using A = decltype(accumulator);
    using S = decltype(storage);
    const LossOptions<A> options = {static_cast<A>(scale), static_cast<A>(soft_cap), static_cast<A>(label_smoothing),
                                    static_cast<A>(z_loss)};
    const Rows<A, S> rows = {static_cast<S*>(logits), vocab, row_stride, targets, static_cast<const A*>(row_weight),
                             options, with_gradient != 0, static_cast<A*>(loss), static_cast<A*>(nll),
                             static_cast<A*>(log_normaliser), static_cast<A*>(entropy), correct};
    run_all(rows, num_rows, num_threads);
    return static_cast<int32_t>(kCrossEntropyOk);
  };
  *where = 0;
  switch (dtype) {
    case kFloat32: return run(float{}, float{});
    case kFloat64: return run(double{}, double{});
    case kBFloat16: return run(float{}, BFloat16{});
    default: return kCrossEntropyDtype;
  }
}
