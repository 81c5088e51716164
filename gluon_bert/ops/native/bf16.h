// Numbers in bfloat16, the upper half of a float32. Processors multiply them in pairs.
#pragma once

#include <cstdint>
#include <cstring>

// clang++ 16 crashes on these products.
#if defined(__AVX512BF16__) && !defined(__clang__)
#define GLUON_BERT_HAS_BF16_DOT
#include <immintrin.h>
#endif

namespace gluon_bert {

// Two neighbouring terms of a sum, the first in the lower half.
typedef uint32_t Bf16x2;

// Rounds x to the nearest bfloat16, ties to even. NaN stays NaN.
inline uint32_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// out[j] = the pair x[j], y[j]; or x[j], 0 if y is null.
inline void interleave_rows(const float* x, const float* y, int n, Bf16x2* out) {
  if (y) {
#pragma omp simd
    for (int j = 0; j < n; ++j) out[j] = to_bf16(x[j]) | to_bf16(y[j]) << 16;
  } else {
#pragma omp simd
    for (int j = 0; j < n; ++j) out[j] = to_bf16(x[j]);
  }
}

// out[k] = the pair x[2 k], x[2 k + 1] of n numbers. If n is odd, the last pair ends with 0.
inline void pack_neighbours(const float* x, int n, Bf16x2* out) {
#pragma omp simd
  for (int k = 0; k < n / 2; ++k) out[k] = to_bf16(x[2 * k]) | to_bf16(x[2 * k + 1]) << 16;
  if (n % 2) out[n / 2] = to_bf16(x[n - 1]);
}

// sum + x * y in each lane, for both numbers of a pair. Without the instruction two products of float32 do it.
template <class Floats, class Pairs>
inline __attribute__((always_inline)) Floats add_products(Floats sum, Pairs x, Pairs y) {
#if defined(GLUON_BERT_HAS_BF16_DOT)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  const Pairs upper = 0xffff0000u - Pairs{};
  sum += (Floats)(x << 16) * (Floats)(y << 16);
  return sum + (Floats)(x & upper) * (Floats)(y & upper);
#endif
}

}  // namespace gluon_bert
