/* libcublas.so.11: matrix products are checked to lie within their allocations, and counted. */
#include "gpusim.h"

#include <stdlib.h>

typedef struct {
  Stream *stream;
  int device, pointer_mode, math_mode;
} Handle;

enum { NOT_INITIALIZED = 1, BLAS_INVALID_VALUE = 7, EXECUTION_FAILED = 13, BLAS_NOT_SUPPORTED = 15 };

int cublasCreate_v2(Handle **handle) {
  if (!gpusim_device_count()) return NOT_INITIALIZED;
  *handle = calloc(1, sizeof(Handle));
  (*handle)->device = gpusim_device();
  return OK;
}

int cublasDestroy_v2(Handle *handle) {
  free(handle);
  return OK;
}

int cublasSetStream_v2(Handle *handle, Stream *s) {
  handle->stream = s;
  return OK;
}

int cublasSetPointerMode_v2(Handle *handle, int mode) {
  handle->pointer_mode = mode;
  return OK;
}

int cublasGetMathMode(Handle *handle, int *mode) {
  *mode = handle->math_mode;
  return OK;
}

int cublasSetMathMode(Handle *handle, int mode) {
  handle->math_mode = mode;
  return OK;
}

/* The size of one value of a cudaDataType. */
static size_t bytes_of(int type) {
  switch (type) {
    case 0: return 4;  /* CUDA_R_32F */
    case 1: return 8;  /* CUDA_R_64F */
    case 2: return 2;  /* CUDA_R_16F */
    case 14: return 2; /* CUDA_R_16BF */
    case 3: return 1;  /* CUDA_R_8I */
    case 10: return 4; /* CUDA_R_32I */
    default: gpusim_fault("cublas: type %d is not simulated", type); return 1;
  }
}

/* Check `batch` matrices. A column has `leading` values, and the first `rows` are used. */
static int in_memory(const char *who, const char *what, const void *p, int rows, int columns, int leading,
                     long long stride, int batch, size_t bytes, int device) {
  if (!rows || !columns || !batch) return 1;
  if (leading < rows) {
    gpusim_fault("%s: %s has columns of %d values and uses %d", who, what, leading, rows);
    return 0;
  }
  size_t values = (size_t)stride * (batch - 1) + (size_t)leading * (columns - 1) + rows;
  return gpusim_check(who, what, p, values * bytes, device);
}

static int product(const char *who, Handle *h, int ta, int tb, int m, int n, int k, const void *a, int type_a, int lda,
                   long long stride_a, const void *b, int type_b, int ldb, long long stride_b, void *c, int type_c,
                   int ldc, long long stride_c, int batch, int compute) {
  int device = gpusim_stream_device(h->stream);
  if (device != h->device) gpusim_fault("%s: the handle is of device %d, its stream of %d", who, h->device, device);
  if (m < 0 || n < 0 || k < 0 || batch < 0) {
    gpusim_fault("%s: m %d, n %d, k %d, %d matrices", who, m, n, k, batch);
    return BLAS_INVALID_VALUE;
  }
  int good = in_memory(who, "A", a, ta ? k : m, ta ? m : k, lda, stride_a, batch, bytes_of(type_a), device) &
             in_memory(who, "B", b, tb ? n : k, tb ? k : n, ldb, stride_b, batch, bytes_of(type_b), device) &
             in_memory(who, "C", c, m, n, ldc, stride_c, batch, bytes_of(type_c), device);
  if (!good) return EXECUTION_FAILED;
  gpusim_event("gemm %d %s %d%d %d %d %d x%d types %d %d %d compute %d math %d", device, who, ta, tb, m, n, k, batch,
               type_a, type_b, type_c, compute, h->math_mode);
  gpusim_launched(who, h->stream);
  return OK;
}

