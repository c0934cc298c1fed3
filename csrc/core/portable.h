// What makes one text compile as CUDA and as plain C++.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DSFT_HD __host__ __device__
#else
#define DSFT_HD
#endif
#define DSFT_INLINE DSFT_HD inline __attribute__((always_inline))

namespace dsft {

template <typename To, typename From>
DSFT_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

// bfloat16 as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};

DSFT_INLINE float load(const float* at) { return *at; }
DSFT_INLINE double load(const double* at) { return *at; }
DSFT_INLINE float load(const BFloat16* at) { return bits_as<float>(static_cast<uint32_t>(at->bits) << 16); }

DSFT_INLINE void store(float* at, float value) { *at = value; }
DSFT_INLINE void store(double* at, double value) { *at = value; }
DSFT_INLINE void store(BFloat16* at, float value) {  // to nearest, ties to even
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  at->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

}  // namespace dsft
