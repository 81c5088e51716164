// Divides rows of different lengths into runs of about as many tokens, for threads and their caches.
#pragma once

#include <algorithm>
#include <vector>

namespace gluon_bert {

// Neighbouring rows, without the last one.
struct Run {
  int first, last;
};

inline long tokens_of(const std::vector<int>& lengths, Run rows) {
  long tokens = 0;
  for (int row = rows.first; row < rows.last; ++row) tokens += lengths[row];
  return tokens;
}

// As few runs as possible with at most `room` tokens each. No row may be longer than that.
inline std::vector<Run> filled_runs(const std::vector<int>& lengths, Run rows, long room) {
  std::vector<Run> runs{{rows.first, rows.first}};
  long tokens = 0;
  for (int row = rows.first; row < rows.last; ++row) {
    if (tokens + lengths[row] > room) runs.push_back({row, row}), tokens = 0;
    runs.back().last = row + 1;
    tokens += lengths[row];
  }
  return runs;
}

// At most `count` runs, so that the longest of them has as few tokens as possible.
inline std::vector<Run> even_runs(const std::vector<int>& lengths, Run rows, int count) {
  long too_few = -1, enough = tokens_of(lengths, rows);
  for (int row = rows.first; row < rows.last; ++row) too_few = std::max(too_few, lengths[row] - 1L);
  while (too_few + 1 < enough) {
    const long middle = (too_few + enough) / 2;
    if ((int)filled_runs(lengths, rows, middle).size() <= count)
      enough = middle;
    else
      too_few = middle;
  }
  return filled_runs(lengths, rows, enough);
}

}  // namespace gluon_bert
