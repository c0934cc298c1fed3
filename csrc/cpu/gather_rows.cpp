// gather_rows: pieces of mapped shards become packed rows, their supervised rows and their hashes. Specification:
// _gather_reference in dsft/batch/collate.py.
#include <algorithm>
#include <array>

#include "../core/loss_mask.h"
#include "../core/permutation.h"
#include "crc32.h"
#include "export.h"

namespace {

constexpr int64_t kBlockBytes = 65536;  // BLOCK_BYTES in dsft/store/layout.py

enum GatherError : int32_t {  // the texts are in dsft/ops/gather_rows.py
  kGatherOk = 0,
  kGatherDocument = 1,  // a document that its shard does not have
  kGatherPiece = 2,     // a piece outside its document
  kGatherTooLong = 3,   // the pieces do not fit into the row
  kGatherSpan = 4,      // a span that is not after the one before it
  kGatherBlock = 5,     // a block of tokens whose crc32 is not the one it was written with
  kGatherWeight = 6,    // a weight that is negative or not finite
};

// A shard that is mapped. The layout is SHARD_VIEW in dsft/ops/gather_rows.py.
struct ShardView {
  const uint8_t* tokens;
  const int64_t* token_offsets;  // [num_documents + 1]
  const int64_t* span_offsets;   // [num_documents + 1]
  const int32_t* spans;          // [K, 2], supervised targets, counted from the document's start
  const float* span_weights;     // [K]
  const uint32_t* block_crc32;   // null: there is nothing to verify
  uint8_t* block_is_verified;
  int64_t num_documents;
  int64_t token_bytes;  // 2 or 4
};

struct Piece {
  const ShardView* view;
  int64_t document, start, length;
  int64_t document_tokens;  // after truncation
  int64_t num_buffered;     // length, and one lookahead token if the document goes on
  const uint8_t* tokens;
};

struct Row {
  int32_t* input_ids;
  int32_t* position_ids;
  int32_t* rows;
  int32_t* targets;
  float* row_weight;
};

template <typename Stored>
inline void convert(const uint8_t* from, int64_t count, int32_t* to) {
  const Stored* stored = reinterpret_cast<const Stored*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(stored[i]);
}

DSFT_CLONES void copy_tokens(const uint8_t* from, int64_t token_bytes, int64_t count, int32_t* __restrict to) {
  if (token_bytes == 2)
    convert<uint16_t>(from, count, to);
  else
    convert<uint32_t>(from, count, to);
}

DSFT_CLONES void count_up(int32_t first, int64_t count, int32_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = first + static_cast<int32_t>(i);
}

// Verifies the blocks that a piece's bytes lie in, each once.
bool blocks_are_sound(const ShardView& view, int64_t begin, int64_t end) {
  if (view.block_crc32 == nullptr) return true;
  const int64_t shard_bytes = view.token_offsets[view.num_documents] * view.token_bytes;
  for (int64_t block = begin / kBlockBytes; block * kBlockBytes < end; ++block) {
    if (view.block_is_verified[block]) continue;
    const int64_t first = block * kBlockBytes, count = std::min(kBlockBytes, shard_bytes - first);
    if (~dsft::crc32_state(~0u, view.tokens + first, count) != view.block_crc32[block]) return false;
    view.block_is_verified[block] = 1;
  }
  return true;
}

int32_t open_piece(const ShardView* view, int64_t document, int64_t start, int64_t length, int64_t most_tokens,
                   Piece* piece) {
  if (document < 0 || document >= view->num_documents) return kGatherDocument;
  const int64_t first = view->token_offsets[document];
  const int64_t document_tokens = std::min(view->token_offsets[document + 1] - first, most_tokens);
  if (start < 0 || length < 1 || start + length > document_tokens) return kGatherPiece;
  const int64_t num_buffered = length + (start + length < document_tokens ? 1 : 0);
  const int64_t begin = (first + start) * view->token_bytes;
  *piece = {view, document, start, length, document_tokens, num_buffered, view->tokens + begin};
  return blocks_are_sound(*view, begin, begin + num_buffered * view->token_bytes) ? kGatherOk : kGatherBlock;
}

struct Rule {
  const double* loss_weights;  // one a source
  dsft::LossReduction reduction;
  int64_t most_tokens;  // of a document
  int64_t pack_tokens;
  int32_t pad_id;
  uint64_t hash_key;
};

struct Summary {  // the layout is SUMMARY in dsft/ops/gather_rows.py
  int64_t num_rows, num_tokens, max_seqlen, data_hash;
  double weight_sum;
};

// The supervised targets of a span in the whole document: neither token 0 nor what is cut off behind it.
struct Targets {
  int64_t begin, end;