#define GEMM(NAME, TYPE, CODE)                                                                                      \
  int NAME(Handle *h, int ta, int tb, int m, int n, int k, const TYPE *alpha, const TYPE *a, int lda, const TYPE *b, \
           int ldb, const TYPE *beta, TYPE *c, int ldc) {                                                           \
    (void)alpha, (void)beta;                                                                                        \
    return product(#NAME, h, ta, tb, m, n, k, a, CODE, lda, 0, b, CODE, ldb, 0, c, CODE, ldc, 0, 1, CODE);                \
  }
GEMM(cublasSgemm_v2, float, 0)
GEMM(cublasDgemm_v2, double, 1)

#define BATCHED(NAME, TYPE, CODE)                                                                                   \
  int NAME(Handle *h, int ta, int tb, int m, int n, int k, const TYPE *alpha, const TYPE *a, int lda,               \
           long long stride_a, const TYPE *b, int ldb, long long stride_b, const TYPE *beta, TYPE *c, int ldc,      \
           long long stride_c, int batch) {                                                                         \
    (void)alpha, (void)beta;                                                                                        \
    return product(#NAME, h, ta, tb, m, n, k, a, CODE, lda, stride_a, b, CODE, ldb, stride_b, c, CODE, ldc,         \
                   stride_c, batch, CODE);                                                                          \
  }
BATCHED(cublasSgemmStridedBatched, float, 0)
BATCHED(cublasDgemmStridedBatched, double, 1)
BATCHED(cublasHgemmStridedBatched, uint16_t, 2)

int cublasSgemmEx(Handle *h, int ta, int tb, int m, int n, int k, const float *alpha, const void *a, int type_a, int lda,
                  const void *b, int type_b, int ldb, const float *beta, void *c, int type_c, int ldc) {
  (void)alpha, (void)beta;
  return product("cublasSgemmEx", h, ta, tb, m, n, k, a, type_a, lda, 0, b, type_b, ldb, 0, c, type_c, ldc, 0, 1, 0);
}

int cublasGemmEx(Handle *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda,
                 const void *b, int type_b, int ldb, const void *beta, void *c, int type_c, int ldc, int compute,
                 int algorithm) {
  (void)alpha, (void)beta, (void)algorithm;
  return product("cublasGemmEx", h, ta, tb, m, n, k, a, type_a, lda, 0, b, type_b, ldb, 0, c, type_c, ldc, 0, 1, compute);
}

int cublasGemmStridedBatchedEx(Handle *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                               int type_a, int lda, long long stride_a, const void *b, int type_b, int ldb,
                               long long stride_b, const void *beta, void *c, int type_c, int ldc, long long stride_c,
                               int batch, int compute, int algorithm) {
  (void)alpha, (void)beta, (void)algorithm;
  return product("cublasGemmStridedBatchedEx", h, ta, tb, m, n, k, a, type_a, lda, stride_a, b, type_b, ldb, stride_b, c,
                 type_c, ldc, stride_c, batch, compute);
}

int cublasSdot_v2(Handle *h, int n, const float *x, int step_x, const float *y, int step_y, float *result) {
  int device = gpusim_stream_device(h->stream);
  (void)step_x, (void)step_y;
  if (!gpusim_check("cublasSdot", "x", x, 4 * (size_t)n, device) ||
      !gpusim_check("cublasSdot", "y", y, 4 * (size_t)n, device))
    return EXECUTION_FAILED;
  /* If the result is on the host, the caller waits for the device. */
  if (h->pointer_mode ? !gpusim_check("cublasSdot", "the result", result, 4, device) : gpusim_is_device(result) >= 0) {
    gpusim_fault("cublasSdot: the result is not where the pointer mode says");
    return EXECUTION_FAILED;
  }
  gpusim_event("dot %d result on the %s", n, h->pointer_mode ? "device" : "host");
  /* The host makes decisions from norms, so this result is finite whatever the arrays contain. */
  *result = 1e-6f * n;
  gpusim_launched("cublasSdot", h->stream);
  return OK;
}
