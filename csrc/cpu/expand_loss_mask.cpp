// expand_loss_mask on the CPU: the supervised spans of documents become spans of their pieces and one weight a row.
#include "../core/loss_mask.h"

#include "export.h"

// Clips the spans to their pieces and finds the weight of each one's rows (num_spans elements each). Returns a
// dsft::PackError; *where is the piece it is about, *num_rows the supervised rows.
DSFT_EXPORT int32_t dsft_expand_loss_mask_spans(const int32_t* spans, const float* span_weights,
                                                const int64_t* span_offsets, int64_t num_spans, int64_t num_pieces,
                                                const int64_t* piece_start, const int64_t* piece_targets,
                                                const int64_t* document_tokens, const double* piece_weight,
                                                int32_t reduction, int32_t* clipped, float* row_weights,
                                                int64_t* num_rows, int64_t* where) {
  *num_rows = 0;
  *where = 0;
  if (span_offsets[0] != 0 || span_offsets[num_pieces] != num_spans) return dsft::kPackSpanOffsets;
  for (int64_t p = 0; p < num_pieces; ++p) {
    *where = p;
    if (span_offsets[p + 1] < span_offsets[p]) return dsft::kPackSpanOffsets;
  }
  const dsft::LossMask mask = {spans,         span_weights,    span_offsets, num_spans,
                               num_pieces,    piece_start,     piece_targets, document_tokens,
                               piece_weight,  static_cast<dsft::LossReduction>(reduction)};
  for (int64_t p = 0; p < num_pieces; ++p) {
    *where = p;
    const dsft::PackError error = dsft::clip_spans(mask, p, clipped, row_weights);
    if (error != dsft::kPackOk) return error;
  }
  for (int64_t s = 0; s < num_spans; ++s) *num_rows += clipped[2 * s + 1] - clipped[2 * s];
  return dsft::kPackOk;
}

// One weight a row, from what dsft_expand_loss_mask_spans has written.
DSFT_EXPORT void dsft_expand_loss_mask_rows(const int32_t* clipped, const float* row_weights, int64_t num_spans,
                                            float* row_weight) {
  int64_t row = 0;
  for (int64_t s = 0; s < num_spans; ++s)
    for (int64_t t = clipped[2 * s]; t < clipped[2 * s + 1]; ++t) row_weight[row++] = row_weights[s];
}
