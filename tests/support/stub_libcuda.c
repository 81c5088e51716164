/* A stand-in for the NVIDIA driver's libcuda.so.1: enough to load the CUDA wheel, not to compute.

   -DCAPABILITIES='{8,6},{9,0},' gives it two GPUs of these compute capabilities; without, it has none.
   -DINIT=999 makes cuInit fail with this error; -DDRIVER_VERSION=9000 makes it a driver of CUDA 9.0, too old for CUDA 11.
   The functions are those that mxnet-cu112's libmxnet.so links to, and those that the CUDA runtime looks up to
   count the devices. Arguments of functions that only have to exist are left out. */

typedef int CUresult;
enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_FOUND = 500 };
enum { COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76 };

#ifndef CAPABILITIES
#define CAPABILITIES
#endif
#ifndef INIT
#define INIT (COUNT ? SUCCESS : NO_DEVICE)
#endif
#ifndef DRIVER_VERSION
#define DRIVER_VERSION 11020
#endif
static const int capabilities[][2] = {CAPABILITIES {-1, -1}};
#define COUNT ((int)(sizeof capabilities / sizeof capabilities[0]) - 1)

CUresult cuInit(unsigned flags) { (void)flags; return INIT; }
CUresult cuDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = COUNT; return SUCCESS; }
CUresult cuDeviceGet(int *device, int number) {
    if (number < 0 || number >= COUNT) return INVALID_DEVICE;
    *device = number;
    return SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device < 0 || device >= COUNT) return INVALID_DEVICE;
    if (attribute != COMPUTE_CAPABILITY_MAJOR && attribute != COMPUTE_CAPABILITY_MINOR) return INVALID_VALUE;
    *value = capabilities[device][attribute - COMPUTE_CAPABILITY_MAJOR];
    return SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) { (void)error; *text = "stub"; return SUCCESS; }

#define ABSENT(name, code) CUresult name(void) { return code; }
ABSENT(cuGetExportTable, NOT_FOUND)
ABSENT(cuGetProcAddress, NOT_FOUND)
ABSENT(cuDevicePrimaryCtxRetain, NO_DEVICE)
ABSENT(cuGraphKernelNodeGetParams, NO_DEVICE)
ABSENT(cuGraphNodeGetType, NO_DEVICE)
ABSENT(cuLaunchKernel, NO_DEVICE)
ABSENT(cuModuleGetFunction, NO_DEVICE)
ABSENT(cuModuleLoadData, NO_DEVICE)
ABSENT(cuModuleLoadDataEx, NO_DEVICE)
ABSENT(cuModuleUnload, NO_DEVICE)
