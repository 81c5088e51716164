/* What the simulated CUDA libraries share. See ../README.md.
 *
 * All state is in libcudart.so.11.0 (cudart.c). The other libraries link to it, as NVIDIA's do.
 */
#ifndef GPUSIM_H
#define GPUSIM_H

#include <stddef.h>
#include <stdint.h>

#define MAX_DEVICES 16

typedef struct Stream Stream; /* cudaStream_t */

typedef struct {
  unsigned x, y, z;
} Dim3;

enum { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, ANY_DIRECTION };

/* Error codes of driver_types.h */
enum {
  OK = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_CONFIGURATION = 9,
  INSUFFICIENT_DRIVER = 35,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  ILLEGAL_ADDRESS = 700,
  PEER_ALREADY_ENABLED = 704,
  NOT_SUPPORTED = 801,
  UNKNOWN = 999
};

int gpusim_device_count(void);
int gpusim_device(void);             /* the current device of this thread */
int gpusim_stream_device(Stream *);  /* the default stream has this thread's device */
void gpusim_fault(const char *format, ...);    /* a wrong call: counted, and printed once for each text */
void gpusim_event(const char *format, ...);    /* a line of the log, if GPUSIM_LOG is set */
int gpusim_logging(void);
/* Whether `size` bytes from `p` lie in one live allocation of this device. It is a fault if they do not. */
int gpusim_check(const char *who, const char *what, const void *p, size_t size, int device);
/* Count a kernel, or a function of a library, on a stream. */
void gpusim_launched(const char *name, Stream *);
int gpusim_missing(const char *name, int code); /* called by the generated stubs */
int gpusim_is_device(const void *p);            /* the device of a pointer, or -1 for the host */
double gpusim_number(const char *variable, double otherwise);

#endif
