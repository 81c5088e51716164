// Operations on one row of numbers: LayerNorm, softmax, activations, dropout. One thread, float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gluon_bert {

// e^x to a few units in the last place. The compiler can vectorize loops over it.
inline float exponential(float x) {
  x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact
  float y = 1.f / 5040;
  y = y * r + 1.f / 720;
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = y * r * r + r + 1;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

enum class Activation { kRelu, kGelu, kGeluTanh };

// The normal distribution function, and its density times the root of 2 pi; Abramowitz and Stegun 1964,
// formula 7.1.26, whose error is below 1.5e-7.
inline float normal_cdf(float x, float* density) {
  const float z = std::fabs(x) * 0.70710678f, t = 1 / (1 + 0.3275911f * z);
  *density = exponential(-z * z);
  const float tail =
      ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t * *density;
  return x < 0 ? 0.5f * tail : 1 - 0.5f * tail;
}

// The factor of x in the approximation of GELU, (1 + tanh u) / 2, and the derivative of 2 u; Hendrycks and Gimpel
// 2016, section 2: u = root(2 / pi) * (x + 0.044715 x^3).
inline float gelu_tanh_gate(float x, float* slope) {
  const float twice_root = 1.59576912f, square = x * x;
  *slope = twice_root * (1 + 3 * 0.044715f * square);
  return 1 / (1 + exponential(-twice_root * x * (1 + 0.044715f * square)));
}

// out = activation(x); both of n floats.
inline void activate(Activation kind, const float* x, int n, float* out) {
  if (kind == Activation::kRelu) {
    for (int i = 0; i < n; ++i) out[i] = x[i] < 0 ? 0 : x[i];
  } else if (kind == Activation::kGeluTanh) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      float slope;
      out[i] = x[i] * gelu_tanh_gate(x[i], &slope);
    }
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      float density;
      out[i] = x[i] * normal_cdf(x[i], &density);
    }
  }
}

// The activation of the left side of a product (gemm.h).
struct Activated {
  static constexpr bool kInPlace = false;
  Activation kind;
  void operator()(const float* x, int n, float* out) const { activate(kind, x, n, out); }
};

// out *= activation'(x).
inline void activate_backward(Activation kind, const float* x, int n, float* out) {
  if (kind == Activation::kRelu) {
    for (int i = 0; i < n; ++i) out[i] = x[i] > 0 ? out[i] : 0;
  } else if (kind == Activation::kGeluTanh) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      float slope;
      const float share = gelu_tanh_gate(x[i], &slope);
      out[i] *= share + x[i] * share * (1 - share) * slope;
    }
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      float density;
      const float cdf = normal_cdf(x[i], &density);
      out[i] *= cdf + x[i] * density * 0.39894228f;
    }
  }
}

// Dropout by counters. Whether an element is kept depends on its number, the key of the call and the place in the
// network alone. So forward and backward agree without a stored mask, on any number of threads.
class Dropout {
 public:
  Dropout(float rate, uint64_t key, uint64_t place) : limit_((int32_t)(rate * (1 << 24))), scale_(1 / (1 - rate)) {
    // A step of splitmix64 (Steele et al. 2014) gives each place its own key.
    uint64_t z = key + (place + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    first_ = (uint32_t)z, second_ = (uint32_t)(z >> 32);
  }

  bool active() const { return limit_ > 0; }

  // The factor of element number `index`: 0, or 1 / (1 - rate).
  float factor(uint32_t index) const {
    uint32_t x = index ^ first_;
    x = (x ^ (x >> 16)) * 0x7feb352du;  // two multipliers of C. Wellons's lowbias32, then a third with a key
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = (x ^ (x >> 16) ^ second_) * 0x9E3779B1u;
    x ^= x >> 15;
    return (int32_t)(x >> 8) >= limit_ ? scale_ : 0.f;
  }

  // out = x * factors, for the elements from number `first` on.
  void apply(const float* x, int n, uint32_t first, float* out) const {
    if (!active()) {
      if (out != x) std::memcpy(out, x, n * sizeof(float));
      return;
    }
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = x[i] * factor(first + (uint32_t)i);
  }

 private:
  int32_t limit_;
  float scale_;
  uint32_t first_, second_;
};

inline void add(const float* x, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] += x[i];
}

// LayerNorm's scale and shift, each (C,).
struct Norm {
  const float *gamma, *beta;
};

// Mean and 1 / standard deviation of a row.
struct Statistics {
  float mean, inverse;
};

inline Statistics statistics(const float* x, int n, float epsilon) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += x[i];
  const float mean = sum / n;
#pragma omp simd reduction(+ : squares)
  for (int i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1 / std::sqrt(squares / n + epsilon)};
}

// out = (x - mean) * inverse * gamma + beta.
inline void normalize(const float* x, int n, Statistics s, Norm norm, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = (x[i] - s.mean) * s.inverse * norm.gamma[i] + norm.beta[i];
}

// The gradient of x from that of LayerNorm's result, which may be the same array; adds to those of gamma, beta.
inline void normalize_backward(
    const float* x, const float* gradient, int n, Statistics s, Norm norm, float* out, float* gamma, float* beta) {
  float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int i = 0; i < n; ++i) {
    const float centred = (x[i] - s.mean) * s.inverse, scaled = gradient[i] * norm.gamma[i];
    gamma[i] += gradient[i] * centred;
    beta[i] += gradient[i];
    sum += scaled;
    product += scaled * centred;
  }
  sum /= n, product /= n;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float centred = (x[i] - s.mean) * s.inverse;
    out[i] = s.inverse * (gradient[i] * norm.gamma[i] - sum - centred * product);
  }
}

inline float row_max(const float* x, int n) {
  float best = x[0];
#pragma omp simd reduction(max : best)
  for (int i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// x = softmax(scale * x).
inline void softmax(float* x, int n, float scale) {
  const float most = row_max(x, n);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    x[i] = exponential(scale * (x[i] - most));
    sum += x[i];
  }
  const float inverse = 1 / sum;
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] *= inverse;
}

// gradient = probabilities * (gradient - its mean under the probabilities) * scale.
inline void softmax_backward(const float* probabilities, int n, float scale, float* gradient) {
  float mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int i = 0; i < n; ++i) mean += probabilities[i] * gradient[i];
#pragma omp simd
  for (int i = 0; i < n; ++i) gradient[i] = probabilities[i] * (gradient[i] - mean) * scale;
}

}  // namespace gluon_bert
