// pack_sequences on CUDA: one block finds where each piece and span begins in the row and checks the input, then every
// position and every supervised row looks up its own. No atomics; the host waits for nothing.
#include "pack_status.h"

namespace {

using namespace dsft;

constexpr int64_t kMaxBlocks = 4096;  // positions beyond are taken in turn

struct Packing {
  const int32_t* tokens;
  int64_t num_tokens;
  const int64_t* piece_offsets;
  const uint8_t* has_lookahead;
  int64_t num_pieces;
  const int32_t* spans;
  const int64_t* span_offsets;
  int64_t num_spans, row_tokens, pad_id, num_rows;
  int64_t *input_ids, *position_ids;
  int32_t* cu_seqlens;
  int64_t *rows, *targets, *row_piece;
  int64_t* span_rows;  // [num_spans + 1], the first row of each span
  int64_t* status;     // kStatusOk, or the first error as encoded()
};

__device__ int64_t span_errors(const Packing& in, int64_t p) {
  int64_t previous_end = 0;
  for (int64_t s = in.span_offsets[p]; s < in.span_offsets[p + 1]; ++s) {
    const int64_t begin = in.spans[2 * s], end = in.spans[2 * s + 1];
    if (!span_is_valid(begin, end, previous_end, in.piece_offsets[p + 1] - in.piece_offsets[p]))
      return encoded(kPackSpan, p);
    previous_end = end;
  }
  return kNoError;
}

__global__ void pack_borders(Packing in) {
  DSFT_SHARED(int64_t, scratch, kBlockThreads);
  int64_t error = first_of(offsets_error(in.piece_offsets, in.num_pieces, in.num_tokens, kPackOffsets, scratch),
                           offsets_error(in.span_offsets, in.num_pieces, in.num_spans, kPackSpanOffsets, scratch));
  if (error == kNoError) {
    const Share share = share_of(threadIdx.x, blockDim.x, in.num_pieces);
    for (int64_t p = share.first; p < share.end; ++p) error = first_of(error, span_errors(in, p));
    const auto length = [&](int64_t p) { return piece_length(in.piece_offsets, in.has_lookahead, p); };
    const auto begin_piece = [&](int64_t p, int64_t before) {
      in.cu_seqlens[p] = static_cast<int32_t>(before);
      if (length(p) < 1) error = first_of(error, encoded(kPackEmptyPiece, p));
      if (before + length(p) > in.row_tokens) error = first_of(error, encoded(kPackTooLong, p));
    };
    const int64_t used = block_scan(in.num_pieces, length, begin_piece, scratch);
    const auto targets = [&](int64_t s) { return static_cast<int64_t>(in.spans[2 * s + 1]) - in.spans[2 * s]; };
    const int64_t num_rows =
        block_scan(in.num_spans, targets, [&](int64_t s, int64_t before) { in.span_rows[s] = before; }, scratch);
    if (num_rows != in.num_rows) error = first_of(error, encoded(kPackNumRows, in.num_pieces));
    if (threadIdx.x == 0) {
      in.cu_seqlens[in.num_pieces] = static_cast<int32_t>(used);
      in.cu_seqlens[in.num_pieces + 1] = static_cast<int32_t>(in.row_tokens);
    }
    error = block_min(error, scratch);
  }
  if (threadIdx.x == 0) in.status[0] = error == kNoError ? kStatusOk : error;
}

__device__ void pack_position(const Packing& in, int64_t i) {
  const int64_t used = in.cu_seqlens[in.num_pieces];
  if (i >= used) {
    in.input_ids[i] = in.pad_id;
    in.position_ids[i] = i - used;
    return;
  }
  const int64_t p = last_at_most(in.cu_seqlens, in.num_pieces, i);
  const int64_t position = i - in.cu_seqlens[p];
  in.input_ids[i] = in.tokens[in.piece_offsets[p] + position];
  in.position_ids[i] = position;
}

__device__ void pack_row(const Packing& in, int64_t row) {
  const int64_t s = last_at_most(in.span_rows, in.num_spans, row);
  const int64_t p = last_at_most(in.span_offsets, in.num_pieces, s);
  const int64_t t = in.spans[2 * s] + row - in.span_rows[s];
  in.rows[row] = row_of_target(in.cu_seqlens[p], t);
  in.targets[row] = in.tokens[in.piece_offsets[p] + t];
  in.row_piece[row] = p;
}

__global__ void pack_elements(Packing in) {
  if (in.status[0] != kStatusOk) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < in.row_tokens; i += step) {
    pack_position(in, i);
    if (i < in.num_rows) pack_row(in, i);  // rows are positions: there are no more of them
  }
}

}  // namespace

// As dsft_pack_sequences_check and dsft_pack_sequences in csrc/cpu, on the device and stream given, with device
// pointers; waits for nothing. span_rows (num_spans + 1 elements) is scratch. status (one element) is 0, or 16 * piece +
// dsft::PackError, and then the outputs are undefined. Returns 0 or a cudaError_t.
extern "C" __attribute__((visibility("default"))) int32_t dsft_cuda_pack_sequences(
    const int32_t* tokens, int64_t num_tokens, const int64_t* piece_offsets, const uint8_t* has_lookahead,
    int64_t num_pieces, const int32_t* spans, const int64_t* span_offsets, int64_t num_spans, int64_t row_tokens,
    int64_t pad_id, int64_t num_rows, int64_t* input_ids, int64_t* position_ids, int32_t* cu_seqlens, int64_t* rows,
    int64_t* targets, int64_t* row_piece, int64_t* span_rows, int64_t* status, void* stream) {
  const Packing packing = {tokens,     num_tokens, piece_offsets, has_lookahead, num_pieces,   spans,      span_offsets,
                           num_spans,  row_tokens, pad_id,        num_rows,      input_ids,    position_ids, cu_seqlens,
                           rows,       targets,    row_piece,     span_rows,     status};
  DSFT_LAUNCH(pack_borders, 1, kBlockThreads, stream, packing);
  const int32_t error = launch_error();
  if (error != 0 || row_tokens == 0) return error;
  const int64_t blocks = (row_tokens + kBlockThreads - 1) / kBlockThreads;
  DSFT_LAUNCH(pack_elements, blocks < kMaxBlocks ? blocks : kMaxBlocks, kBlockThreads, stream, packing);
  return launch_error();
}
