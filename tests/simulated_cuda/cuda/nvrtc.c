/* libnvrtc.so.11.2: keeps the names that a program has to define. */
#include "gpusim.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
  char *name, names[4096];
} Program;

int nvrtcVersion(int *major, int *minor) {
  *major = 11;
  *minor = 8;
  return OK;
}

int nvrtcCreateProgram(Program **program, const char *source, const char *name, int count, const char **headers,
                       const char **includes) {
  (void)source, (void)count, (void)headers, (void)includes;
  *program = calloc(1, sizeof(Program));
  (*program)->name = strdup(name ? name : "unnamed");
  return OK;
}

int nvrtcDestroyProgram(Program **program) {
  free((*program)->name);
  free(*program);
  *program = NULL;
  return OK;
}

int nvrtcAddNameExpression(Program *program, const char *name) {
  strncat(program->names, name, sizeof program->names - strlen(program->names) - 2);
  strcat(program->names, "\n");
  return OK;
}

int nvrtcCompileProgram(Program *program, int count, const char **options) {
  char all[512] = "";
  for (int i = 0; i < count; i++) strncat(strcat(all, " "), options[i], sizeof all - strlen(all) - 2);
  gpusim_event("compile %s:%s", program->name, all);
  return OK;
}

int nvrtcGetProgramLogSize(Program *program, size_t *size) {
  (void)program;
  *size = 1;
  return OK;
}

int nvrtcGetProgramLog(Program *program, char *log) {
  (void)program;
  *log = 0;
  return OK;
}

int nvrtcGetPTXSize(Program *program, size_t *size) {
  *size = strlen(program->names) + 1;
  return OK;
}

int nvrtcGetPTX(Program *program, char *text) {
  strcpy(text, program->names);
  return OK;
}

int nvrtcGetLoweredName(Program *program, const char *name, const char **lowered) {
  *lowered = strstr(program->names, name) ? strdup(name) : NULL;
  return *lowered ? OK : 9;
}

const char *nvrtcGetErrorString(int code) { return code ? "simulated NVRTC error" : "NVRTC_SUCCESS"; }
