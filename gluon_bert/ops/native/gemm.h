// Products of small matrices on one thread, with sums in float32. Nothing here depends on layers or MXNet.
//
// One kernel computes a tile of kRows x kCols sums in registers. It reads its left side through two strides, so
// the left side may be transposed. Its right side lies in panels of kCols columns, packed or part of a larger
// matrix. The elements of both are float, or Bf16x2: two neighbouring terms of a sum in bfloat16.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "bf16.h"

namespace gluon_bert {

// The sums fill most registers: 12 of 16 with AVX2, 24 of 32 with AVX-512.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#else
constexpr int kLanes = 8, kRows = 6;
#endif
constexpr int kCols = 2 * kLanes;
// A block of the left side: at most this many rows, and elements of a row. It fits the second cache.
constexpr int kBlockRows = 240, kBlockDepth = 384;

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

// Returns how many terms of a sum this many elements hold.
template <class T>
constexpr int terms(int elements) {
  return std::is_same<T, Bf16x2>::value ? 2 * elements : elements;
}

// Returns how many of `all` a part gets if they are divided evenly into parts of at most `most`.
constexpr int even_part(int all, int most) {
  const int parts = std::max(1, (all + most - 1) / most);
  return std::max(1, (all + parts - 1) / parts);
}

// The left side, in tiles of kRows rows: element (i, k) is data[i / kRows * tile + i % kRows * row + k * col].
template <class T>
struct Left {
  const T* data;
  long row, col, tile;
  // A matrix as it is, or its transpose.
  Left(const T* data, long row, long col) : Left(data, row, col, kRows * row) {}
  Left(const T* data, long row, long col, long tile) : data(data), row(row), col(col), tile(tile) {}
};

// The right side, in panels of kCols columns: element (k, j) is data[j / kCols * panel + k * row + j % kCols]. The
// kernel reads past the last column, but those numbers do not change the result.
template <class T>
struct Right {
  const T* data;
  long row, panel;
};

constexpr int panels(int columns) { return (columns + kCols - 1) / kCols; }

// Returns the distance between two rows of this many floats, an odd number of cache lines. With an even number a
// column of a matrix would map to few sets of the cache.
constexpr long stride(long columns) { return ((columns + 15) / 16 | 1) * 16; }

inline __attribute__((always_inline)) Vector add_products(Vector sum, Vector x, Vector y) { return sum + x * y; }

// How the result begins: with zero, with `bias` for each column, or with what it holds already.
struct Start {
  bool add;
  const float* bias;
  Start of_columns(int first) const { return {add, bias ? bias + first : nullptr}; }
};
constexpr Start kZero{false, nullptr}, kAdd{true, nullptr};
constexpr Start with_bias(const float* bias) { return {false, bias}; }

// A tile of R x kCols sums. While it is computed, its part of the result comes into the cache.
template <int R, class T>
__attribute__((noinline)) void kernel(
    int depth, const T* a, long row, long col, const T* b, long b_row, Start start, float* c, long ldc) {
  typedef typename Lanes<T>::Vector Elements;
  typedef typename Lanes<T>::Unaligned Loaded;
  Vector sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    sums[r][0] = sums[r][1] = Vector{};
    __builtin_prefetch(c + r * ldc, 1);
    __builtin_prefetch(c + r * ldc + kCols - 1, 1);
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
  if (start.add || start.bias) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float* from = start.add ? c + r * ldc : start.bias;
      sums[r][0] += *(const Unaligned*)from;
      sums[r][1] += *(const Unaligned*)(from + kLanes);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    *(Unaligned*)(c + r * ldc) = sums[r][0];
    *(Unaligned*)(c + r * ldc + kLanes) = sums[r][1];
  }
}

// The kernel for R rows or fewer.
template <int R, class T>
inline void tile_of_rows(int rows, int depth, Left<T> a, const T* b, long b_row, Start start, float* c, long ldc) {
  if (rows == R)
    kernel<R>(depth, a.data, a.row, a.col, b, b_row, start, c, ldc);
  else if constexpr (R > 1)
    tile_of_rows<R - 1>(rows, depth, a, b, b_row, start, c, ldc);
}

