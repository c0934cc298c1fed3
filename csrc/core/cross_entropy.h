// Arithmetic of masked_cross_entropy_rows_, shared by the CPU loop and the CUDA kernel. No torch header, no allocation.
// Specification: masked_cross_entropy_rows_reference in dsft/ops/reference.py.
//
// With z = cap * tanh(scale * raw / cap) (without the tanh if there is no cap), p = softmax(z), V logits and target y:
//   nll  = log sum_j exp(z_j) - z_y
//   loss = nll + smoothing * (z_y - mean_j z_j) + z_loss * (log sum_j exp(z_j))^2
//   dloss/dz_j = p_j * (1 + 2 * z_loss * log sum exp) - smoothing / V - (1 - smoothing) * [j = y]
// The sums leave out the target and add it at the end: its gradient p_y - 1 = -(sum of the others) / (sum of all), and
// its nll = log1p(sum of the others) when it is the largest, then keep their digits when p_y is close to 1.
#pragma once

#include <cmath>

#include "portable.h"

namespace dsft {

constexpr int64_t kIgnoredTarget = -100;

// Reasons to refuse an input.
enum CrossEntropyError : int32_t {
  kCrossEntropyOk = 0,
  kCrossEntropyTarget = 1,  // a target that is neither a column nor kIgnoredTarget
  kCrossEntropyDtype = 2,   // an unknown dtype number
};

enum LogitsDtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

template <typename A>
struct LossOptions {
  A scale;
  A soft_cap;  // 0: none
  A label_smoothing;
  A z_loss;
};

// exp(x) for x <= 0, within 2 ulp.
DSFT_INLINE double exp_nonpositive(double x) { return exp(x); }
DSFT_INLINE float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  // Written out, without a branch, so that the compiler vectorises it: 2^n * exp(r) with |r| <= ln(2) / 2 (coefficients
  // of Cephes' expf). 2^n is two factors, so that it may reach 0.
  const float smallest = -104.0f, round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x < smallest ? smallest : x;    // NaN stays
  const float shifted = bounded * 1.44269504088896341f + round;
  const float n = shifted - round;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(bits_as<uint32_t>(shifted) - 0x4b400000u);
  const int32_t half = exponent >> 1;
  const float power = bits_as<float>(static_cast<uint32_t>(half + 127) << 23);
  return p * power * bits_as<float>(static_cast<uint32_t>(exponent - half + 127) << 23);
#endif
}

DSFT_INLINE double tanh_of(double x) { return tanh(x); }
DSFT_INLINE float tanh_of(float x) {
  const float size = x < 0 ? -x : x;
  const float e = exp_nonpositive(-2.0f * size);
  const float large = (1.0f - e) / (1.0f + e);
  const float z = x * x;  // small: Cephes' tanhf
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  return size < 0.625f ? small : (x < 0 ? -large : large);
}

// The logit the softmax sees.
template <typename A>
DSFT_INLINE A transformed(A raw, const LossOptions<A>& options) {
  const A scaled = raw * options.scale;
  return options.soft_cap > 0 ? options.soft_cap * tanh_of(scaled / options.soft_cap) : scaled;
}

// Its derivative by the raw logit, without the factor `scale`: 1 - tanh^2, written so that it keeps its digits.
template <typename A>
DSFT_INLINE A transform_slope(A raw, const LossOptions<A>& options) {
  if (!(options.soft_cap > 0)) return A(1);
  const A u = raw * options.scale / options.soft_cap;
  const A e = exp_nonpositive(A(-2) * (u < 0 ? -u : u));
  return A(4) * e / ((A(1) + e) * (A(1) + e));
}

// Sums over some logits, relative to their largest.
template <typename A>
struct SoftmaxState {
  A max;            // -inf: no logit above -inf yet
  A sum;            // sum of exp(z - max)
  A weighted;       // sum of exp(z - max) * (z - max)
  A total;          // sum of z
  int64_t argmax;   // first column that has max
};

template <typename A>
DSFT_INLINE SoftmaxState<A> empty_state() {
  return {A(-INFINITY), A(0), A(0), A(0), INT64_MAX};
}

// What exp(z - max) is computed against, so that a part whose logits are all -inf sums to 0 instead of NaN.
template <typename A>
DSFT_INLINE A finite_reference(A max) {
  return max == A(-INFINITY) ? A(0) : max;
}

// z - reference as a factor of exp(z - reference), so that their product is 0 where z = -inf. The bound is far below where
// the exponential is 0.
template <typename A>
DSFT_INLINE A entropy_factor(A difference) {
  return difference < A(-1000) ? A(-1000) : difference;
}

