// Best-fit-decreasing packing. Specification: best_fit_decreasing_reference in dsft/sampling/packing.py.
//
// Pieces are sorted by a counting sort. Packs with one free space are a stack (an intrusive list), and the least free
// space that holds a piece is found in a bitmap of spaces with a bitmap of its words above it: O(pieces + pack_tokens).
#include <algorithm>
#include <cstdint>
#include <vector>

#include "export.h"

namespace {

constexpr int32_t kNone = -1;

// A set of numbers in [0, size), and the least member at or above a number.
class SpaceSet {
 public:
  explicit SpaceSet(int64_t size) : words_(size / 64 + 1), summary_(words_.size() / 64 + 1) {}

  void insert(int64_t value) {
    words_[value >> 6] |= bit(value);
    summary_[value >> 12] |= bit(value >> 6);
  }

  void erase(int64_t value) {
    if ((words_[value >> 6] &= ~bit(value)) == 0) summary_[value >> 12] &= ~bit(value >> 6);
  }

  int64_t at_least(int64_t value) const {
    const uint64_t word = words_[value >> 6] & (~0ull << (value & 63));
    if (word) return (value & ~63) + __builtin_ctzll(word);
    const int64_t next = (value >> 6) + 1;  // word to search from
    for (int64_t s = next >> 6; s < static_cast<int64_t>(summary_.size()); ++s) {
      const uint64_t above = s == next >> 6 ? summary_[s] & (~0ull << (next & 63)) : summary_[s];
      if (above) {
        const int64_t found = s * 64 + __builtin_ctzll(above);
        return found * 64 + __builtin_ctzll(words_[found]);
      }
    }
    return kNone;
  }

 private:
  static uint64_t bit(int64_t value) { return 1ull << (value & 63); }

  std::vector<uint64_t> words_, summary_;
};

// Piece numbers in descending length; equal ones in the order given.
std::vector<int32_t> sort_descending(const int32_t* lengths, int64_t count, int64_t pack_tokens) {
  std::vector<int32_t> next(pack_tokens + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++next[lengths[i]];
  int32_t before = 0;
  for (int64_t length = pack_tokens; length >= 0; --length) {
    const int32_t here = next[length];
    next[length] = before;
    before += here;
  }
  std::vector<int32_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[next[lengths[i]]++] = static_cast<int32_t>(i);
  return order;
}

}  // namespace

// Packs count < 2^31 pieces of lengths in [1, pack_tokens]. pieces has count elements, offsets room for count + 1.
// Returns the number of packs, or -1 - i if piece i has another length.
DSFT_EXPORT int64_t dsft_best_fit_decreasing(const int32_t* lengths, int64_t count, int32_t pack_tokens,
                                             int64_t* pieces, int64_t* offsets) {
  for (int64_t i = 0; i < count; ++i)
    if (lengths[i] < 1 || lengths[i] > pack_tokens) return -1 - i;
  const std::vector<int32_t> order = sort_descending(lengths, count, pack_tokens);
  SpaceSet spaces(pack_tokens + int64_t{1});
  std::vector<int32_t> top(pack_tokens + int64_t{1}, kNone);  // of the stack of packs with that much free space
  std::vector<int32_t> below;                                 // pack -> the one under it in its stack
  std::vector<int32_t> pack_of(count);                        // in the order of `order`
  for (int64_t i = 0; i < count;) {
    const int32_t length = lengths[order[i]];
    int64_t space = spaces.at_least(length);
    int32_t pack;
    if (space == kNone) {
      space = pack_tokens;
      pack = static_cast<int32_t>(below.size());
      below.push_back(kNone);
      offsets[pack] = 0;
    } else {
      pack = top[space];
      if ((top[space] = below[pack]) == kNone) spaces.erase(space);
    }
    // A pack that took a piece stays the tightest fit for pieces of this length until it is too full for one.
    const int64_t begin = i;
    do {
      pack_of[i++] = pack;
      space -= length;
    } while (space >= length && i < count && lengths[order[i]] == length);
    offsets[pack] += i - begin;
    if (space > 0) {
      if ((below[pack] = top[space]) == kNone) spaces.insert(space);
      top[space] = pack;
    }
  }
  const int64_t num_packs = static_cast<int64_t>(below.size());
  int64_t before = 0;
  for (int64_t pack = 0; pack < num_packs; ++pack) {
    const int64_t size = offsets[pack];
    offsets[pack] = before;
    before += size;
  }
  for (int64_t i = 0; i < count; ++i) pieces[offsets[pack_of[i]]++] = order[i];
  std::copy_backward(offsets, offsets + num_packs, offsets + num_packs + 1);  // each stands at the next one's start
  offsets[0] = 0;
  return num_packs;
}
