// Arithmetic of expand_loss_mask, shared by the CPU loop and the CUDA kernel. Specification: expand_loss_mask_reference
// in dsft/ops/reference.py. No torch header, no allocation.
#pragma once

#include "pack.h"

namespace dsft {

enum LossReduction : int32_t { kToken = 0, kDocument = 1, kMessage = 2 };

// The supervised spans of whole documents, and the pieces of them that are in the row.
struct LossMask {
  const int32_t* spans;          // [num_spans, 2], targets of the whole document
  const float* span_weights;     // [num_spans]
  const int64_t* span_offsets;   // [num_pieces + 1]
  int64_t num_spans, num_pieces;
  const int64_t* piece_start;      // where the piece begins in its document
  const int64_t* piece_targets;    // its tokens, the lookahead token included
  const int64_t* document_tokens;  // of the whole document
  const double* piece_weight;
  LossReduction reduction;
};

DSFT_INLINE bool weight_is_valid(double weight) { return weight >= 0 && weight - weight == 0; }

// Supervised targets of span `s` in the whole document of piece `p`: neither token 0 nor what lies beyond its end.
DSFT_INLINE int64_t document_targets(const LossMask& mask, int64_t p, int64_t s) {
  if (mask.span_weights[s] == 0) return 0;
  const int64_t begin = mask.spans[2 * s] < 1 ? 1 : mask.spans[2 * s];
  const int64_t end = mask.spans[2 * s + 1] < mask.document_tokens[p] ? mask.spans[2 * s + 1] : mask.document_tokens[p];
  return begin < end ? end - begin : 0;
}

// Clips the spans of piece `p` to it, so that those without a row in it are empty, and writes the weight of each one's
// rows. Returns a PackError.
DSFT_INLINE PackError clip_spans(const LossMask& mask, int64_t p, int32_t* clipped, float* row_weights) {
  if (!weight_is_valid(mask.piece_weight[p])) return kPackWeight;
  int64_t previous_end = 0, in_document = 0;
  for (int64_t s = mask.span_offsets[p]; s < mask.span_offsets[p + 1]; ++s) {
    const int64_t begin = mask.spans[2 * s], end = mask.spans[2 * s + 1];
    if (begin < previous_end || begin > end) return kPackSpan;
    if (!weight_is_valid(mask.span_weights[s])) return kPackWeight;
    previous_end = end;
    in_document += document_targets(mask, p, s);
  }
  const int64_t start = mask.piece_start[p], targets = mask.piece_targets[p];
  const int64_t document_end = mask.document_tokens[p] - start;
  int64_t last = document_end < targets ? document_end : targets;
  if (last < 1) last = 1;
  for (int64_t s = mask.span_offsets[p]; s < mask.span_offsets[p + 1]; ++s) {
    int64_t begin = mask.spans[2 * s] - start, end = mask.spans[2 * s + 1] - start;
    begin = begin < 1 ? 1 : begin > last ? last : begin;
    end = end > last ? last : end;
    const int64_t own = document_targets(mask, p, s);
    const int64_t divisor = mask.reduction == kToken ? 1 : mask.reduction == kDocument ? in_document : own;
    const double weight =
        own > 0 ? static_cast<double>(mask.span_weights[s]) * mask.piece_weight[p] / static_cast<double>(divisor) : 0.0;
    row_weights[s] = static_cast<float>(weight);
    if (!weight_is_valid(row_weights[s])) return kPackWeight;
    if (end < begin || row_weights[s] == 0) end = begin;
    clipped[2 * s] = static_cast<int32_t>(begin);
    clipped[2 * s + 1] = static_cast<int32_t>(end);
  }
  return kPackOk;
}

}  // namespace dsft
