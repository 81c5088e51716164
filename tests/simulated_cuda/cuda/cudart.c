/* libcudart.so.11.0: devices, memory, streams and events. Kernels are checked and counted, and do not run. */
#define _GNU_SOURCE
#include "gpusim.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPACE ((size_t)1 << 42) /* addresses of one device; so a pointer shows its device, and no address is used twice */
#define PAGE 4096UL
#define ROUND(n, to) (((n) + (to)-1) / (to) * (to))

typedef struct {
  char *start;
  size_t size;
  int live;
} Block;

typedef struct {
  long launches, h2d, d2h, d2d, p2p, main_syncs, main_d2h;
} Counts;

typedef struct {
  char *base, *next;
  size_t used, peak;
  Block *blocks; /* by address */
  size_t num_blocks, room;
  int peers[MAX_DEVICES];
  Counts counts;
  Stream *default_stream;
} Device;

struct Stream {
  int device;
};

typedef struct Kernel {
  const void *host;
  const char *name;
  int parsed, num_pointers, pointers[32];
  void (*computes)(void **arguments, Dim3 grid); /* of the few that run */
  enum { NOT_RANDOM, SEEDS, DRAWS } random;
  struct Kernel *next;
} Kernel;

static Device devices[MAX_DEVICES];
static int num_devices = -1, driver_version = 11080;
static size_t capacity;
static long fail_after, num_launched; /* 0: never */
static int broken;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, log_lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *log_file;
static __thread int current_device, last_error;
static long num_faults, num_missing;
#define BUCKETS (1 << 16)
static Kernel *kernels[BUCKETS];

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static int is_main_thread(void) { return syscall(SYS_gettid) == getpid(); }

double gpusim_number(const char *variable, double otherwise) {
  const char *text = getenv(variable);
  return text && *text ? atof(text) : otherwise;
}

static void begin(void) {
  pthread_mutex_lock(&lock);
  if (num_devices < 0) {
    int there = (int)gpusim_number("GPUSIM_DEVICES", 2), visible = there;
    const char *chosen = getenv("CUDA_VISIBLE_DEVICES");
    if (chosen) { /* all devices are alike, so only their number matters */
      visible = 0;
      char *copy = strdup(chosen), *rest = copy, *part;
      while ((part = strsep(&rest, ","))) {
        if (!*part || atoi(part) < 0 || atoi(part) >= there) break;
        visible++;
      }
      free(copy);
    }
    capacity = (size_t)gpusim_number("GPUSIM_MEMORY", 4e9);
    fail_after = (long)gpusim_number("GPUSIM_FAIL_AFTER", 0);
    driver_version = (int)gpusim_number("GPUSIM_DRIVER", 11080);
    const char *name = getenv("GPUSIM_LOG");
    if (name && *name) {
      char path[4096];
      snprintf(path, sizeof path, "%s.%d", name, getpid());
      log_file = fopen(path, "w");
      if (log_file) setvbuf(log_file, NULL, _IOLBF, 1 << 16); /* for processes that are killed */
    }
    for (int d = 0; d < visible; d++) {
      devices[d].base = devices[d].next =
          mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (devices[d].base == MAP_FAILED) abort();
      devices[d].default_stream = calloc(1, sizeof(Stream));
      devices[d].default_stream->device = d;
    }
    __atomic_store_n(&num_devices, visible, __ATOMIC_RELEASE);
  }
  pthread_mutex_unlock(&lock);
}

int gpusim_device_count(void) {
  if (__atomic_load_n(&num_devices, __ATOMIC_ACQUIRE) < 0) begin();
  return num_devices;
}

int gpusim_device(void) { return current_device; }
static Stream *stream_of(Stream *s) { return s ? s : devices[current_device].default_stream; }
int gpusim_stream_device(Stream *s) { return gpusim_device_count() ? stream_of(s)->device : 0; }
int gpusim_logging(void) { return log_file != NULL; }

void gpusim_event(const char *format, ...) {
  if (!log_file) return;
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&log_lock);
  fprintf(log_file, "%.6f %s ", now(), is_main_thread() ? "main" : "worker");
  vfprintf(log_file, format, arguments);
  fputc('\n', log_file);
  pthread_mutex_unlock(&log_lock);
  va_end(arguments);
}

