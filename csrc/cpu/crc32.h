// CRC-32 as zlib computes it (reflected polynomial 0xEDB88320), many bytes at a time.
//
// Where the processor multiplies polynomials (PCLMULQDQ), 64 bytes are folded at once: 128 bits that stand n bits before
// a place are replaced there by their product with x^n mod P (Gopal and others, "Fast CRC computation for generic
// polynomials using PCLMULQDQ", Intel, 2009). Elsewhere, and for the ends, eight table look-ups a word.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsft {

constexpr uint32_t kCrcPolynomial = 0xEDB88320u;
constexpr int kCrcTables = 8;

struct CrcTables {
  uint32_t of[kCrcTables][256];  // of[k][byte]: the state after `byte` and k zero bytes

  constexpr CrcTables() : of() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t state = byte;
      for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1) ? kCrcPolynomial : 0);
      of[0][byte] = state;
    }
    for (int k = 1; k < kCrcTables; ++k)
      for (int byte = 0; byte < 256; ++byte) of[k][byte] = (of[k - 1][byte] >> 8) ^ of[0][of[k - 1][byte] & 255];
  }
};

inline constexpr CrcTables kCrc;

// The state (inverted crc) after `count` more bytes, by tables.
inline uint32_t crc32_by_tables(uint32_t state, const uint8_t* data, int64_t count) {
  for (; count >= 8; data += 8, count -= 8) {
    uint64_t word;
    memcpy(&word, data, 8);
    word ^= state;
    state = 0;
    for (int k = 0; k < 8; ++k) state ^= kCrc.of[7 - k][(word >> (8 * k)) & 255];
  }
  for (; count > 0; ++data, --count) state = (state >> 8) ^ kCrc.of[0][(state ^ *data) & 255];
  return state;
}

#if defined(__x86_64__)
// x^n mod P with its bits reflected, one place up: the factor that carries reflected 64-bit halves n bits further.
constexpr uint64_t crc32_fold_factor(int n) {
  uint32_t power = 0x80000000u;  // x^0
  for (int i = 0; i < n; ++i) power = (power >> 1) ^ ((power & 1) ? kCrcPolynomial : 0);
  return static_cast<uint64_t>(power) << 1;
}

__attribute__((target("pclmul,sse4.1"))) inline __m128i crc32_fold(__m128i value, __m128i factors, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(value, factors, 0x00), high = _mm_clmulepi64_si128(value, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// As crc32_by_tables, for at least 64 bytes.
__attribute__((target("pclmul,sse4.1"))) inline uint32_t crc32_by_folding(uint32_t state, const uint8_t* data,
                                                                         int64_t count) {
  constexpr uint64_t far_low = crc32_fold_factor(4 * 128 + 32), far_high = crc32_fold_factor(4 * 128 - 32);
  constexpr uint64_t near_low = crc32_fold_factor(128 + 32), near_high = crc32_fold_factor(128 - 32);
  const __m128i far = _mm_set_epi64x(static_cast<int64_t>(far_high), static_cast<int64_t>(far_low));
  const __m128i near = _mm_set_epi64x(static_cast<int64_t>(near_high), static_cast<int64_t>(near_low));
  const auto word = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  __m128i a = _mm_xor_si128(word(data), _mm_cvtsi32_si128(static_cast<int32_t>(state)));
  __m128i b = word(data + 16), c = word(data + 32), d = word(data + 48);
  for (data += 64, count -= 64; count >= 64; data += 64, count -= 64) {
    a = crc32_fold(a, far, word(data));
    b = crc32_fold(b, far, word(data + 16));
    c = crc32_fold(c, far, word(data + 32));
    d = crc32_fold(d, far, word(data + 48));
  }
  a = crc32_fold(crc32_fold(crc32_fold(a, near, b), near, c), near, d);
  for (; count >= 16; data += 16, count -= 16) a = crc32_fold(a, near, word(data));
  uint8_t folded[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(folded), a);
  return crc32_by_tables(crc32_by_tables(0, folded, 16), data, count);
}
#endif

// The state after `count` more bytes; a crc begins at ~0 and is the inverse of its last state.
inline uint32_t crc32_state(uint32_t state, const uint8_t* data, int64_t count) {
#if defined(__x86_64__)
  static const bool folds = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (folds && count >= 64) return crc32_by_folding(state, data, count);
#endif
  return crc32_by_tables(state, data, count);
}

}  // namespace dsft
