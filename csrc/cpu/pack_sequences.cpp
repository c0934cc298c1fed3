// pack_sequences on the CPU: pieces and their supervised spans become one packed row. Specification:
// pack_sequences_reference in dsft/ops/reference.py.
#include "../core/pack.h"

#include "export.h"

// Checks the input. Returns a dsft::PackError; *where is the piece it is about, *num_rows the supervised rows.
DSFT_EXPORT int32_t dsft_pack_sequences_check(int64_t num_tokens, const int64_t* piece_offsets,
                                              const uint8_t* has_lookahead, int64_t num_pieces, const int32_t* spans,
                                              const int64_t* span_offsets, int64_t num_spans, int64_t row_tokens,
                                              int64_t* num_rows, int64_t* where) {
  *num_rows = 0;
  *where = 0;
  if (piece_offsets[0] != 0 || piece_offsets[num_pieces] != num_tokens) return dsft::kPackOffsets;
  if (span_offsets[0] != 0 || span_offsets[num_pieces] != num_spans) return dsft::kPackSpanOffsets;
  for (int64_t p = 0; p < num_pieces; ++p) {
    *where = p;
    if (piece_offsets[p + 1] < piece_offsets[p]) return dsft::kPackOffsets;
    if (span_offsets[p + 1] < span_offsets[p]) return dsft::kPackSpanOffsets;
  }
  int64_t used = 0;
  for (int64_t p = 0; p < num_pieces; ++p) {
    *where = p;
    const int64_t length = dsft::piece_length(piece_offsets, has_lookahead, p);
    if (length < 1) return dsft::kPackEmptyPiece;
    used += length;
    if (used > row_tokens) return dsft::kPackTooLong;
    int64_t previous_end = 0;
    for (int64_t s = span_offsets[p]; s < span_offsets[p + 1]; ++s) {
      const int64_t begin = spans[2 * s], end = spans[2 * s + 1];
      if (!dsft::span_is_valid(begin, end, previous_end, piece_offsets[p + 1] - piece_offsets[p]))
        return dsft::kPackSpan;
      previous_end = end;
      *num_rows += end - begin;
    }
  }
  return dsft::kPackOk;
}

// Fills the outputs in one pass. The input must have passed dsft_pack_sequences_check. input_ids and position_ids have
// row_tokens elements, cu_seqlens num_pieces + 2, the three row outputs num_rows each.
DSFT_EXPORT void dsft_pack_sequences(const int32_t* tokens, const int64_t* piece_offsets, const uint8_t* has_lookahead,
                                     int64_t num_pieces, const int32_t* spans, const int64_t* span_offsets,
                                     int64_t row_tokens, int64_t pad_id, int64_t* input_ids, int64_t* position_ids,
                                     int32_t* cu_seqlens, int64_t* rows, int64_t* targets, int64_t* row_piece) {
  int64_t at = 0, row = 0;
  for (int64_t p = 0; p < num_pieces; ++p) {
    const int32_t* piece = tokens + piece_offsets[p];
    const int64_t length = dsft::piece_length(piece_offsets, has_lookahead, p);
    cu_seqlens[p] = static_cast<int32_t>(at);
    for (int64_t i = 0; i < length; ++i) {
      input_ids[at + i] = piece[i];
      position_ids[at + i] = i;
    }
    for (int64_t s = span_offsets[p]; s < span_offsets[p + 1]; ++s) {
      for (int64_t t = spans[2 * s]; t < spans[2 * s + 1]; ++t, ++row) {
        rows[row] = dsft::row_of_target(at, t);
        targets[row] = piece[t];
        row_piece[row] = p;
      }
    }
    at += length;
  }
  cu_seqlens[num_pieces] = static_cast<int32_t>(at);
  cu_seqlens[num_pieces + 1] = static_cast<int32_t>(row_tokens);
  for (int64_t i = 0; at + i < row_tokens; ++i) {
    input_ids[at + i] = pad_id;
    position_ids[at + i] = i;
  }
}