  Targets(const Piece& piece, int64_t s)
      : begin(std::max<int64_t>(piece.view->spans[2 * s], 1)),
        end(std::min<int64_t>(piece.view->spans[2 * s + 1], piece.document_tokens)) {}

  int64_t count() const { return std::max<int64_t>(end - begin, 0); }
};

// Writes the supervised rows of a piece that stands at `at` in its row, behind those that the summary has.
int32_t supervise(const Piece& piece, int64_t at, int32_t source, const Rule& rule, const Row& out, Summary* summary) {
  const ShardView& view = *piece.view;
  const double loss_weight = rule.loss_weights[source];
  if (!dsft::weight_is_valid(loss_weight)) return kGatherWeight;
  const int64_t first_span = view.span_offsets[piece.document], end_span = view.span_offsets[piece.document + 1];
  int64_t in_document = 0, previous_end = 0;
  for (int64_t s = first_span; s < end_span; ++s) {
    if (view.spans[2 * s] < previous_end || view.spans[2 * s + 1] < view.spans[2 * s]) return kGatherSpan;
    if (!dsft::weight_is_valid(view.span_weights[s])) return kGatherWeight;
    previous_end = view.spans[2 * s + 1];
    if (view.span_weights[s] > 0) in_document += Targets(piece, s).count();
  }
  for (int64_t s = first_span; s < end_span; ++s) {
    const Targets targets(piece, s);
    const int64_t begin = std::max<int64_t>(targets.begin - piece.start, 1);
    const int64_t end = std::min(targets.end - piece.start, piece.num_buffered);
    if (begin >= end) continue;
    const int64_t divisor = rule.reduction == dsft::kToken      ? 1
                            : rule.reduction == dsft::kDocument ? std::max<int64_t>(in_document, 1)
                                                                : targets.count();
    const float weight =
        static_cast<float>(static_cast<double>(view.span_weights[s]) * loss_weight / static_cast<double>(divisor));
    if (!dsft::weight_is_valid(weight)) return kGatherWeight;
    if (weight == 0) continue;
    const int64_t count = end - begin, row = summary->num_rows;
    count_up(static_cast<int32_t>(at + begin - 1), count, out.rows + row);
    copy_tokens(piece.tokens + begin * view.token_bytes, view.token_bytes, count, out.targets + row);
    std::fill_n(out.row_weight + row, count, weight);
    summary->weight_sum += static_cast<double>(weight) * static_cast<double>(count);
    summary->num_rows += count;
  }
  return kGatherOk;
}

// Hash of a piece's place and of the tokens that were put in the row. Specification: dsft/batch/hashing.py.
uint64_t piece_hash(uint64_t key, std::array<int64_t, 4> place, const int32_t* ids, int64_t count) {
  const uint32_t crc = ~dsft::crc32_state(~0u, reinterpret_cast<const uint8_t*>(ids), 4 * count);
  uint64_t state = key;
  for (const int64_t part : place) state = dsft::mix64(state ^ dsft::mix64(static_cast<uint64_t>(part) + key));
  return dsft::mix64(state ^ dsft::mix64(crc + key));
}

// The columns of the pieces of all rows, one row after the other.
struct Pieces {
  const ShardView* const* views;
  const int64_t* place;  // document number in the view
  const int32_t* source;
  const int32_t* shard;
  const int64_t* document;
  const int64_t* start;
  const int32_t* length;
};

// Fills one row of row_tokens from the pieces [begin, end); cu_seqlens has room for end - begin + 2 elements.
int32_t gather_row(const Pieces& pieces, int64_t begin, int64_t end, int64_t row_tokens, const Rule& rule,
                   const Row& out, int32_t* cu_seqlens, Summary* summary, int64_t* where) {
  int64_t at = 0;
  uint64_t hash = 0;
  *summary = {};
  for (int64_t p = begin; p < end; ++p) {
    *where = p;
    Piece piece;
    int32_t error = open_piece(pieces.views[p], pieces.place[p], pieces.start[p], pieces.length[p], rule.most_tokens,
                               &piece);
    if (error != kGatherOk) return error;
    if (at + piece.length > row_tokens) return kGatherTooLong;
    cu_seqlens[p - begin] = static_cast<int32_t>(at);
    copy_tokens(piece.tokens, piece.view->token_bytes, piece.length, out.input_ids + at);
    count_up(0, piece.length, out.position_ids + at);
    error = supervise(piece, at, pieces.source[p], rule, out, summary);
    if (error != kGatherOk) return error;
    hash += piece_hash(rule.hash_key, {pieces.source[p], pieces.shard[p], pieces.document[p], pieces.start[p]},
                       out.input_ids + at, piece.length);
    at += piece.length;
    summary->max_seqlen = std::max(summary->max_seqlen, piece.length);
  }
  cu_seqlens[end - begin] = static_cast<int32_t>(at);
  if (at < row_tokens) cu_seqlens[end - begin + 1] = static_cast<int32_t>(row_tokens);  // the tail is a document
  std::fill_n(out.input_ids + at, row_tokens - at, rule.pad_id);
  for (int64_t i = at; i < row_tokens; ++i) out.position_ids[i] = static_cast<int32_t>((i - at) % rule.pack_tokens);
  summary->num_tokens = at;
  summary->max_seqlen = std::max(summary->max_seqlen, row_tokens - at);
  summary->data_hash = static_cast<int64_t>(hash & ((uint64_t{1} << 63) - 1));
  return kGatherOk;
}

}  // namespace

