// A keyed permutation of [0, size) that needs no array: a Feistel network with cycle walking. Specification: Permutation
// in dsft/sampling/permutation.py.
#pragma once
#include <cstdint>

namespace dsft {

constexpr int kPermutationRounds = 6;

// The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit numbers.
inline uint64_t mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

// base is ceil(sqrt(size)), at least 1: both digits of a pair are below it. size < 2^62 keeps products below 2^64.
struct Permutation {
  uint64_t size;
  uint64_t base;
  const uint64_t* round_keys;

  uint64_t operator()(uint64_t position) const {
    uint64_t value = network(position);
    while (value >= size) value = network(value);
    return value;
  }

 private:
  uint64_t network(uint64_t value) const {
    uint64_t left = value / base, right = value % base;
    for (int round = 0; round < kPermutationRounds; round += 2) {
      left = shifted(left, right, round_keys[round]);
      right = shifted(right, left, round_keys[round + 1]);
    }
    return left * base + right;
  }

  uint64_t shifted(uint64_t digit, uint64_t other, uint64_t round_key) const {
    digit += ((mix64(other ^ round_key) >> 32) * base) >> 32;
    return digit >= base ? digit - base : digit;
  }
};

}  // namespace dsft
