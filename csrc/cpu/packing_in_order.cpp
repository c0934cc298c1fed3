// Packings that keep the order of what they pack. Specification: next_fit_reference and concat_and_split_reference in
// dsft/sampling/packing.py.
#include <algorithm>
#include <cstdint>

#include "export.h"

// A pack ends before the piece that it has no room for. offsets has room for count + 1.
// Returns the number of packs, or -1 - i if the length of piece i is not in [1, pack_tokens].
DSFT_EXPORT int64_t dsft_next_fit(const int32_t* lengths, int64_t count, int32_t pack_tokens, int64_t* offsets) {
  int64_t num_packs = 0;
  int64_t space = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (lengths[i] < 1 || lengths[i] > pack_tokens) return -1 - i;
    if (lengths[i] > space) {
      offsets[num_packs++] = i;
      space = pack_tokens;
    }
    space -= lengths[i];
  }
  offsets[num_packs] = count;
  return num_packs;
}

// Documents one after the other, cut wherever a pack is full. document, start and length have room for count pieces and
// one more for each pack, offsets for one more than the packs.
// Returns the number of packs, or -1 - i if document i has no token.
DSFT_EXPORT int64_t dsft_concat_and_split(const int32_t* planned, int64_t count, int32_t pack_tokens, int64_t* document,
                                          int64_t* start, int32_t* length, int64_t* offsets) {
  int64_t num_packs = 0;
  int64_t num_pieces = 0;
  int32_t space = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (planned[i] < 1) return -1 - i;
    for (int32_t used = 0; used < planned[i];) {
      if (space == 0) {
        offsets[num_packs++] = num_pieces;
        space = pack_tokens;
      }
      const int32_t taken = std::min(space, planned[i] - used);
      document[num_pieces] = i;
      start[num_pieces] = used;
      length[num_pieces++] = taken;
      used += taken;
      space -= taken;
    }
  }
  offsets[num_packs] = num_pieces;
  return num_packs;
}