void gpusim_fault(const char *format, ...) {
  static char told[64][512];
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  __atomic_add_fetch(&num_faults, 1, __ATOMIC_RELAXED);
  gpusim_event("FAULT %s", text);
  pthread_mutex_lock(&log_lock);
  int i = 0;
  while (i < 64 && told[i][0] && strncmp(told[i], text, 100)) i++;
  int fresh = i < 64 && !told[i][0];
  if (fresh) snprintf(told[i], sizeof told[i], "%s", text);
  pthread_mutex_unlock(&log_lock);
  if (fresh) fprintf(stderr, "GPUSIM FAULT: %s\n", text);
}

int gpusim_missing(const char *name, int code) {
  __atomic_add_fetch(&num_missing, 1, __ATOMIC_RELAXED);
  gpusim_fault("%s is not simulated", name);
  return code;
}

static int failed(int code) { return last_error = code; }

/* The error of a kernel shows at a later call, and stays: the context of the device is lost. */
static int is_broken(void) {
  if (fail_after && !broken && __atomic_load_n(&num_launched, __ATOMIC_RELAXED) > fail_after) broken = 1;
  return broken;
}

/* ---- memory ---- */

int gpusim_is_device(const void *p) {
  for (int d = 0; d < gpusim_device_count(); d++)
    if ((const char *)p >= devices[d].base && (const char *)p < devices[d].base + SPACE) return d;
  return -1;
}

static Block *block_of(Device *device, const char *p) {
  size_t low = 0, high = device->num_blocks;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (device->blocks[middle].start <= p) low = middle + 1;
    else high = middle;
  }
  Block *found = low ? &device->blocks[low - 1] : NULL;
  return found && p < found->start + found->size ? found : NULL;
}

int gpusim_check(const char *who, const char *what, const void *p, size_t size, int device) {
  if (!size) return 1;
  int owner = gpusim_is_device(p);
  if (owner < 0) {
    gpusim_fault("%s: %s is %s and not on device %d", who, what, p ? "on the host" : "NULL", device);
    return 0;
  }
  if (owner != device && !devices[device].peers[owner]) {
    gpusim_fault("%s: %s is on device %d and not on device %d", who, what, owner, device);
    return 0;
  }
  pthread_mutex_lock(&lock);
  Block *block = block_of(&devices[owner], p);
  const char *wrong = !block ? "nowhere" : !block->live ? "freed" : NULL;
  if (!wrong && (const char *)p + size > block->start + block->size) wrong = "too short";
  pthread_mutex_unlock(&lock);
  if (wrong) gpusim_fault("%s: %s on device %d is %s (%zu bytes asked)", who, what, owner, wrong, size);
  return !wrong;
}

int cudaMalloc(void **result, size_t size) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  Device *device = &devices[current_device];
  *result = NULL;
  if (!size) return OK;
  size_t whole = ROUND(size, PAGE);
  pthread_mutex_lock(&lock);
  if (device->used + whole > capacity) {
    pthread_mutex_unlock(&lock);
    gpusim_event("oom %d %zu of %zu used", current_device, size, device->used);
    return failed(OUT_OF_MEMORY);
  }
  if (device->next + whole + PAGE > device->base + SPACE) abort();
  char *start = device->next;
  device->next += whole + PAGE; /* one inaccessible page between two allocations */
  if (mprotect(start, whole, PROT_READ | PROT_WRITE)) {
    perror("gpusim: mprotect");
    abort();
  }
  if (device->num_blocks == device->room) {
    device->room = device->room ? 2 * device->room : 1024;
    device->blocks = realloc(device->blocks, device->room * sizeof(Block));
  }
  device->blocks[device->num_blocks++] = (Block){start, size, 1};
  device->used += whole;
  if (device->used > device->peak) device->peak = device->used;
  pthread_mutex_unlock(&lock);
  gpusim_event("malloc %d %zu", current_device, size);
  *result = start;
  return OK;
}

int cudaMallocPitch(void **result, size_t *pitch, size_t width, size_t height) {
  *pitch = ROUND(width, 512);
  return cudaMalloc(result, *pitch * height);
}

