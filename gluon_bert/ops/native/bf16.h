// Numbers rounded to bfloat16, the upper half of a float32, in pairs, as processors multiply them.
#pragma once

#include <cstdint>
#include <cstring>

// Not with clang++, which crashes over these products (version 16).
#if defined(__AVX512BF16__) && !defined(__clang__)
#define GLUON_BERT_MULTIPLIES_PAIRS
#include <immintrin.h>
#endif

namespace gluon_bert {

// Two neighbouring terms of a sum, the first in the lower half.
typedef uint32_t Pair;

// x as a bfloat16, the nearest or, of two as near, the even one. What is no number stays none.
inline uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// out[j] = the pair x[j], y[j], or x[j], 0 where there is no y.
inline void pair_up(const float* x, const float* y, int n, Pair* out) {
  if (y) {
#pragma omp simd
    for (int j = 0; j < n; ++j) out[j] = rounded(x[j]) | rounded(y[j]) << 16;
  } else {
#pragma omp simd
    for (int j = 0; j < n; ++j) out[j] = rounded(x[j]);
  }
}

// out[k] = the pair x[2 k], x[2 k + 1] of n numbers; after an odd one stands 0.
inline void pair_neighbours(const float* x, int n, Pair* out) {
#pragma omp simd
  for (int k = 0; k < n / 2; ++k) out[k] = rounded(x[2 * k]) | rounded(x[2 * k + 1]) << 16;
  if (n % 2) out[n / 2] = rounded(x[n - 1]);
}

// sum + x * y in each lane, of both numbers of a pair; without an instruction, by two products of float32.
template <class Floats, class Pairs>
inline __attribute__((always_inline)) Floats add_products(Floats sum, Pairs x, Pairs y) {
#if defined(GLUON_BERT_MULTIPLIES_PAIRS)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  const Pairs upper = 0xffff0000u - Pairs{};
  sum += (Floats)(x << 16) * (Floats)(y << 16);
  return sum + (Floats)(x & upper) * (Floats)(y & upper);
#endif
}

}  // namespace gluon_bert
