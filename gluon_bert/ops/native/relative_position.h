// A learnt bias for the distance between query and key, added to attention scores; model/relative_position.py
// describes the buckets.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "elementwise.h"

namespace gluon_bert {

constexpr int kSideBuckets = 16, kClsBucket = 2 * kSideBuckets - 1, kNumBuckets = kClsBucket + 1;
constexpr float kBiasScale = 10;

// The bucket of a key `to_key` positions to the right of its query; neither is <cls>.
inline int distance_bucket(int to_key) {
  const int distance = std::abs(to_key);
  if (distance < kSideBuckets / 2) return distance + (to_key > 0) * (kSideBuckets - 1);
  const int log2_square = 63 - __builtin_clzll((unsigned long long)distance * distance);
  return std::min(log2_square + 2, kSideBuckets - 1) + (to_key > 0) * (kSideBuckets - 1);
}

// One head's biases for a row of t tokens. table: (kNumBuckets, heads). scale: of the scores that get the biases.
struct RelativeBias {
  const float* table;
  int heads, head, t;
  float scale;
};

// scores (count, t) with stride ld, before they are multiplied by the scale, += the biases / scale. positions: of
// the queries in their row. room: 2 t floats. The row of <cls> has one bias for all keys, which softmax ignores.
inline void add_relative_bias(const RelativeBias& bias, const int* positions, int count, float* scores, long ld,
                              float* room) {
  const float factor = kBiasScale / bias.scale;
  const int t = bias.t;
  float* at = room + t;  // at[d]: the bias for distance d
  for (int d = 1 - t; d < t; ++d) at[d] = factor * bias.table[distance_bucket(d) * bias.heads + bias.head];
  const float to_cls = factor * bias.table[kClsBucket * bias.heads + bias.head];
  for (int i = 0; i < count; ++i) {
    if (positions[i] == 0) continue;
    scores[i * ld] += to_cls;
    add(at + 1 - positions[i], t - 1, scores + i * ld + 1);
  }
}

// Adds the gradients of the biases to `sums`, which is as large as the table. d_scores: those of the scores before
// the scale.
inline void relative_bias_backward(const RelativeBias& bias, const int* positions, int count, const float* d_scores,
                                   long ld, float* sums, float* room) {
  const int t = bias.t;
  float* at = room + t;  // at[d]: the sum over pairs with distance d
  std::fill(room, room + 2 * t, 0.f);
  float to_cls = 0;
  for (int i = 0; i < count; ++i) {
    if (positions[i] == 0) continue;
    to_cls += d_scores[i * ld];
    add(d_scores + i * ld + 1, t - 1, at + 1 - positions[i]);
  }
  const float factor = kBiasScale / bias.scale;
  for (int d = 1 - t; d < t; ++d) sums[distance_bucket(d) * bias.heads + bias.head] += factor * at[d];
  sums[kClsBucket * bias.heads + bias.head] += factor * to_cls;
}

}  // namespace gluon_bert