int cudaFree(void *p) {
  if (!p) return OK;
  int owner = gpusim_is_device(p);
  if (owner < 0) {
    gpusim_fault("cudaFree of host memory");
    return failed(INVALID_VALUE);
  }
  pthread_mutex_lock(&lock);
  Block *block = block_of(&devices[owner], p);
  int right = block && block->start == p && block->live;
  if (right) {
    size_t whole = ROUND(block->size, PAGE);
    block->live = 0;
    devices[owner].used -= whole;
    madvise(p, whole, MADV_DONTNEED);
    mprotect(p, whole, PROT_NONE); /* a later use kills the process */
  }
  pthread_mutex_unlock(&lock);
  if (!right) {
    gpusim_fault("cudaFree of what was not allocated, or freed before");
    return failed(INVALID_VALUE);
  }
  gpusim_event("free %d %zu", owner, block->size);
  return OK;
}

int cudaMemGetInfo(size_t *available, size_t *total) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  *total = capacity;
  *available = capacity - devices[current_device].used;
  return OK;
}

int cudaHostAlloc(void **result, size_t size, unsigned flags) {
  (void)flags;
  *result = aligned_alloc(PAGE, ROUND(size, PAGE));
  return *result ? OK : failed(OUT_OF_MEMORY);
}

int cudaFreeHost(void *p) {
  free(p);
  return OK;
}

/* ---- copies ---- */

static int copy(const char *who, void *to, const void *from, size_t size, int kind, Stream *s) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  if (!size) return OK;
  s = stream_of(s);
  int target = gpusim_is_device(to), source = gpusim_is_device(from);
  int found = target < 0 ? (source < 0 ? HOST_TO_HOST : DEVICE_TO_HOST)
                         : (source < 0 ? HOST_TO_DEVICE : DEVICE_TO_DEVICE);
  if (kind != ANY_DIRECTION && kind != found) {
    gpusim_fault("%s: the direction is %d, got %d", who, found, kind);
    return failed(INVALID_VALUE);
  }
  if (target >= 0 && !gpusim_check(who, "the target", to, size, target)) return failed(ILLEGAL_ADDRESS);
  if (source >= 0 && !gpusim_check(who, "the source", from, size, source)) return failed(ILLEGAL_ADDRESS);
  Counts *counts = &devices[target >= 0 ? target : source >= 0 ? source : 0].counts;
  pthread_mutex_lock(&lock);
  counts->h2d += found == HOST_TO_DEVICE;
  counts->d2h += found == DEVICE_TO_HOST;
  counts->main_d2h += found == DEVICE_TO_HOST && is_main_thread();
  counts->d2d += found == DEVICE_TO_DEVICE && source == target;
  counts->p2p += found == DEVICE_TO_DEVICE && source != target;
  pthread_mutex_unlock(&lock);
  static const char *names[] = {"h2h", "h2d", "d2h", "d2d"};
  gpusim_event("%s %d->%d %zu", names[found], source, target, size);
  if (is_broken()) return failed(ILLEGAL_ADDRESS);
  memmove(to, from, size);
  return OK;
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  return copy("cudaMemcpy", to, from, size, kind, NULL);
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Stream *s) {
  return copy("cudaMemcpyAsync", to, from, size, kind, s);
}

int cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t size, Stream *s) {
  if (gpusim_is_device(to) != target || gpusim_is_device(from) != source) {
    gpusim_fault("cudaMemcpyPeerAsync: the copy is from device %d to %d, got %d to %d", gpusim_is_device(from),
                 gpusim_is_device(to), source, target);
    return failed(INVALID_VALUE);
  }
  return copy("cudaMemcpyPeerAsync", to, from, size, DEVICE_TO_DEVICE, s);
}

int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      int kind, Stream *s) {
  if (width == to_pitch && width == from_pitch)
    return copy("cudaMemcpy2DAsync", to, from, width * height, kind, s);
  for (size_t row = 0; row < height; row++) {
    int code = copy("cudaMemcpy2DAsync", (char *)to + row * to_pitch, (const char *)from + row * from_pitch, width,
                    kind, s);
    if (code) return code;
  }
  return OK;
}

int cudaMemsetAsync(void *p, int value, size_t size, Stream *s) {
  int device = gpusim_stream_device(s);
  if (!gpusim_check("cudaMemsetAsync", "the memory", p, size, device)) return failed(ILLEGAL_ADDRESS);
  if (gpusim_number("GPUSIM_MEMSET", 1)) memset(p, value, size);
  return OK;
}