// A panel of the result that has only some columns. Tiles are computed in a buffer and copied.
template <class T>
void part_of_panel(
    int rows, int columns, int depth, Left<T> a, const T* b, long b_row, Start start, float* c, long ldc) {
  float tile[kRows * kCols] = {};
  for (; rows > 0; rows -= kRows, a.data += a.tile, c += kRows * ldc) {
    const int some = std::min(kRows, rows);
    for (int r = 0; r < some; ++r)
      for (int j = 0; j < columns; ++j)
        tile[r * kCols + j] = start.add ? c[r * ldc + j] : start.bias ? start.bias[j] : 0;
    tile_of_rows<kRows>(some, depth, a, b, b_row, kAdd, tile, kCols);
    for (int r = 0; r < some; ++r) std::copy_n(tile + r * kCols, columns, c + r * ldc);
  }
}

// All panels of the result of a block.
template <class T>
void multiply_block(int rows, int columns, int depth, Left<T> a, Right<T> b, Start start, float* c, long ldc) {
  for (int j = 0; j < columns; j += kCols, b.data += b.panel) {
    const Start here = start.of_columns(j);
    if (columns - j < kCols)
      part_of_panel(rows, columns - j, depth, a, b.data, b.row, here, c + j, ldc);
    else
      for (int i = 0; i < rows; i += kRows)
        tile_of_rows<kRows>(std::min(kRows, rows - i), depth, Left<T>{a.data + i / kRows * a.tile, a.row, a.col},
                            b.data, b.row, here, c + i * ldc + j, ldc);
  }
}

// The distance between two tiles of a packed block.
constexpr long kTileSize = kRows * stride(kBlockDepth);
template <class T>
using PackedBlock = T[kBlockRows / kRows * kTileSize];

// Spreads a row of a transposed block over the tiles.
template <class T>
void copy_to_tiles(const T* x, int rows, T* packed) {
  for (; rows >= kRows; rows -= kRows, x += kRows, packed += kTileSize) std::copy_n(x, kRows, packed);
  std::copy_n(x, rows, packed);
}

// What becomes of a contiguous part of the left side's rows on its way into a product: here nothing. A class in its
// place computes n numbers into `out`.
struct AsIs {
  static constexpr bool kInPlace = true;
  void operator()(const float* x, int n, float* out) const { std::copy_n(x, n, out); }
};

// Packs a block of the left side into tiles whose rows or columns are contiguous.
template <class Change>
Left<Bf16x2> pack_left(int rows, int depth, Left<float> a, Change change, Bf16x2* packed) {
  const int pairs = elements<Bf16x2>(depth);
  if (a.col == 1) {
    float changed[2 * kBlockDepth];
    for (int i = 0; i < rows; ++i) {
      const float* x = a.data + i * a.row;
      if (!Change::kInPlace) change(x, depth, changed);
      pack_neighbours(Change::kInPlace ? x : changed, depth, packed + i * pairs);
    }
    return {packed, pairs, 1};
  }
  Bf16x2 row[kBlockRows];
  for (int k = 0; k < pairs; ++k) {
    const float* x = a.data + 2 * k * a.col;
    interleave_rows(x, 2 * k + 1 < depth ? x + a.col : nullptr, rows, row);
    copy_to_tiles(row, rows, packed + k * kRows);
  }
  return {packed, 1, kRows, kTileSize};
}

// The same in float32. Contiguous rows stay where they are if they are an odd number of cache lines apart.
template <class Change>
Left<float> pack_left(int rows, int depth, Left<float> a, Change change, float* packed) {
  if (Change::kInPlace && a.col == 1 && a.row / 16 % 2) return a;
  if (a.col == 1) {
    for (int i = 0; i < rows; ++i) change(a.data + i * a.row, depth, packed + i * stride(kBlockDepth));
    return {packed, stride(kBlockDepth), 1};
  }
  for (int k = 0; k < depth; ++k) copy_to_tiles(a.data + k * a.col, rows, packed + k * kRows);
  return {packed, 1, kRows, kTileSize};
}

