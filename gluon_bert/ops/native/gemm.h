// Products of small matrices on one thread, with sums in float32. Nothing here depends on layers or MXNet.
//
// One kernel computes a tile of kRows x kCols sums in registers. It reads its left side through two strides, so
// the left side may be transposed. Its right side lies in panels of kCols columns, packed or part of a larger
// matrix. The elements of both are float, or Bf16x2: two neighbouring terms of a sum in bfloat16.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "bf16.h"

namespace gluon_bert {

// The sums fill most registers: 12 of 16 with AVX2, 24 of 32 with AVX-512.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#else
constexpr int kLanes = 8, kRows = 6;
#endif
constexpr int kCols = 2 * kLanes;
// Terms of a sum that are added up in registers. A panel of kDepth rows fits the first cache.
constexpr int kDepth = 256;

template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(4 * kLanes)));
  typedef T Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
};
typedef Lanes<float>::Vector Vector;
typedef Lanes<float>::Unaligned Unaligned;

// Returns how many elements hold this many terms of a sum.
template <class T>
constexpr int elements(int terms);
template <>
constexpr int elements<float>(int terms) {
  return terms;
}
template <>
constexpr int elements<Bf16x2>(int terms) {
  return (terms + 1) / 2;
}

// The left side: element (i, k) is data[i * row + k * col].
template <class T>
struct Left {
  const T* data;
  long row, col;
};

// The right side: element (k, j) is data[(j / kCols) * panel + k * row + j % kCols]. The kernel reads past the
// last column, but those numbers do not change the result.
template <class T>
struct Right {
  const T* data;
  long row, panel;
};

// The sums begin with zero, with a bias for each column, or with what the result holds already.
enum class Start { kZero, kBias, kAdd };

constexpr int panels(int columns) { return (columns + kCols - 1) / kCols; }

// Returns the distance between two rows of this many floats, an odd number of cache lines. With an even number a
// column of a matrix would map to few sets of the cache.
constexpr long stride(long columns) { return ((columns + 15) / 16 | 1) * 16; }

inline __attribute__((always_inline)) Vector add_products(Vector sum, Vector x, Vector y) { return sum + x * y; }

