// The order of a source's documents. Specification: Permutation in dsft/sampling/permutation.py, and
// _Group.read_reference in dsft/sampling/order.py.
#include <algorithm>

#include "../core/permutation.h"
#include "export.h"

namespace {

constexpr int64_t kAhead = 32;  // documents whose lengths are fetched into the cache together

enum Overlong : int32_t { kSplit = 0, kTruncate = 1, kDrop = 2 };

int32_t planned_length(int32_t length, int32_t pack_tokens, int32_t overlong) {
  if (overlong == kSplit || length <= pack_tokens) return length;
  return overlong == kTruncate ? pack_tokens : 0;
}

// The last shard that begins at or before a document. Without branches: the documents come in random order.
int64_t shard_of(const int64_t* first_documents, int64_t num_shards, int64_t document) {
  const int64_t* at = first_documents;
  for (int64_t left = num_shards; left > 1;) {
    const int64_t half = left / 2;
    at = at[half] <= document ? at + half : at;
    left -= half;
  }
  return at - first_documents;
}

}  // namespace

DSFT_EXPORT void dsft_permute(uint64_t size, uint64_t base, const uint64_t* round_keys, const int64_t* positions,
                              int64_t count, int64_t* permuted) {
  const dsft::Permutation permutation{size, base, round_keys};
  for (int64_t i = 0; i < count; ++i)
    permuted[i] = static_cast<int64_t>(permutation(static_cast<uint64_t>(positions[i])));
}

// Documents [begin, end) of a shuffled group, without those that the overlong policy drops. The outputs have room for
// end - begin. Returns how many are kept; *rest and *rest_tokens are what was dropped behind the last of them.
DSFT_EXPORT int64_t dsft_read_documents(uint64_t size, uint64_t base, const uint64_t* round_keys, int64_t begin,
                                        int64_t end, const int32_t* lengths, const int64_t* first_documents,
                                        const int64_t* shards, int64_t num_shards, int32_t pack_tokens,
                                        int32_t overlong, int64_t* ordinal, int32_t* shard, int64_t* document,
                                        int32_t* length, int32_t* planned, int64_t* dropped, int64_t* dropped_tokens,
                                        int64_t* rest, int64_t* rest_tokens) {
  const dsft::Permutation permutation{size, base, round_keys};
  int64_t kept = 0;
  *rest = *rest_tokens = 0;
  int64_t ahead[kAhead];
  for (int64_t first = begin; first < end; first += kAhead) {
    const int64_t count = std::min(kAhead, end - first);
    for (int64_t i = 0; i < count; ++i) {
      ahead[i] = static_cast<int64_t>(permutation(static_cast<uint64_t>(first + i)));
      __builtin_prefetch(&lengths[ahead[i]]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t tokens = lengths[ahead[i]];
      const int32_t used = planned_length(tokens, pack_tokens, overlong);
      if (used == 0) {
        *rest += 1;
        *rest_tokens += tokens;
        continue;
      }
      const int64_t which = shard_of(first_documents, num_shards, ahead[i]);
      ordinal[kept] = first + i;
      shard[kept] = static_cast<int32_t>(shards[which]);
      document[kept] = ahead[i] - first_documents[which];
      length[kept] = tokens;
      planned[kept] = used;
      dropped[kept] = *rest;
      dropped_tokens[kept] = *rest_tokens;
      *rest = *rest_tokens = 0;
      ++kept;
    }
  }
  return kept;
}
