/* libcuda.so.1: the calls of gluon_bert.devices, and of MXNet for kernels that it compiles from source. */
#include "gpusim.h"

#include <stdlib.h>
#include <string.h>

int gpusim_attribute(int *value, int attribute);

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : gpusim_device_count() ? OK : NO_DEVICE; }

int cuDriverGetVersion(int *version) {
  *version = (int)gpusim_number("GPUSIM_DRIVER", 11080);
  return OK;
}

int cuDeviceGetCount(int *count) {
  *count = gpusim_device_count();
  return OK;
}

int cuDeviceGet(int *device, int number) {
  *device = number;
  return number >= 0 && number < gpusim_device_count() ? OK : INVALID_DEVICE;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (device < 0 || device >= gpusim_device_count()) return INVALID_DEVICE;
  return gpusim_attribute(value, attribute);
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)(uintptr_t)(device + 1);
  return OK;
}

int cuGetErrorString(int code, const char **text) {
  *text = code == 222 ? "the provided PTX was compiled with an unsupported toolchain." : code ? "unknown error" : "no error";
  return OK;
}

/* A module is the text from NVRTC, and a function is its name. */
int cuModuleLoadData(void **module, const void *image) {
  int version;
  cuDriverGetVersion(&version);
  if (version < 11080) return 222; /* CUDA_ERROR_UNSUPPORTED_PTX_VERSION: NVRTC 11.8 writes PTX 7.8 */
  *module = strdup(image);
  return OK;
}

int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void *values) {
  (void)count, (void)options, (void)values;
  return cuModuleLoadData(module, image);
}

int cuModuleUnload(void *module) {
  free(module);
  return OK;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  if (!strstr(module, name)) {
    gpusim_fault("cuModuleGetFunction: %s does not exist", name);
    return 500;
  }
  *function = strdup(name);
  return OK;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream *s, void **arguments, void **extra) {
  (void)arguments, (void)extra;
  uint64_t threads = (uint64_t)bx * by * bz;
  if (!gx || !gy || !gz || !threads || threads > 1024 || gy > 65535 || gz > 65535 || shared > 49152) {
    gpusim_fault("%s: invalid configuration: grid %u %u %u, block %u %u %u", (char *)function, gx, gy, gz, bx, by, bz);
    return INVALID_VALUE;
  }
  if (gpusim_stream_device(s) != gpusim_device())
    gpusim_fault("%s: launched on a stream of another device than the current one", (char *)function);
  gpusim_launched(function, s);
  return OK;
}
