/* libcurand.so.10: generators that write their seeds and draws to the log. */
#include "gpusim.h"

#include <stdlib.h>

typedef struct {
  Stream *stream;
} Generator;

int curandCreateGenerator(Generator **generator, int type) {
  (void)type;
  *generator = calloc(1, sizeof(Generator));
  return OK;
}
int curandDestroyGenerator(Generator *generator) {
  free(generator);
  return OK;
}
int curandSetStream(Generator *generator, Stream *s) {
  generator->stream = s;
  return OK;
}
int curandSetPseudoRandomGeneratorSeed(Generator *generator, unsigned long long seed) {
  gpusim_event("curand-seed %d %llu", gpusim_stream_device(generator->stream), seed);
  return OK;
}
int curandSetGeneratorOffset(Generator *generator, unsigned long long offset) {
  (void)generator, (void)offset;
  return OK;
}

static int generate(const char *who, Generator *generator, void *to, size_t bytes) {
  int device = gpusim_stream_device(generator->stream);
  if (!gpusim_check(who, "the result", to, bytes, device)) return 201;
  gpusim_event("curand-draw %d %s %zu", device, who, bytes);
  gpusim_launched(who, generator->stream);
  return OK;
}

int curandGenerate(Generator *g, unsigned *to, size_t count) { return generate("curandGenerate", g, to, 4 * count); }
int curandGenerateUniform(Generator *g, float *to, size_t count) {
  return generate("curandGenerateUniform", g, to, 4 * count);
}
int curandGenerateUniformDouble(Generator *g, double *to, size_t count) {
  return generate("curandGenerateUniformDouble", g, to, 8 * count);
}
int curandGenerateNormal(Generator *g, float *to, size_t count, float mean, float sigma) {
  (void)mean, (void)sigma;
  return generate("curandGenerateNormal", g, to, 4 * count);
}