// exp(z - reference) * (z - reference).
template <typename A>
DSFT_INLINE A entropy_term(A exponential, A difference) {
  return exponential * entropy_factor(difference);
}

// The state's sums relative to a larger maximum.
template <typename A>
DSFT_INLINE SoftmaxState<A> rebased(const SoftmaxState<A>& state, A max) {
  if (state.max == max) return state;
  const A difference = state.max - max;  // below 0, perhaps -inf
  const A factor = exp_nonpositive(difference);
  const A moved = state.max == A(-INFINITY) ? A(0) : difference * state.sum;
  return {max, state.sum * factor, factor > 0 ? (state.weighted + moved) * factor : A(0), state.total, state.argmax};
}

// The state of both parts together. Commutative, so that the order of a tree does not matter for argmax.
template <typename A>
DSFT_INLINE SoftmaxState<A> merged(const SoftmaxState<A>& left, const SoftmaxState<A>& right) {
  const A max = left.max > right.max ? left.max : right.max;
  const SoftmaxState<A> a = rebased(left, max), b = rebased(right, max);
  int64_t argmax = left.max > right.max ? left.argmax : right.argmax;
  if (left.max == right.max) argmax = left.argmax < right.argmax ? left.argmax : right.argmax;
  return {max, a.sum + b.sum, a.weighted + b.weighted, a.total + b.total, argmax};
}

// One row's results, and what its gradient needs.
template <typename A>
struct RowResult {
  A loss;
  A nll;
  A log_normaliser;
  A entropy;
  bool correct;     // the target is the first of the largest logits
  A max;            // exp(z - max) is computed against this
  A sum;            // of all logits
  A target_factor;  // dloss/dz of the target
};

// `others`: all logits but the target's; its total includes the target. NaN and +inf give NaN, as in log_softmax.
template <typename A>
DSFT_INLINE RowResult<A> finish_row(const SoftmaxState<A>& others, A target_logit, int64_t target, int64_t vocab,
                                    const LossOptions<A>& options) {
  RowResult<A> row;
  const A max = target_logit > others.max ? target_logit : others.max;
  const SoftmaxState<A> rest = rebased(others, max);
  row.max = finite_reference(max);
  const A difference = target_logit - row.max;
  const A own = exp_nonpositive(difference);
  row.sum = rest.sum + own;
  const A log_sum = own == A(1) ? log1p(rest.sum) : log(row.sum);
  row.nll = (max - target_logit) + log_sum;
  row.log_normaliser = max + log_sum;
  row.entropy = log_sum - (rest.weighted + entropy_term(own, difference)) / row.sum;
  const bool largest = target_logit > others.max || (target_logit == others.max && target < others.argmax);
  row.correct = largest && row.nll == row.nll;  // not where it is NaN
  row.loss = row.nll + options.z_loss * row.log_normaliser * row.log_normaliser;
  const A z_slope = A(2) * options.z_loss * row.log_normaliser;
  row.target_factor = z_slope - (rest.sum / row.sum) * (A(1) + z_slope);
  if (options.label_smoothing > 0) {
    row.loss += options.label_smoothing * (target_logit - others.total / A(vocab));
    row.target_factor += options.label_smoothing * (A(1) - A(1) / A(vocab));
  }
  return row;
}

// Gradient of row_weight * loss by a raw logit other than the target: (exponential * p - q) * slope.
template <typename A>
struct GradientFactors {
  A exponential;  // row_weight * scale * (1 + 2 * z_loss * log_normaliser) / sum
  A constant;     // row_weight * scale * smoothing / V
};

template <typename A>
DSFT_INLINE GradientFactors<A> gradient_factors(const RowResult<A>& row, A row_weight, int64_t vocab,
                                                const LossOptions<A>& options) {
  const A factor = row_weight * options.scale;
  return {factor * (A(1) + A(2) * options.z_loss * row.log_normaliser) / row.sum,
          factor * options.label_smoothing / A(vocab)};
}

template <typename A>
DSFT_INLINE A gradient_of(A raw, A max, const GradientFactors<A>& factors, const LossOptions<A>& options) {
  const A exponential = exp_nonpositive(transformed(raw, options) - max);
  return (factors.exponential * exponential - factors.constant) * transform_slope(raw, options);
}

template <typename A>
DSFT_INLINE A gradient_of_target(A raw, A target_factor, A row_weight, const LossOptions<A>& options) {
  return row_weight * options.scale * target_factor * transform_slope(raw, options);
}

}  // namespace dsft