/* ---- devices ---- */

int cudaGetDeviceCount(int *count) {
  *count = gpusim_device_count();
  if (driver_version < 11000) {
    *count = 0;
    return failed(INSUFFICIENT_DRIVER);
  }
  return *count ? OK : failed(NO_DEVICE);
}

int cudaGetDevice(int *device) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  *device = current_device;
  return OK;
}

int cudaSetDevice(int device) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  if (device < 0 || device >= num_devices) return failed(INVALID_DEVICE);
  current_device = device;
  return OK;
}

int cudaDriverGetVersion(int *version) {
  *version = driver_version;
  return OK;
}

typedef struct { /* cudaDeviceProp of CUDA 11 */
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t total_memory, shared_per_block;
  int registers_per_block, warp_size;
  size_t pitch;
  int threads_per_block, threads_dim[3], grid_size[3], clock_rate;
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int overlap, multiprocessors, timeout, integrated, can_map, compute_mode, textures[31], surfaces[10];
  size_t surface_alignment;
  int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, async_engines, unified_addressing;
  int memory_clock, memory_bus, l2, persisting_l2, threads_per_multiprocessor;
} Properties;

int cudaGetDeviceProperties(Properties *p, int device) {
  if (device < 0 || device >= gpusim_device_count()) return failed(INVALID_DEVICE);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Simulated GPU %d", device);
  p->total_memory = capacity;
  p->shared_per_block = 49152;
  p->registers_per_block = 65536;
  p->warp_size = 32;
  p->pitch = 2147483647;
  p->threads_per_block = 1024;
  p->threads_dim[0] = p->threads_dim[1] = 1024, p->threads_dim[2] = 64;
  p->grid_size[0] = 2147483647, p->grid_size[1] = p->grid_size[2] = 65535;
  p->clock_rate = 1410000;
  p->constant_memory = 65536;
  p->major = 8, p->minor = 0;
  p->texture_alignment = 512, p->texture_pitch_alignment = 32;
  p->overlap = p->can_map = p->concurrent_kernels = p->unified_addressing = 1;
  p->multiprocessors = 108;
  p->async_engines = 3;
  p->l2 = 40 << 20;
  p->threads_per_multiprocessor = 2048;
  return OK;
}

int gpusim_attribute(int *value, int attribute) {
  switch (attribute) {
    case 1: case 2: case 3: *value = 1024; return OK;
    case 4: *value = 64; return OK;
    case 5: *value = 2147483647; return OK;
    case 6: case 7: *value = 65535; return OK;
    case 8: *value = 49152; return OK;   /* shared memory a block */
    case 9: *value = 65536; return OK;
    case 10: *value = 32; return OK;     /* warp */
    case 11: *value = 2147483647; return OK;
    case 12: case 82: *value = 65536; return OK;
    case 13: *value = 1410000; return OK;
    case 14: *value = 512; return OK;
    case 16: *value = 108; return OK;    /* multiprocessors */
    case 38: *value = 40 << 20; return OK;
    case 39: *value = 2048; return OK;   /* threads a multiprocessor */
    case 75: *value = 8; return OK;      /* compute capability */
    case 76: *value = 0; return OK;
    case 81: *value = 167936; return OK; /* shared memory a multiprocessor */
    case 95: *value = 1; return OK;      /* cooperative launch */
    case 97: *value = 166912; return OK; /* opt-in shared memory a block */
    default: *value = 0; gpusim_fault("device attribute %d is not simulated", attribute); return OK;
  }
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  if (device < 0 || device >= gpusim_device_count()) return failed(INVALID_DEVICE);
  return gpusim_attribute(value, attribute);
}

int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  if (device < 0 || device >= gpusim_device_count() || peer < 0 || peer >= num_devices) return failed(INVALID_DEVICE);
  *can = device != peer && gpusim_number("GPUSIM_PEERS", 1);
  return OK;
}

int cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  (void)flags;
  if (peer < 0 || peer >= gpusim_device_count() || peer == current_device) return failed(INVALID_DEVICE);
  if (devices[current_device].peers[peer]) return failed(PEER_ALREADY_ENABLED);
  devices[current_device].peers[peer] = 1;
  gpusim_event("peer %d may use %d", current_device, peer);
  return OK;
}

int cudaDeviceGetP2PAttribute(int *value, int attribute, int source, int target) {
  (void)source, (void)target;
  *value = attribute != 1;
  return OK;
}

int cudaDeviceSynchronize(void) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  devices[current_device].counts.main_syncs += is_main_thread();
  return OK;
}

/* ---- streams, events ---- */

int cudaStreamCreate(Stream **s) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  *s = calloc(1, sizeof(Stream));
  (*s)->device = current_device;
  return OK;
}

int cudaStreamDestroy(Stream *s) {
  free(s);
  return OK;
}

int cudaStreamSynchronize(Stream *s) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  s = stream_of(s);
  if (is_main_thread()) __atomic_add_fetch(&devices[s->device].counts.main_syncs, 1, __ATOMIC_RELAXED);
  gpusim_event("sync %d", s->device);
  return is_broken() ? failed(ILLEGAL_ADDRESS) : OK;
}

/* Everything is computed at once, so nobody waits for an event. */
int cudaEventCreateWithFlags(void **event, unsigned flags) {
  (void)flags;
  *event = calloc(1, 1);
  return OK;
}

int cudaEventDestroy(void *event) {
  free(event);
  return OK;
}

int cudaEventRecord(void *event, Stream *s) {
  (void)event, (void)s;
  return OK;
}

int cudaStreamWaitEvent(Stream *s, void *event, unsigned flags) {
  (void)s, (void)event, (void)flags;
  return OK;
}

int cudaStreamBeginCapture(Stream *s, int mode) {
  (void)s, (void)mode;
  return failed(gpusim_missing("cudaStreamBeginCapture", NOT_SUPPORTED));
}

/* ---- errors ---- */

int cudaGetLastError(void) {
  int code = last_error;
  last_error = OK;
  return code;
}

int cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorString(int code) {
  switch (code) {
    case OK: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_CONFIGURATION: return "invalid configuration argument";
    case INSUFFICIENT_DRIVER: return "CUDA driver version is insufficient for CUDA runtime version";
    case NO_DEVICE: return "no CUDA-capable device is detected";
    case INVALID_DEVICE: return "invalid device ordinal";
    case ILLEGAL_ADDRESS: return "an illegal memory access was encountered";
    case PEER_ALREADY_ENABLED: return "peer access is already enabled";
    case NOT_SUPPORTED: return "operation not supported";
    default: return "unknown error";
  }
}

const char *cudaGetErrorName(int code) { return cudaGetErrorString(code); }

/* ---- kernels ---- */

static size_t hash(const void *p) { return (size_t)((uintptr_t)p * 0x9E3779B97F4A7C15ull >> 48); }

void **__cudaRegisterFatBinary(void *binary) {
  void **handle = calloc(1, sizeof(void *));
  *handle = binary;
  return handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { free(handle); }
char __cudaInitModule(void **handle) { (void)handle; return 1; }

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *tid,
                            void *bid, void *block, void *grid, int *warp) {
  (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
  Kernel *kernel = calloc(1, sizeof(Kernel));
  kernel->host = host;
  kernel->name = name;
  pthread_mutex_lock(&lock);
  kernel->next = kernels[hash(host)];
  kernels[hash(host)] = kernel;
  pthread_mutex_unlock(&lock);
}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                       int constant, int global) {
  (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant, (void)global;
}

typedef struct {
  Dim3 grid, block;
  size_t shared;
  Stream *stream;
} Configuration;

static __thread Configuration configurations[16];
static __thread int num_configurations;

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, Stream *s) {
  if (num_configurations == 16) abort();
  configurations[num_configurations++] = (Configuration){grid, block, shared, s};
  return 0;
}

int __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void *s) {
  if (!num_configurations) return failed(UNKNOWN);
  Configuration *last = &configurations[--num_configurations];
  *grid = last->grid, *block = last->block, *shared = last->shared, *(Stream **)s = last->stream;
  return OK;
}

static Kernel *kernel_of(const void *host) {
  for (Kernel *kernel = kernels[hash(host)]; kernel; kernel = kernel->next)
    if (kernel->host == host) return kernel;
  return NULL;
}