// Row r is made of the pieces [borders[r], borders[r + 1]) and has row_tokens[r] tokens. input_ids and position_ids
// hold the rows one after the other, without gaps; so do the outputs of the supervised rows (num_rows elements a row)
// and cu_seqlens (one element more than the row has pieces, two if it has a tail). The first five have room for the sum
// of row_tokens, cu_seqlens for two elements more a row than there are pieces. Returns a GatherError; *where is the
// piece it is about.
DSFT_EXPORT int32_t dsft_gather_rows(const ShardView* const* views, const int64_t* place, const int32_t* source,
                                     const int32_t* shard, const int64_t* document, const int64_t* start,
                                     const int32_t* length, int64_t num_rows, const int64_t* borders,
                                     const int64_t* row_tokens, const double* loss_weights, int32_t reduction,
                                     int64_t most_tokens, int64_t pack_tokens, int32_t pad_id, uint64_t hash_key,
                                     int32_t* input_ids, int32_t* position_ids, int32_t* rows, int32_t* targets,
                                     float* row_weight, int32_t* cu_seqlens, Summary* summary, int64_t* where) {
  const Pieces pieces = {views, place, source, shard, document, start, length};
  const auto divisor = static_cast<dsft::LossReduction>(reduction);
  const Rule rule = {loss_weights, divisor, most_tokens, pack_tokens, pad_id, hash_key};
  int64_t at = 0, row = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const Row out = {input_ids + at, position_ids + at, rows + row, targets + row, row_weight + row};
    const int32_t error =
        gather_row(pieces, borders[r], borders[r + 1], row_tokens[r], rule, out, cu_seqlens, summary + r, where);
    if (error != kGatherOk) return error;
    at += row_tokens[r];
    row += summary[r].num_rows;
    cu_seqlens += borders[r + 1] - borders[r] + (summary[r].num_tokens < row_tokens[r] ? 2 : 1);
  }
  return kGatherOk;
}

// crc32 as the blocks and rows use it, and as they do on a processor without carry-less multiplication.
DSFT_EXPORT uint32_t dsft_crc32(const uint8_t* data, int64_t count) { return ~dsft::crc32_state(~0u, data, count); }

DSFT_EXPORT uint32_t dsft_crc32_by_tables(const uint8_t* data, int64_t count) {
  return ~dsft::crc32_by_tables(~0u, data, count);
}
