// Products of small matrices on one thread, float32. Knows nothing of threads, layers or MXNet.
//
// One kernel computes a tile of kRows x kCols sums in registers. Its left side is read through two strides, so
// it may be transposed; its right side lies in panels of kCols columns, packed or part of a larger matrix.
#pragma once

#include <algorithm>
#include <cstring>

namespace gluon_bert {

// As many sums as the registers hold: 12 of 16 with AVX2, 24 of 32 with AVX-512.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#else
constexpr int kLanes = 8, kRows = 6;
#endif
constexpr int kCols = 2 * kLanes;
// Terms of a sum that are added up in registers: a panel of so many rows stays in the first cache.
constexpr int kDepth = 256;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// The left side: element (i, k) is data[i * row + k * col].
struct Left {
  const float* data;
  long row, col;
};

// The right side: element (k, j) is data[(j / kCols) * panel + k * row + j % kCols]. What stands beyond the
// last column is read, and changes nothing.
struct Right {
  const float* data;
  long row, panel;
};

// What the sums begin with: zero, a bias for each column, or what the result holds already.
enum class Start { kZero, kBias, kAdd };

constexpr int panels(int columns) { return (columns + kCols - 1) / kCols; }

// The distance of two rows of so many floats: an odd number of cache lines, or a column of a matrix would fall
// on a few lines of the cache that throw each other out.
constexpr long stride(long columns) { return ((columns + 15) / 16 | 1) * 16; }

template <int R, Start S>
inline __attribute__((always_inline)) void kernel(
    int depth, const float* a, long row, long col, const float* b, long b_row, float* c, long ldc, const float* bias) {
  Vector sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float* start = S == Start::kBias ? bias : c + r * ldc;
    sums[r][0] = S == Start::kZero ? Vector{} : *(const Unaligned*)start;
    sums[r][1] = S == Start::kZero ? Vector{} : *(const Unaligned*)(start + kLanes);
  }
  for (int k = 0; k < depth; ++k, a += col, b += b_row) {
    const Vector b0 = *(const Unaligned*)b, b1 = *(const Unaligned*)(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector x = a[r * row] - Vector{};
      sums[r][0] += x * b0;
      sums[r][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    *(Unaligned*)(c + r * ldc) = sums[r][0];
    *(Unaligned*)(c + r * ldc + kLanes) = sums[r][1];
  }
}

// The kernel for the last rows, fewer than kRows.
template <int R, Start S>
inline void last_rows(int rows, int depth, Left a, const float* b, long b_row, float* c, long ldc, const float* bias) {
  if (rows == R)
    kernel<R, S>(depth, a.data, a.row, a.col, b, b_row, c, ldc, bias);
  else if constexpr (R > 1)
    last_rows<R - 1, S>(rows, depth, a, b, b_row, c, ldc, bias);
}

// A panel of the result, all its columns there to be written.
template <Start S>
void whole_panel(int rows, int depth, Left a, const float* b, long b_row, float* c, long ldc, const float* bias) {
  int i = 0;
  for (; i + kRows <= rows; i += kRows)
    kernel<kRows, S>(depth, a.data + i * a.row, a.row, a.col, b, b_row, c + i * ldc, ldc, bias);
  if (i < rows)
    last_rows<kRows - 1, S>(rows - i, depth, {a.data + i * a.row, a.row, a.col}, b, b_row, c + i * ldc, ldc, bias);
}

// A panel of which only some columns exist: computed aside, tile by tile.
template <Start S>
void part_of_panel(
    int rows, int columns, int depth, Left a, const float* b, long b_row, float* c, long ldc, const float* bias) {
  float tile[kRows * kCols] = {};
  for (int i = 0; i < rows; i += kRows) {
    const int some = std::min(kRows, rows - i);
    for (int r = 0; r < some; ++r)
      for (int j = 0; j < columns; ++j)
        tile[r * kCols + j] = S == Start::kZero ? 0 : S == Start::kBias ? bias[j] : c[(i + r) * ldc + j];
    last_rows<kRows, Start::kAdd>(some, depth, {a.data + i * a.row, a.row, a.col}, b, b_row, tile, kCols, nullptr);
    for (int r = 0; r < some; ++r) std::copy_n(tile + r * kCols, columns, c + (i + r) * ldc);
  }
}

template <Start S>
void one_panel(
    int rows, int columns, int depth, Left a, const float* b, long b_row, float* c, long ldc, const float* bias) {
  if (columns >= kCols)
    whole_panel<S>(rows, depth, a, b, b_row, c, ldc, bias);
  else
    part_of_panel<S>(rows, columns, depth, a, b, b_row, c, ldc, bias);
}

// c (rows x columns, row-major) = start + a (rows x depth) * b (depth x columns).
template <Start S>
void multiply(int rows, int columns, int depth, Left a, Right b, float* c, long ldc, const float* bias = nullptr) {
  for (int k = 0; k == 0 || k < depth; k += kDepth) {
    const int some = std::min(kDepth, depth - k);
    const Left left{a.data + k * a.col, a.row, a.col};
    for (int j = 0; j < columns; j += kCols) {
      const float* right = b.data + j / kCols * b.panel + k * b.row;
      const float* biases = S == Start::kBias ? bias + j : nullptr;
      if (k == 0)
        one_panel<S>(rows, columns - j, some, left, right, b.row, c + j, ldc, biases);
      else
        one_panel<Start::kAdd>(rows, columns - j, some, left, right, b.row, c + j, ldc, nullptr);
    }
  }
}

// Panel p of a packed right side, from a matrix (depth x columns, row-major).
inline void pack_panel(const float* source, long ld, int depth, int columns, int p, float* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  float* out = packed + (long)first * depth;
  for (int k = 0; k < depth; ++k, out += kCols) {
    std::copy_n(source + k * ld + first, some, out);
    std::fill(out + some, out + kCols, 0.f);
  }
}

// Panel p of a packed right side that is the transpose of a matrix (columns x depth, row-major).
inline void pack_panel_transposed(const float* source, long ld, int depth, int columns, int p, float* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  float* out = packed + (long)first * depth;
  if (some < kCols) std::fill(out, out + (long)depth * kCols, 0.f);
  for (int j = 0; j < some; ++j)
    for (int k = 0; k < depth; ++k) out[(long)k * kCols + j] = source[(first + j) * ld + k];
}

inline Right pack_transposed(const float* source, long ld, int depth, int columns, float* packed) {
  for (int p = 0; p < panels(columns); ++p) pack_panel_transposed(source, ld, depth, columns, p, packed);
  return {packed, kCols, (long)depth * kCols};
}

inline Right pack(const float* source, long ld, int depth, int columns, float* packed) {
  for (int p = 0; p < panels(columns); ++p) pack_panel(source, ld, depth, columns, p, packed);
  return {packed, kCols, (long)depth * kCols};
}

// Columns of a row-major matrix as a right side, in place.
inline Right in_place(const float* data, long ld) { return {data, ld, kCols}; }

}  // namespace gluon_bert
