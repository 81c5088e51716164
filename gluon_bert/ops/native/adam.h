// Adam's step of one parameter, in a single pass over its weights, gradient and means.
#pragma once

#include <omp.h>

#include <cmath>

namespace gluon_bert {

// rate, decay: of the step and of the weight. correction: the factor of the mean. scale: the factor of the gradient.
struct AdamStep {
  float rate, correction, beta1, beta2, epsilon, decay, scale;
};

// mean = beta1 * mean + (1 - beta1) * g and variance = beta2 * variance + (1 - beta2) * g^2, where g = scale *
// gradient; then weight -= rate * (correction * mean / (sqrt(variance) + epsilon) + decay * weight).
inline void adam_step(const AdamStep& s, long count, const float* gradient, float* weight, float* mean,
                      float* variance) {
  const float first = 1 - s.beta1, second = 1 - s.beta2;
#pragma omp parallel for simd schedule(static) if (count > 1 << 14)
  for (long i = 0; i < count; ++i) {
    const float g = s.scale * gradient[i];
    const float m = s.beta1 * mean[i] + first * g, v = s.beta2 * variance[i] + second * g * g;
    mean[i] = m, variance[i] = v;
    weight[i] -= s.rate * (s.correction * m / (std::sqrt(v) + s.epsilon) + s.decay * weight[i]);
  }
}

}  // namespace gluon_bert
