// Which source gives the next document. Specification: merge_by_tag_reference in dsft/sampling/mixture.py.
#include <cstdint>
#include <limits>
#include <vector>

#include "export.h"

// Merges the documents read ahead of each source by their tags, tokens drawn before / weight; equal tags go to the
// first source. Ends before the first tag that a document not yet read ahead could have, after max_documents, or with
// the document that reaches max_tokens.
//
// planned: per source, planned tokens of counts[source] documents. owner, row: source of each document drawn, and its
// place among those read ahead; both have room for max_documents. Returns how many are drawn.
DSFT_EXPORT int64_t dsft_merge_by_tag(int64_t num_sources, const int32_t* const* planned, const int64_t* counts,
                                      const int64_t* drawn_before, const double* weights, int64_t max_documents,
                                      int64_t max_tokens, int64_t* owner, int64_t* row) {
  std::vector<int64_t> drawn(drawn_before, drawn_before + num_sources), taken(num_sources, 0);
  std::vector<double> tags(num_sources);
  double horizon = std::numeric_limits<double>::infinity();
  for (int64_t s = 0; s < num_sources; ++s) {
    int64_t end = drawn[s];
    for (int64_t i = 0; i < counts[s]; ++i) end += planned[s][i];
    const double end_tag = static_cast<double>(end) / weights[s];
    if (end_tag < horizon) horizon = end_tag;
    tags[s] = static_cast<double>(drawn[s]) / weights[s];
  }
  int64_t documents = 0, tokens = 0;
  while (documents < max_documents && tokens < max_tokens) {
    int64_t next = 0;
    for (int64_t s = 1; s < num_sources; ++s)
      if (tags[s] < tags[next]) next = s;
    if (!(tags[next] < horizon)) break;
    owner[documents] = next;
    row[documents] = taken[next];
    const int32_t length = planned[next][taken[next]++];
    drawn[next] += length;
    tags[next] = static_cast<double>(drawn[next]) / weights[next];
    tokens += length;
    ++documents;
  }
  return documents;
}