static void count(const char *name, Stream *s) {
  __atomic_add_fetch(&num_launched, 1, __ATOMIC_RELAXED);
  __atomic_add_fetch(&devices[s->device].counts.launches, 1, __ATOMIC_RELAXED);
  gpusim_event("launch %d %s", s->device, name);
}

/* Kernels without a host function: of the other libraries, and of NVRTC. */
void gpusim_launched(const char *name, Stream *s) {
  if (gpusim_device_count()) count(name, stream_of(s));
}

/* Kernels that are computed, for small arrays. The host reads their results and makes decisions from them: the
 * rescale_grad of adamw_update, the scale of the loss, whether a gradient is finite. They are found by their demangled
 * name. Their parameters are (int n, float *to, ...). */
#define SMALL (1 << 16)

static float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

#define N (*(int *)a[0] <= SMALL ? *(int *)a[0] : 0)
#define TO (*(float **)a[1])
#define X (*(float **)a[2])[i]
#define Y (*(float **)a[3])[i]
#define S3 (*(float *)a[3])
#define FUNCTION(NAME, VALUE)          \
  static void NAME(void **a, Dim3 grid) {         \
    (void)grid;                        \
    for (int i = 0; i < N; i++) TO[i] = (VALUE); \
  }
FUNCTION(set_0, 0)
FUNCTION(set_1, 1)
FUNCTION(fill, *(float *)a[2])
FUNCTION(identity, X)
FUNCTION(square_root, sqrtf(X))
FUNCTION(eq, X == Y)
FUNCTION(eq_scalar, X == S3)
FUNCTION(mul, X *Y)
FUNCTION(mul_scalar, X *S3)
FUNCTION(plus, X + Y)
FUNCTION(plus_scalar, X + S3)
FUNCTION(minus, X - Y)
FUNCTION(minus_scalar, X - S3)
FUNCTION(rminus_scalar, S3 - X)
FUNCTION(rdiv_scalar, S3 / X)
FUNCTION(maximum_scalar, X > S3 || X != X ? X : S3)
FUNCTION(clipped, clip(X, S3, *(float *)a[4]))

/* Plans of mshadow: of a tensor, and of a slice of one. */
typedef struct {
  float *data;
  int stride;
} TensorPlan;

typedef struct {
  TensorPlan whole;
  int height, begin, all, some;
} SlicePlan;

/* A part of concat: (SlicePlan to, int, Shape<2>, TensorPlan from). */
static void concat_part(void **a, Dim3 grid) {
  (void)grid;
  SlicePlan to = *(SlicePlan *)a[0];
  TensorPlan from = *(TensorPlan *)a[3];
  int rows = ((int *)a[2])[0], columns = ((int *)a[2])[1];
  if ((long)rows * columns > SMALL) return;
  for (int i = 0; i < rows; i++) {
    int y = i % to.height, c = i / to.height % to.some + to.begin, b = i / to.height / to.some;
    for (int j = 0; j < columns; j++)
      to.whole.data[((b * to.all + c) * to.height + y) * to.whole.stride + j] = from.data[i * from.stride + j];
  }
}

/* The last part of multi_sum_sq, one block for each norm: (parameters, float *partial sums, float *norms). Every norm is
 * finite, whatever the arrays contain. */
static void finite_norms(void **a, Dim3 grid) {
  for (unsigned i = 0; i < grid.x; i++) (*(float **)a[2])[i] = 1e-3f;
}

