// Muon's step of many matrices, each on one thread: momentum, its orthogonal factor, and the weights.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer_pool.h"
#include "gemm.h"

namespace gluon_bert {

// rate, decay, momentum: of the step. scale: the factor of the gradients.
struct MuonStep {
  float rate, decay, momentum, scale;
};

struct MuonMatrix {
  int rows, columns;
  float* weight;
  const float* gradient;
  float* momentum;
  int smaller() const { return std::min(rows, columns); }
  int larger() const { return std::max(rows, columns); }
  double work() const { return (double)smaller() * smaller() * larger(); }
};

// Finds orthogonal factors by Newton-Schulz iterations: X becomes P X, where P = a I + b G + c G^2 and G = X X^T. A tall
// X becomes X P, where G = X^T X. G, P and their products are symmetric, so half of each is computed.
class Orthogonalizer {
 public:
  // Sets aside memory for any of these matrices.
  explicit Orthogonalizer(const std::vector<MuonMatrix>& matrices) {
    size_t all = 0, square = 0, packed = 0;
    for (const MuonMatrix& m : matrices) {
      all = std::max(all, m.rows * (size_t)stride(m.columns));
      square = std::max(square, padded(m.smaller()) * (size_t)stride(m.smaller()));
      if (m.rows <= m.columns) packed = std::max(packed, (size_t)packed_size<float>(m.rows, m.columns));
    }
    // Packed transposes are used up before the next X is written.
    for (PooledBuffer* one : {&x_, &next_}) *one = PooledBuffer(std::max(all, packed));
    for (PooledBuffer* one : {&gram_, &square_, &polynomial_, &factor_, &product_}) *one = PooledBuffer(square);
  }

  void step(const MuonStep& s, const MuonMatrix& m) {
    rows_ = m.rows, columns_ = m.columns, smaller_ = m.smaller(), larger_ = m.larger();
    ld_ = stride(columns_), ld_square_ = stride(smaller_);
    double norm = 0;
    for (int i = 0; i < rows_; ++i) {
      const float* gradient = m.gradient + (long)i * columns_;
      float *momentum = m.momentum + (long)i * columns_, *x = x_ + i * ld_;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < columns_; ++j) {
        const float g = s.scale * gradient[j];
        momentum[j] = s.momentum * momentum[j] + g;
        x[j] = g + s.momentum * momentum[j];
        sum += x[j] * x[j];
      }
      norm += sum;
    }
    orthogonalize((float)(1 / (std::sqrt(norm) + 1e-7)));
    const float keep = 1 - s.rate * s.decay, length = s.rate * 0.2f * std::sqrt((float)larger_);
    for (int i = 0; i < rows_; ++i) {
      float* weight = m.weight + (long)i * columns_;
      const float* x = x_ + i * ld_;
#pragma omp simd
      for (int j = 0; j < columns_; ++j) weight[j] = keep * weight[j] - length * x[j];
    }
  }

 private:
  // Coefficients of Jordan et al. 2024. Five iterations bring singular values to 0.7 to 1.2.
  static constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
  static constexpr int kIterations = 5;
  // Rows of a symmetric product that are computed together, up to the diagonal.
  static constexpr int kStrip = 4 * kRows;

  static long padded(long rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

  // x_ becomes the orthogonal factor of `scale` times itself.
  void orthogonalize(float scale) {
    for (long i = 0; i < rows_ * ld_; ++i) x_[i] *= scale;
    if (larger_ < 2 * smaller_) {
      for (int i = 0; i < kIterations; ++i) {
        compute_gram();
        compute_polynomial();
        apply(polynomial_);
      }
      return;
    }
    // The product of all iterations' P takes less time than X in each of them. G becomes P G P.
    compute_gram();
    compute_polynomial();
    std::copy_n(polynomial_.get(), smaller_ * ld_square_, factor_.get());
    for (int i = 1; i < kIterations; ++i) {
      update_gram();
      compute_polynomial();
      multiply_symmetric(polynomial_, factor_, product_);
      std::swap(factor_, product_);
    }
    apply(factor_);
  }

  bool tall() const { return rows_ > columns_; }

  void compute_gram() {
    const Right<float> right = tall() ? Right<float>{x_, ld_, kCols}
                                      : pack_transposed<float>(x_, ld_, columns_, rows_, next_);
    const Left<float> left = tall() ? Left<float>{x_, 1, ld_} : Left<float>{x_, ld_, 1};
    symmetric(left, right, larger_, gram_);
  }

  void compute_polynomial() {
    multiply_symmetric(gram_, gram_, square_);
    for (long i = 0; i < smaller_ * ld_square_; ++i) polynomial_[i] = kB * gram_[i] + kC * square_[i];
    for (int i = 0; i < smaller_; ++i) polynomial_[i * ld_square_ + i] += kA;
  }

  void update_gram() {
    multiply_symmetric(polynomial_, gram_, product_);
    multiply_symmetric(product_, polynomial_, gram_);
  }

  // The product of two symmetric matrices that is symmetric, too.
  void multiply_symmetric(const float* x, const float* y, float* out) const {
    symmetric({x, ld_square_, 1}, {y, ld_square_, kCols}, smaller_, out);
  }

  // The lower half of a product, and its mirror image.
  void symmetric(Left<float> left, Right<float> right, int depth, float* out) const {
    for (int i = 0; i < smaller_; i += kStrip) {
      const int some = std::min(kStrip, smaller_ - i), columns = std::min(smaller_, kCols * panels(i + some));
      multiply(some, columns, depth, {left.data + i * left.row, left.row, left.col}, right, kZero,
               out + i * ld_square_, ld_square_);
    }
    for (int i = 0; i < smaller_; i += kLanes)
      for (int j = i; j < smaller_; j += kLanes) {
        if (j > i) {
          transpose_tile(out + j * ld_square_ + i, ld_square_, kLanes, out + i * ld_square_ + j, ld_square_);
          continue;
        }
        for (int r = 1; r < std::min(kLanes, smaller_ - i); ++r)
          for (int c = 0; c < r; ++c) out[(i + c) * ld_square_ + i + r] = out[(i + r) * ld_square_ + i + c];
      }
  }

  // x_ becomes P X or X P.
  void apply(const float* p) {
    const Left<float> left{tall() ? x_ : p, tall() ? ld_ : ld_square_, 1};
    const Right<float> right{tall() ? p : x_, tall() ? ld_square_ : ld_, kCols};
    multiply(rows_, columns_, smaller_, left, right, kZero, next_, ld_);
    std::swap(x_, next_);
  }

  int rows_, columns_, smaller_, larger_;
  long ld_, ld_square_;
  PooledBuffer x_, next_, gram_, square_, polynomial_, factor_, product_;
};

// m = momentum * m + g and weight -= rate * (0.2 * sqrt(larger side) * O + decay * weight), where g = scale * gradient,
// and O is the orthogonal factor of g + momentum * m.
inline void muon_step(const MuonStep& s, std::vector<MuonMatrix> matrices) {
  // Those with most work first, so that the threads end together.
  std::stable_sort(matrices.begin(), matrices.end(),
                   [](const MuonMatrix& x, const MuonMatrix& y) { return x.work() > y.work(); });
  const int count = (int)matrices.size(), threads = std::max(1, std::min(omp_get_max_threads(), count));
  std::vector<Orthogonalizer> rooms;
  rooms.reserve(threads);
  for (int i = 0; i < threads; ++i) rooms.emplace_back(matrices);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int i = 0; i < count; ++i) rooms[omp_get_thread_num()].step(s, matrices[i]);
}

}  // namespace gluon_bert
