// Products of small matrices on one thread, sums in float32. Knows nothing of threads, layers or MXNet.
//
// One kernel computes a tile of kRows x kCols sums in registers. Its left side is read through two strides, so
// it may be transposed; its right side lies in panels of kCols columns, packed or part of a larger matrix. The
// elements of both are float, or a Pair of neighbouring terms in bfloat16: half as many of half the bytes a term.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "bf16.h"

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

template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(4 * kLanes)));
  typedef T Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
};
typedef Lanes<float>::Vector Vector;
typedef Lanes<float>::Unaligned Unaligned;

// How many elements hold so many terms of a sum.
template <class T>
constexpr int elements(int terms);
template <>
constexpr int elements<float>(int terms) {
  return terms;
}
template <>
constexpr int elements<Pair>(int terms) {
  return (terms + 1) / 2;
}

// The left side: element (i, k) is data[i * row + k * col].
template <class T>
struct Left {
  const T* data;
  long row, col;
};

// The right side: element (k, j) is data[(j / kCols) * panel + k * row + j % kCols]. What stands beyond the
// last column is read, and changes nothing.
template <class T>
struct Right {
  const T* data;
  long row, panel;
};

// What the sums begin with: zero, a bias for each column, or what the result holds already.
enum class Start { kZero, kBias, kAdd };

constexpr int panels(int columns) { return (columns + kCols - 1) / kCols; }

// The distance of two rows of so many floats: an odd number of cache lines, or a column of a matrix would fall
// on a few lines of the cache that throw each other out.
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

// A panel of the result, all its columns there to be written.
template <Start S, class T>
void whole_panel(int rows, int depth, Left<T> a, const T* b, long b_row, float* c, long ldc, const float* bias) {
  int i = 0;
  for (; i + kRows <= rows; i += kRows)
    kernel<kRows, S>(depth, a.data + i * a.row, a.row, a.col, b, b_row, c + i * ldc, ldc, bias);
  if (i < rows)
    last_rows<kRows - 1, S, T>(rows - i, depth, {a.data + i * a.row, a.row, a.col}, b, b_row, c + i * ldc, ldc, bias);
}

// A panel of which only some columns exist: computed aside, tile by tile.
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

// A left side in pairs; a row or a column of it must lie in one piece.
inline Left<Pair> pack_left(int rows, int depth, Left<float> a, Pair* packed) {
  const int pairs = elements<Pair>(depth);
  if (a.col == 1) {
    for (int i = 0; i < rows; ++i) pair_neighbours(a.data + i * a.row, depth, packed + i * pairs);
    return {packed, pairs, 1};
  }
  for (int k = 0; k < depth; k += 2) {
    const float* x = a.data + k * a.col;
    pair_up(x, k + 1 < depth ? x + a.col : nullptr, rows, packed + k / 2 * rows);
  }
  return {packed, 1, rows};
}

// The same in bfloat16: the left side is rounded here, some rows at a time, which a second cache holds.
template <Start S>
void multiply(int rows, int columns, int depth, Left<float> a, Right<Pair> b, float* c, long ldc,
              const float* bias = nullptr) {
  constexpr int kSome = 240;
  alignas(64) Pair room[kSome * elements<Pair>(kDepth)];
  for (int k = 0; k == 0 || k < depth; k += kDepth)
    for (int i = 0; i < rows; i += kSome) {
      const int some = std::min(kSome, rows - i), terms = std::min(kDepth, depth - k);
      const Left<Pair> left = pack_left(some, terms, {a.data + i * a.row + k * a.col, a.row, a.col}, room);
      const Right<Pair> right{b.data + elements<Pair>(k) * b.row, b.row, b.panel};
      if (k == 0)
        add_block<S>(some, columns, elements<Pair>(terms), left, right, c + i * ldc, ldc, bias);
      else
        add_block<Start::kAdd>(some, columns, elements<Pair>(terms), left, right, c + i * ldc, ldc, nullptr);
    }
}

// The elements of a packed right side.
template <class T>
constexpr long packed_size(int columns, int depth) {
  return (long)panels(columns) * kCols * elements<T>(depth);
}

// Panel p of a packed right side (depth x columns), from rows that lie where row(k) says.
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
void pack_panel(Rows row, int depth, int columns, int p, Pair* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  Pair* out = packed + packed_size<Pair>(first, depth);
  for (int k = 0; k < depth; k += 2, out += kCols) {
    pair_up(row(k) + first, k + 1 < depth ? row(k + 1) + first : nullptr, some, out);
    std::fill(out + some, out + kCols, 0);
  }
}

// Panel p of a packed right side that is the transpose of a matrix (columns x depth) with such rows.
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
void pack_panel_transposed(Rows row, int depth, int columns, int p, Pair* packed) {
  const int first = p * kCols, some = std::min(kCols, columns - first);
  Pair* out = packed + packed_size<Pair>(first, depth);
  Pair pairs[elements<Pair>(kDepth)];
  if (some < kCols) std::fill(out, out + packed_size<Pair>(kCols, depth), 0);
  for (int k = 0; k < depth; k += kDepth, out += elements<Pair>(kDepth) * kCols) {
    const int terms = std::min(kDepth, depth - k);
    for (int j = 0; j < some; ++j) {
      pair_neighbours(row(first + j) + k, terms, pairs);
      for (int i = 0; i < elements<Pair>(terms); ++i) out[i * kCols + j] = pairs[i];
    }
  }
}

// What says where the rows of a row-major matrix lie.
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

// Columns of a row-major matrix as a right side: in place, or as pairs, which want room.
inline Right<float> right_side(const float* data, long ld, int, int, float*) { return {data, ld, kCols}; }
inline Right<Pair> right_side(const float* data, long ld, int depth, int columns, Pair* room) {
  return pack(data, ld, depth, columns, room);
}

// The elements of that room.
template <class T>
constexpr long room_size(int columns, int depth) {
  return std::is_same<T, Pair>::value ? packed_size<T>(columns, depth) : 0;
}

}  // namespace gluon_bert