static const struct {
  const char *name;
  void (*computes)(void **arguments, Dim3 grid);
} computed[] = {
    {"void mshadow::cuda::MapPlanKernel<mshadow::sv::saveto, 8, mshadow::expr::Plan<mshadow::expr::SliceExp<"
     "mshadow::Tensor<mshadow::gpu, 3, float>, mshadow::gpu, float, 3, 2>, float>, mshadow::expr::Plan<mshadow::Tensor<"
     "mshadow::gpu, 3, float>, float> >(",
     concat_part},
    {"void mxnet::op::GlobalReductionKernel<float>(", finite_norms},
#define GENERIC "void mxnet::op::mxnet_op::mxnet_generic_kernel<mxnet::op::"
#define OP(NAME) GENERIC "mxnet_op::op_with_req<mxnet::op::mshadow_op::" NAME ", 1>, float*, "
    {GENERIC "mxnet_op::op_with_req<mxnet::op::mxnet_op::set_to_int<0>, 1>, float*>(", set_0},
    {GENERIC "mxnet_op::op_with_req<mxnet::op::mxnet_op::set_to_int<1>, 1>, float*>(", set_1},
    {GENERIC "mxnet_op::set_to_int<0>, float*>(", set_0},
    {GENERIC "clip, float*, float*, float, float>(", clipped},
    {OP("identity") "float>(", fill},
    {OP("identity") "float const*>(", identity},
    {OP("identity") "float*>(", identity},
    {OP("square_root") "float*>(", square_root},
    {OP("eq") "float*, float*>(", eq},
    {OP("eq") "float*, float>(", eq_scalar},
    {OP("mul") "float*, float*>(", mul},
    {OP("mul") "float*, float>(", mul_scalar},
    {OP("plus") "float*, float*>(", plus},
    {OP("plus") "float*, float>(", plus_scalar},
    {OP("minus") "float*, float*>(", minus},
    {OP("minus") "float*, float>(", minus_scalar},
    {OP("rminus") "float*, float>(", rminus_scalar},
    {OP("rdiv") "float*, float>(", rdiv_scalar},
    {OP("maximum") "float*, float>(", maximum_scalar},
};
#undef N
#undef TO
#undef X
#undef Y
#undef S3

/* Write the seed of each of MXNet's own generators to the log, and the number of draws since. A kernel that seeds takes
 * (states, int count, unsigned seed). A kernel that draws takes (int, struct that begins with states, int n, ...). */
static void tell_random(Kernel *kernel, void **a, int device) {
  static struct {
    void *states;
    unsigned seed, draws;
  } known[256];
  void *states = kernel->random == SEEDS ? *(void **)a[0] : *(void **)a[1];
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < 255 && known[i].states && known[i].states != states) i++;
  known[i].states = states;
  unsigned before = known[i].draws, seed = known[i].seed;
  known[i].draws = kernel->random == SEEDS ? 0 : before + 1;
  if (kernel->random == SEEDS) known[i].seed = *(unsigned *)a[2];
  pthread_mutex_unlock(&lock);
  if (kernel->random == DRAWS) gpusim_event("random-draw %d seed %u after %u count %d", device, seed, before, *(int *)a[2]);
  else gpusim_event("random-seed %d seed %u", device, *(unsigned *)a[2]);
}

/* Find the pointers among a kernel's parameters, from its mangled name. */
static void parse(Kernel *kernel) {
  static char *(*demangle)(const char *, char *, size_t *, int *);
  if (!demangle) demangle = (char *(*)(const char *, char *, size_t *, int *))dlsym(RTLD_DEFAULT, "__cxa_demangle");
  int status = 0;
  char *text = demangle ? demangle(kernel->name, NULL, NULL, &status) : NULL;
  size_t end = text ? strlen(text) : 0;
  if (end && text[end - 1] == ')') {
    int depth = 0, number = 0;
    if (strstr(text, "random::rand_generator_seed_kernel(")) kernel->random = SEEDS;
    if (strstr(text, "RandGenerator<mshadow::gpu")) kernel->random = DRAWS;
    for (size_t i = 0; i < sizeof computed / sizeof *computed; i++)
      if (!strncmp(text, computed[i].name, strlen(computed[i].name))) kernel->computes = computed[i].computes;
    size_t start = end;
    while (start-- > 0) {
      if (text[start] == ')' || text[start] == '>') depth++;
      if (text[start] == '(' || text[start] == '<') depth--;
      if (!depth) break;
    }
    depth = 0;
    for (size_t i = start + 1; i < end; i++) {
      char c = text[i];
      if (c == '(' || c == '<') depth++;
      if ((c == ')' || c == '>') && i != end - 1) depth--;
      if ((c == ',' && !depth) || i == end - 1) {
        int pointer = text[i - 1] == '*' || (i > 6 && !strncmp(text + i - 6, "* const", 6));
        if (pointer && number < 64 && kernel->num_pointers < 32) kernel->pointers[kernel->num_pointers++] = number;
        number++;
      }
    }
  }
  free(text);
  kernel->parsed = 1;
}

