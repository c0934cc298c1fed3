// Index arithmetic of pack_sequences and expand_loss_mask, shared by the CPU loops and the CUDA kernels. No torch header,
// no allocation.
//
// A piece is `length` tokens of one document, followed in the token buffer by one lookahead token if its document goes
// on: row i of the piece predicts token i + 1, so the last row needs the first token of the next piece.
#pragma once

#include "portable.h"

namespace dsft {

// Reasons to refuse an input; dsft/ops/reference.py has the same numbers and the texts.
enum PackError : int32_t {
  kPackOk = 0,
  kPackOffsets = 1,      // piece_offsets do not ascend from 0 to the number of tokens
  kPackEmptyPiece = 2,   // a piece without a token of its own
  kPackTooLong = 3,      // the pieces do not fit into the row
  kPackSpanOffsets = 4,  // span_offsets do not ascend from 0 to the number of spans
  kPackSpan = 5,         // a span outside its piece's targets, reversed, or not after the span before it
  kPackWeight = 6,       // a weight that is negative or not finite
  kPackNumRows = 7,      // another number of rows than the caller said
};

// Tokens of piece `p` that go into the row.
DSFT_INLINE int64_t piece_length(const int64_t* piece_offsets, const uint8_t* has_lookahead, int64_t p) {
  return piece_offsets[p + 1] - piece_offsets[p] - (has_lookahead[p] ? 1 : 0);
}

// Whether [begin, end) are targets of a piece, perhaps none: token 0 is never predicted, the lookahead token may be.
DSFT_INLINE bool span_is_valid(int64_t begin, int64_t end, int64_t previous_end, int64_t buffered_tokens) {
  return begin >= 1 && begin >= previous_end && begin <= end && end <= buffered_tokens;
}

// The row that predicts target `t` of a piece that starts at `row_start`.
DSFT_INLINE int64_t row_of_target(int64_t row_start, int64_t t) { return row_start + t - 1; }

// The last of `count` ascending borders, the first of which is at most `value`, that is at most `value`.
template <typename T>
DSFT_INLINE int64_t last_at_most(const T* borders, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(borders[middle]) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace dsft
