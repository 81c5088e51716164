// Products of matrices as ctypes calls them: gemm.h by itself.
#include <vector>

#include "gemm.h"

using namespace gluon_bert;

namespace {

// out (rows x columns) = start + left * right, in place of start; left (rows x depth), right (depth x columns), each
// row-major or the transpose of what is.
template <class T>
void product(int rows, int columns, int depth, const float* left, bool left_transposed, const float* right,
             bool right_transposed, const float* bias, bool add, float* out) {
  std::vector<T> room(packed_size<T>(columns, depth));
  const Right<T> packed = right_transposed ? pack_transposed(right, depth, depth, columns, room.data())
                                           : pack(right, columns, depth, columns, room.data());
  const Left<float> a = left_transposed ? Left<float>{left, 1, rows} : Left<float>{left, depth, 1};
  if (add)
    multiply(rows, columns, depth, a, packed, kAdd, out, columns);
  else if (bias)
    multiply(rows, columns, depth, a, packed, with_bias(bias), out, columns);
  else
    multiply(rows, columns, depth, a, packed, kZero, out, columns);
}

}  // namespace

extern "C" void multiply_matrices(bool pairs, int rows, int columns, int depth, const float* left,
                                  bool left_transposed, const float* right, bool right_transposed,
                                  const float* bias, bool add, float* out) {
  (pairs ? product<Bf16x2> : product<float>)(rows, columns, depth, left, left_transposed, right, right_transposed,
                                           bias, add, out);
}

extern "C" void round_each(int count, const float* numbers, uint32_t* out) {
  for (int i = 0; i < count; ++i) out[i] = to_bf16(numbers[i]);
}
