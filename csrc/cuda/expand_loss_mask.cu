// expand_loss_mask on CUDA: one block clips the spans and finds where each one's rows begin, then every row looks up its
// weight. No atomics; the host waits for nothing.
#include "../core/loss_mask.h"
#include "pack_status.h"

namespace {

using namespace dsft;

constexpr int64_t kMaxBlocks = 4096;  // rows beyond are taken in turn

struct Expanded {
  int32_t* clipped;    // [num_spans, 2]
  float* row_weights;  // [num_spans], weight of each one's rows
  int64_t* span_rows;  // [num_spans + 1], the first row of each span; the last is the number of rows
  int64_t* status;     // kStatusOk, or the first error as encoded()
};

__global__ void clip_to_pieces(LossMask mask, Expanded out) {
  DSFT_SHARED(int64_t, scratch, kBlockThreads);
  int64_t error = offsets_error(mask.span_offsets, mask.num_pieces, mask.num_spans, kPackSpanOffsets, scratch);
  if (error == kNoError) {
    const Share share = share_of(threadIdx.x, blockDim.x, mask.num_pieces);
    for (int64_t p = share.first; p < share.end; ++p)
      error = first_of(error, encoded(clip_spans(mask, p, out.clipped, out.row_weights), p));
    error = block_min(error, scratch);
  }
  if (error == kNoError) {
    const auto targets = [&](int64_t s) { return static_cast<int64_t>(out.clipped[2 * s + 1]) - out.clipped[2 * s]; };
    const int64_t num_rows = block_scan(
        mask.num_spans, targets, [&](int64_t s, int64_t before) { out.span_rows[s] = before; }, scratch);
    if (threadIdx.x == 0) out.span_rows[mask.num_spans] = num_rows;
  }
  if (threadIdx.x == 0) out.status[0] = error == kNoError ? kStatusOk : error;
}

__global__ void expand_rows(const float* row_weights, const int64_t* span_rows, int64_t num_spans, int64_t num_rows,
                            float* row_weight, int64_t* status) {
  if (status[0] != kStatusOk) return;
  if (span_rows[num_spans] != num_rows) {
    if (blockIdx.x == 0 && threadIdx.x == 0) status[0] = kPackNumRows;
    return;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < num_rows; row += step)
    row_weight[row] = row_weights[last_at_most(span_rows, num_spans, row)];
}

}  // namespace

// As dsft_expand_loss_mask_spans in csrc/cpu, on the device and stream given, with device pointers; waits for nothing.
// span_rows has num_spans + 1 elements, its last one the number of rows. status (one element) is 0, or 16 * piece +
// dsft::PackError, and then the outputs are undefined. Returns 0 or a cudaError_t.
extern "C" __attribute__((visibility("default"))) int32_t dsft_cuda_expand_loss_mask_spans(
    const int32_t* spans, const float* span_weights, const int64_t* span_offsets, int64_t num_spans, int64_t num_pieces,
    const int64_t* piece_start, const int64_t* piece_targets, const int64_t* document_tokens,
    const double* piece_weight, int32_t reduction, int32_t* clipped, float* row_weights, int64_t* span_rows,
    int64_t* status, void* stream) {
  const LossMask mask = {spans,       span_weights,  span_offsets,    num_spans,    num_pieces,
                         piece_start, piece_targets, document_tokens, piece_weight, static_cast<LossReduction>(reduction)};
  const Expanded out = {clipped, row_weights, span_rows, status};
  DSFT_LAUNCH(clip_to_pieces, 1, kBlockThreads, stream, mask, out);
  return launch_error();
}

// One weight for each of num_rows rows. Where that is another number than span_rows says, status becomes
// dsft::kPackNumRows. Returns 0 or a cudaError_t.
extern "C" __attribute__((visibility("default"))) int32_t dsft_cuda_expand_loss_mask_rows(
    const float* row_weights, const int64_t* span_rows, int64_t num_spans, int64_t num_rows, float* row_weight,
    int64_t* status, void* stream) {
  const int64_t blocks = num_rows == 0 ? 1 : (num_rows + kBlockThreads - 1) / kBlockThreads;
  DSFT_LAUNCH(expand_rows, blocks < kMaxBlocks ? blocks : kMaxBlocks, kBlockThreads, stream, row_weights, span_rows,
              num_spans, num_rows, row_weight, status);
  return launch_error();
}