int cudaLaunchKernel(const void *host, Dim3 grid, Dim3 block, void **arguments, size_t shared, Stream *s) {
  if (!gpusim_device_count()) return failed(NO_DEVICE);
  Kernel *kernel = kernel_of(host);
  if (!kernel) {
    gpusim_fault("cudaLaunchKernel of a function that was not registered");
    return failed(98);
  }
  s = stream_of(s);
  if (s->device != current_device)
    gpusim_fault("%s: launched on a stream of device %d, the current device is %d", kernel->name, s->device,
                 current_device);
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || block.z > 64 || grid.x > 2147483647u ||
      grid.y > 65535 || grid.z > 65535 || shared > 49152) {
    gpusim_fault("%s: invalid configuration: grid %u %u %u, block %u %u %u, shared %zu", kernel->name, grid.x, grid.y,
                 grid.z, block.x, block.y, block.z, shared);
    return failed(INVALID_CONFIGURATION);
  }
  if (!kernel->parsed) {
    pthread_mutex_lock(&log_lock);
    if (!kernel->parsed) parse(kernel);
    pthread_mutex_unlock(&log_lock);
  }
  int bad = 0;
  for (int i = 0; i < kernel->num_pointers; i++) {
    const void *p = *(void **)arguments[kernel->pointers[i]];
    char what[32];
    snprintf(what, sizeof what, "argument %d", kernel->pointers[i]);
    if (p && !gpusim_check(kernel->name, what, p, 1, s->device)) bad = 1;
  }
  if (kernel->computes && !bad) kernel->computes(arguments, grid);
  if (kernel->random && log_file) tell_random(kernel, arguments, s->device);
  count(kernel->name, s);
  return OK;
}

typedef struct {
  size_t shared, constant, local;
  int threads, registers, ptx, binary, cache, dynamic_shared, carveout;
} Attributes;

int cudaFuncGetAttributes(Attributes *attributes, const void *host) {
  (void)host;
  *attributes = (Attributes){0, 0, 0, 1024, 32, 80, 80, 0, 49152, -1};
  return OK;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads, size_t shared,
                                                           unsigned flags) {
  (void)host, (void)shared, (void)flags;
  *blocks = threads > 0 && threads <= 2048 ? 2048 / threads : 1;
  if (*blocks > 32) *blocks = 32;
  return OK;
}

/* ---- counts for tests ---- */

static void write_counts(FILE *f) {
  fprintf(f, "{\"faults\": %ld, \"missing\": %ld, \"devices\": [", num_faults, num_missing);
  for (int d = 0; d < num_devices; d++) {
    Counts *c = &devices[d].counts;
    fprintf(f,
            "%s{\"used\": %zu, \"peak\": %zu, \"launches\": %ld, \"h2d\": %ld, \"d2h\": %ld, \"d2d\": %ld, "
            "\"p2p\": %ld, \"main_syncs\": %ld, \"main_d2h\": %ld}",
            d ? ", " : "", devices[d].used, devices[d].peak, c->launches, c->h2d, c->d2h, c->d2d, c->p2p, c->main_syncs,
            c->main_d2h);
  }
  fprintf(f, "]}\n");
}

/* All counts so far as JSON, in a buffer that stays ours. */
const char *gpusim_counts(void) {
  static char *text;
  static size_t size;
  pthread_mutex_lock(&lock);
  free(text);
  FILE *f = open_memstream(&text, &size);
  write_counts(f);
  fclose(f);
  pthread_mutex_unlock(&lock);
  return text;
}

/* The next peaks are those from now on. */
void gpusim_reset_peaks(void) {
  pthread_mutex_lock(&lock);
  for (int d = 0; d < num_devices; d++) devices[d].peak = devices[d].used;
  pthread_mutex_unlock(&lock);
}

__attribute__((destructor)) static void end(void) {
  const char *folder = getenv("GPUSIM_REPORT");
  if (folder && *folder && num_devices >= 0) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%d.json", folder, getpid());
    FILE *f = fopen(path, "w");
    if (f) {
      write_counts(f);
      fclose(f);
    }
  }
  if (log_file) fflush(log_file);
}