template <int R, Start S, class T>
inline __attribute__((always_inline)) void kernel(
    int depth, const T* a, long row, long col, const T* b, long b_row, float* c, long ldc, const float* bias) {
  typedef typename Lanes<T>::Vector Elements;
  typedef typename Lanes<T>::Unaligned Loaded;
  Vector sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float* start = S == Start::kBias ? bias : c + r * ldc;
    sums[r][0] = S == Start::kZero ? Vector{} : *(const Unaligned*)start;
    sums[r][1] = S == Start::kZero ? Vector{} : *(const Unaligned*)(start + kLanes);
  }
  for (int k = 0; k < depth; ++k, a += col, b += b_row) {
    const Elements b0 = *(const Loaded*)b, b1 = *(const Loaded*)(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Elements x = a[r * row] - Elements{};
      sums[r][0] = add_products(sums[r][0], x, b0);
      sums[r][1] = add_products(sums[r][1], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    *(Unaligned*)(c + r * ldc) = sums[r][0];
    *(Unaligned*)(c + r * ldc + kLanes) = sums[r][1];
  }
}

// The kernel for the last rows, fewer than kRows.
template <int R, Start S, class T>
inline void last_rows(int rows, int depth, Left<T> a, const T* b, long b_row, float* c, long ldc, const float* bias) {
  if (rows == R)
    kernel<R, S>(depth, a.data, a.row, a.col, b, b_row, c, ldc, bias);
  else if constexpr (R > 1)
    last_rows<R - 1, S>(rows, depth, a, b, b_row, c, ldc, bias);
}

// A panel of the result that has all its columns.
template <Start S, class T>
void whole_panel(int rows, int depth, Left<T> a, const T* b, long b_row, float* c, long ldc, const float* bias) {
  int i = 0;
  for (; i + kRows <= rows; i += kRows)
    kernel<kRows, S>(depth, a.data + i * a.row, a.row, a.col, b, b_row, c + i * ldc, ldc, bias);
  if (i < rows)
    last_rows<kRows - 1, S, T>(rows - i, depth, {a.data + i * a.row, a.row, a.col}, b, b_row, c + i * ldc, ldc, bias);
}

// A panel of the result that has only some columns. Tiles are computed in a buffer and copied.
template <Start S, class T>
void part_of_panel(
    int rows, int columns, int depth, Left<T> a, const T* b, long b_row, float* c, long ldc, const float* bias) {
  float tile[kRows * kCols] = {};
  for (int i = 0; i < rows; i += kRows) {
    const int some = std::min(kRows, rows - i);
    for (int r = 0; r < some; ++r)
      for (int j = 0; j < columns; ++j)
        tile[r * kCols + j] = S == Start::kZero ? 0 : S == Start::kBias ? bias[j] : c[(i + r) * ldc + j];
    last_rows<kRows, Start::kAdd, T>(some, depth, {a.data + i * a.row, a.row, a.col}, b, b_row, tile, kCols, nullptr);
    for (int r = 0; r < some; ++r) std::copy_n(tile + r * kCols, columns, c + (i + r) * ldc);
  }
}

template <Start S, class T>
void one_panel(
    int rows, int columns, int depth, Left<T> a, const T* b, long b_row, float* c, long ldc, const float* bias) {
  if (columns >= kCols)
    whole_panel<S>(rows, depth, a, b, b_row, c, ldc, bias);
  else
    part_of_panel<S>(rows, columns, depth, a, b, b_row, c, ldc, bias);
}

// A sum of at most kDepth terms for each column of the result.
template <Start S, class T>
void add_block(
    int rows, int columns, int depth, Left<T> a, Right<T> b, float* c, long ldc, const float* bias) {
  for (int j = 0; j < columns; j += kCols)
    one_panel<S>(rows, columns - j, depth, a, b.data + j / kCols * b.panel, b.row, c + j, ldc,
                 S == Start::kBias ? bias + j : nullptr);
}

// c (rows x columns, row-major) = start + a (rows x depth) * b (depth x columns).
template <Start S>
void multiply(int rows, int columns, int depth, Left<float> a, Right<float> b, float* c, long ldc,
              const float* bias = nullptr) {
  for (int k = 0; k == 0 || k < depth; k += kDepth) {
    const int some = std::min(kDepth, depth - k);
    const Left<float> left{a.data + k * a.col, a.row, a.col};
    const Right<float> right{b.data + k * b.row, b.row, b.panel};
    if (k == 0)
      add_block<S>(rows, columns, some, left, right, c, ldc, bias);
    else
      add_block<Start::kAdd>(rows, columns, some, left, right, c, ldc, nullptr);
  }
}

// Packs a left side into pairs. Its rows or its columns must be contiguous.
inline Left<Bf16x2> pack_left(int rows, int depth, Left<float> a, Bf16x2* packed) {
  const int pairs = elements<Bf16x2>(depth);
  if (a.col == 1) {
    for (int i = 0; i < rows; ++i) pack_neighbours(a.data + i * a.row, depth, packed + i * pairs);
    return {packed, pairs, 1};
  }
  for (int k = 0; k < depth; k += 2) {
    const float* x = a.data + k * a.col;
    interleave_rows(x, k + 1 < depth ? x + a.col : nullptr, rows, packed + k / 2 * rows);
  }
  return {packed, 1, rows};
}

// The same in bfloat16. The left side is rounded here, as many rows at a time as fit a second cache.
template <Start S>
void multiply(int rows, int columns, int depth, Left<float> a, Right<Bf16x2> b, float* c, long ldc,
              const float* bias = nullptr) {
  constexpr int kSome = 240;
  alignas(64) Bf16x2 room[kSome * elements<Bf16x2>(kDepth)];
  for (int k = 0; k == 0 || k < depth; k += kDepth)
    for (int i = 0; i < rows; i += kSome) {
      const int some = std::min(kSome, rows - i), terms = std::min(kDepth, depth - k);
      const Left<Bf16x2> left = pack_left(some, terms, {a.data + i * a.row + k * a.col, a.row, a.col}, room);
      const Right<Bf16x2> right{b.data + elements<Bf16x2>(k) * b.row, b.row, b.panel};
      if (k == 0)
        add_block<S>(some, columns, elements<Bf16x2>(terms), left, right, c + i * ldc, ldc, bias);
      else
        add_block<Start::kAdd>(some, columns, elements<Bf16x2>(terms), left, right, c + i * ldc, ldc, nullptr);
    }
}

// Returns the elements of a packed right side.
template <class T>
constexpr long packed_size(int columns, int depth) {
  return (long)panels(columns) * kCols * elements<T>(depth);
}

// Packs panel p of a right side (depth x columns). row(k) points to its row k.
template <class Rows>
void pack_panel(Rows row, int depth, int columns, int p, float* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  float* out = packed + packed_size<float>(first, depth);
  for (int k = 0; k < depth; ++k, out += kCols) {
    std::copy_n(row(k) + first, some, out);
    std::fill(out + some, out + kCols, 0.f);
  }
}

template <class Rows>
void pack_panel(Rows row, int depth, int columns, int p, Bf16x2* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  Bf16x2* out = packed + packed_size<Bf16x2>(first, depth);
  for (int k = 0; k < depth; k += 2, out += kCols) {
    interleave_rows(row(k) + first, k + 1 < depth ? row(k + 1) + first : nullptr, some, out);
    std::fill(out + some, out + kCols, 0);
  }
}

// Packs panel p of a right side that is the transpose of a matrix (columns x depth).
template <class Rows>
void pack_panel_transposed(Rows row, int depth, int columns, int p, float* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  float* out = packed + packed_size<float>(first, depth);
  if (some < kCols) std::fill(out, out + packed_size<float>(kCols, depth), 0.f);
  for (int j = 0; j < some; ++j) {
    const float* x = row(first + j);
    for (int k = 0; k < depth; ++k) out[(long)k * kCols + j] = x[k];
  }
}

template <class Rows>
void pack_panel_transposed(Rows row, int depth, int columns, int p, Bf16x2* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  Bf16x2* out = packed + packed_size<Bf16x2>(first, depth);
  Bf16x2 pairs[elements<Bf16x2>(kDepth)];
  if (some < kCols) std::fill(out, out + packed_size<Bf16x2>(kCols, depth), 0);
  for (int k = 0; k < depth; k += kDepth, out += elements<Bf16x2>(kDepth) * kCols) {
    const int terms = std::min(kDepth, depth - k);
    for (int j = 0; j < some; ++j) {
      pack_neighbours(row(first + j) + k, terms, pairs);
      for (int i = 0; i < elements<Bf16x2>(terms); ++i) out[i * kCols + j] = pairs[i];
    }
  }
}

// Returns a function from a number to that row of a row-major matrix.
inline auto rows_of(const float* data, long ld) {
  return [=](int i) { return data + i * ld; };
}

template <class T>
Right<T> pack_transposed(const float* source, long ld, int depth, int columns, T* packed) {
  for (int p = 0; p < panels(columns); ++p) pack_panel_transposed(rows_of(source, ld), depth, columns, p, packed);
  return {packed, kCols, packed_size<T>(kCols, depth)};
}

template <class T>
Right<T> pack(const float* source, long ld, int depth, int columns, T* packed) {
  for (int p = 0; p < panels(columns); ++p) pack_panel(rows_of(source, ld), depth, columns, p, packed);
  return {packed, kCols, packed_size<T>(kCols, depth)};
}

// A row-major matrix as a right side: in place, or packed into pairs in `room`.
inline Right<float> right_side(const float* data, long ld, int, int, float*) { return {data, ld, kCols}; }
inline Right<Bf16x2> right_side(const float* data, long ld, int depth, int columns, Bf16x2* room) {
  return pack(data, ld, depth, columns, room);
}

// Returns the elements of that room.
template <class T>
constexpr long room_size(int columns, int depth) {
  return std::is_same<T, Bf16x2>::value ? packed_size<T>(columns, depth) : 0;
}

}  // namespace gluon_bert
