/* libcudnn.so.8: activations do nothing. Dropout keeps its random state as cuDNN does, in the memory that it gets, and
 * writes its draws to the log. */
#include "gpusim.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
  Stream *stream;
} Handle;

typedef struct {
  int type;
  size_t count;
} Tensor;

typedef struct {
  uint64_t seed, drawn;
} State;

typedef struct {
  float rate;
  State *state;
} Dropout;

enum { BAD_PARAM = 3 };

int cudnnCreate(Handle **handle) {
  *handle = calloc(1, sizeof(Handle));
  return OK;
}
int cudnnDestroy(Handle *handle) {
  free(handle);
  return OK;
}
int cudnnSetStream(Handle *handle, Stream *s) {
  handle->stream = s;
  return OK;
}
size_t cudnnGetVersion(void) { return 8101; }
const char *cudnnGetErrorString(int code) { return code ? "simulated cuDNN error" : "CUDNN_STATUS_SUCCESS"; }

#define DESCRIPTOR(NAME)                       \
  int cudnnCreate##NAME(void **descriptor) {   \
    *descriptor = calloc(1, 256);              \
    return OK;                                 \
  }                                            \
  int cudnnDestroy##NAME(void *descriptor) {   \
    free(descriptor);                          \
    return OK;                                 \
  }
DESCRIPTOR(TensorDescriptor)
DESCRIPTOR(ActivationDescriptor)
DESCRIPTOR(DropoutDescriptor)

int cudnnSetTensorNdDescriptor(Tensor *tensor, int type, int dimensions, const int *sizes, const int *strides) {
  (void)strides;
  tensor->type = type;
  tensor->count = 1;
  for (int i = 0; i < dimensions; i++) tensor->count *= sizes[i];
  return OK;
}

int cudnnSetTensor4dDescriptor(Tensor *tensor, int format, int type, int n, int c, int h, int w) {
  (void)format;
  tensor->type = type;
  tensor->count = (size_t)n * c * h * w;
  return OK;
}

static size_t bytes_of(const Tensor *tensor) {
  static const size_t sizes[] = {4, 8, 2, 1, 4}; /* float, double, half, int8, int32 */
  return tensor->count * (tensor->type < 5 ? sizes[tensor->type] : 1);
}

int cudnnSetActivationDescriptor(void *descriptor, int mode, int nan, double limit) {
  (void)descriptor, (void)mode, (void)nan, (void)limit;
  return OK;
}

int cudnnActivationForward(Handle *h, void *activation, const float *alpha, const Tensor *dx, const void *x,
                           const float *beta, const Tensor *dy, void *y) {
  (void)activation, (void)alpha, (void)beta;
  int device = gpusim_stream_device(h->stream);
  gpusim_check("cudnnActivationForward", "x", x, bytes_of(dx), device);
  gpusim_check("cudnnActivationForward", "y", y, bytes_of(dy), device);
  gpusim_launched("cudnnActivationForward", h->stream);
  return OK;
}

int cudnnActivationBackward(Handle *h) {
  gpusim_launched("cudnnActivationBackward", h->stream);
  return OK;
}

int cudnnDropoutGetStatesSize(Handle *h, size_t *size) {
  (void)h;
  *size = 2654208; /* an A100 with cuDNN 8, by its 108 multiprocessors */
  return OK;
}

int cudnnDropoutGetReserveSpaceSize(const Tensor *tensor, size_t *size) {
  *size = (tensor->count + 7) / 8;
  return OK;
}

int cudnnSetDropoutDescriptor(Dropout *dropout, Handle *h, float rate, State *states, size_t size,
                              unsigned long long seed) {
  int device = gpusim_stream_device(h->stream);
  if (!gpusim_check("cudnnSetDropoutDescriptor", "the states", states, size, device)) return BAD_PARAM;
  dropout->rate = rate;
  dropout->state = states;
  *states = (State){seed, 0};
  gpusim_event("dropout-set %d seed %llu state %p", device, seed, (void *)states);
  gpusim_launched("cudnnSetDropoutDescriptor", h->stream);
  return OK;
}

/* Restores the earlier state, so it does not use the seed. */
int cudnnRestoreDropoutDescriptor(Dropout *dropout, Handle *h, float rate, State *states, size_t size,
                                  unsigned long long seed) {
  int device = gpusim_stream_device(h->stream);
  if (!gpusim_check("cudnnRestoreDropoutDescriptor", "the states", states, size, device)) return BAD_PARAM;
  dropout->rate = rate;
  dropout->state = states;
  gpusim_event("dropout-restore %d seed %llu state %p", device, seed, (void *)states);
  return OK;
}

int cudnnDropoutForward(Handle *h, Dropout *dropout, const Tensor *dx, const void *x, const Tensor *dy, void *y,
                        void *reserve, size_t reserved) {
  int device = gpusim_stream_device(h->stream);
  gpusim_check("cudnnDropoutForward", "x", x, bytes_of(dx), device);
  gpusim_check("cudnnDropoutForward", "y", y, bytes_of(dy), device);
  gpusim_check("cudnnDropoutForward", "the mask", reserve, reserved, device);
  gpusim_event("dropout-forward %d state %p seed %llu from %llu count %zu", device, (void *)dropout->state,
               (unsigned long long)dropout->state->seed, (unsigned long long)dropout->state->drawn, dx->count);
  dropout->state->drawn += dx->count;
  gpusim_launched("cudnnDropoutForward", h->stream);
  return OK;
}

int cudnnDropoutBackward(Handle *h) {
  gpusim_launched("cudnnDropoutBackward", h->stream);
  return OK;
}

int cudnnSoftmaxForward(Handle *h) {
  gpusim_launched("cudnnSoftmaxForward", h->stream);
  return OK;
}
int cudnnSoftmaxBackward(Handle *h) {
  gpusim_launched("cudnnSoftmaxBackward", h->stream);
  return OK;
}
