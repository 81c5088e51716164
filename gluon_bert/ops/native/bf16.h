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

// Two neighbouring terms of a sum, the first in the lower half. The processor's instructions take numbers below
// the smallest normal one for 0.
typedef uint32_t Bf16x2;

// Rounds x to the nearest bfloat16, ties to even. NaN stays NaN.
inline uint32_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// out[j] = the pair x[j], y[j]; or x[j], 0 if y is null.
inline void interleave_rows(const float* x, const float* y, int n, Bf16x2* out) {
  int j = 0;
#if defined(GLUON_BERT_HAS_BF16_DOT)
  for (; y && j + 16 <= n; j += 16) {
    const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + j)));
    const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(y + j)));
    _mm512_storeu_si512(out + j, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
  }
#endif
  if (y) {
#pragma omp simd
    for (int i = j; i < n; ++i) out[i] = to_bf16(x[i]) | to_bf16(y[i]) << 16;
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = to_bf16(x[i]);
  }
}

// out[k] = the pair x[2 k], x[2 k + 1] of n numbers. If n is odd, the last pair ends with 0.
inline void pack_neighbours(const float* x, int n, Bf16x2* out) {
  int k = 0;
#if defined(GLUON_BERT_HAS_BF16_DOT)
  for (; k + 16 <= n / 2; k += 16) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 2 * k + 16), _mm512_loadu_ps(x + 2 * k));
    _mm512_storeu_si512(out + k, (__m512i)pairs);
  }
#endif
#pragma omp simd
  for (int i = k; i < n / 2; ++i) out[i] = to_bf16(x[2 * i]) | to_bf16(x[2 * i + 1]) << 16;
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
