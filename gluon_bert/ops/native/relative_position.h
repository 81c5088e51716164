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

// scores (t, t) with stride ld, before they are multiplied by `scale`, += the head's biases / scale.
// table: (kNumBuckets, heads). room: 2 t floats. The row of <cls> has one bias for all keys, which softmax ignores.
inline void add_relative_bias(const float* table, int heads, int head, int t, float scale, float* scores, long ld,
                              float* room) {
  const float factor = kBiasScale / scale;
  float* at = room + t;  // at[d]: the bias for distance d
  for (int d = 1 - t; d < t; ++d) at[d] = factor * table[distance_bucket(d) * heads + head];
  const float to_cls = factor * table[kClsBucket * heads + head];
  for (int i = 1; i < t; ++i) {
    scores[i * ld] += to_cls;
    add(at + 1 - i, t - 1, scores + i * ld + 1);
  }
}

// Adds the gradients of the head's biases to `table`. d_scores: those of the scores before `scale`.
inline void relative_bias_backward(const float* d_scores, long ld, int heads, int head, int t, float scale,
                                   float* table, float* room) {
  float* at = room + t;  // at[d]: the sum over pairs with distance d
  std::fill(room, room + 2 * t, 0.f);
  float to_cls = 0;
  for (int i = 1; i < t; ++i) {
    to_cls += d_scores[i * ld];
    add(d_scores + i * ld + 1, t - 1, at + 1 - i);
  }
  const float factor = kBiasScale / scale;
  for (int d = 1 - t; d < t; ++d) table[distance_bucket(d) * heads + head] += factor * at[d];
  table[kClsBucket * heads + head] += factor * to_cls;
}

}  // namespace gluon_bert