// c (rows x columns, row-major) = start + a (rows x depth) * b (depth x columns). The rows or the columns of a are
// contiguous. `change` is for contiguous rows alone. A block of the left side stays in the second cache, while panel
// after panel of the right side passes through the first one.
template <class T, class Change = AsIs>
void multiply(int rows, int columns, int depth, Left<float> a, Right<T> b, Start start, float* c, long ldc,
              Change change = {}) {
  alignas(64) PackedBlock<T> room;
  const int most_terms = terms<T>(even_part(elements<T>(depth), kBlockDepth));
  const int most_rows = kRows * even_part((rows + kRows - 1) / kRows, kBlockRows / kRows);
  for (int i = 0; i < rows; i += most_rows)
    for (int k = 0; k == 0 || k < depth; k += most_terms) {
      const int some = std::min(most_rows, rows - i), deep = std::min(most_terms, depth - k);
      const Left<T> left = pack_left(some, deep, {a.data + i * a.row + k * a.col, a.row, a.col}, change, room);
      const Right<T> right{b.data + elements<T>(k) * b.row, b.row, b.panel};
      multiply_block(some, columns, elements<T>(deep), left, right, k ? kAdd : start, c + i * ldc, ldc);
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

// Turns terms of a sum into elements.
inline void to_elements(const float* x, int terms, float* out) { std::copy_n(x, terms, out); }
inline void to_elements(const float* x, int terms, Bf16x2* out) { pack_neighbours(x, terms, out); }

// Exchanges two blocks of H x H elements across the diagonal of each block of 2 H x 2 H, in kLanes rows.
template <int H, class V, int... J>
inline __attribute__((always_inline)) void exchange_blocks(V* rows, std::integer_sequence<int, J...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & H) continue;
    const V x = rows[i], y = rows[i + H];
#if defined(__clang__)
    rows[i] = __builtin_shufflevector(x, y, (J & H ? kLanes + J - H : J)...);
    rows[i + H] = __builtin_shufflevector(x, y, (J & H ? kLanes + J : J + H)...);
#else
    typedef Lanes<int>::Vector Numbers;
    rows[i] = __builtin_shuffle(x, y, Numbers{(J & H ? kLanes + J - H : J)...});
    rows[i + H] = __builtin_shuffle(x, y, Numbers{(J & H ? kLanes + J : J + H)...});
#endif
  }
}

// Transposes kLanes x kLanes elements. `some` rows of the result are stored.
template <class T>
inline void transpose_tile(const T* x, long ld, int some, T* out, long ld_out) {
  typename Lanes<T>::Vector rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = *(const typename Lanes<T>::Unaligned*)(x + i * ld);
  const std::make_integer_sequence<int, kLanes> columns;
  if constexpr (kLanes > 8) exchange_blocks<8>(rows, columns);
  exchange_blocks<4>(rows, columns);
  exchange_blocks<2>(rows, columns);
  exchange_blocks<1>(rows, columns);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (i < some) *(typename Lanes<T>::Unaligned*)(out + i * ld_out) = rows[i];
}

// Packs panel p of a right side that is the transpose of a matrix (columns x depth). A strip of the panel's rows
// stays in the first cache while it is transposed.
template <class T, class Rows>
void pack_panel_transposed(Rows row, int depth, int columns, int p, T* packed) {
  constexpr int kStrip = 64;
  const int first = p * kCols, some = std::min(kCols, columns - first), all = elements<T>(depth);
  T* out = packed + packed_size<T>(first, depth);
  T strip[kCols * kStrip] = {};
  for (int k = 0; k < all; k += kStrip, out += kStrip * kCols) {
    const int deep = std::min(kStrip, all - k);
    for (int j = 0; j < some; ++j)
      to_elements(row(first + j) + terms<T>(k), std::min(terms<T>(kStrip), depth - terms<T>(k)), strip + j * kStrip);
    for (int j = 0; j < kCols; j += kLanes)
      for (int i = 0; i < deep; i += kLanes)
        transpose_tile(strip + j * kStrip + i, kStrip, deep - i, out + i * kCols + j, kCols);
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
