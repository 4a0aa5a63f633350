/* To be preloaded: fsync and fdatasync take $SLOW_SYNC_US microseconds longer, as on a slow card. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

static int slowly(const char *name, int descriptor) {
  long delay_us = atol(getenv("SLOW_SYNC_US") ? getenv("SLOW_SYNC_US") : "0");
  struct timespec delay = {delay_us / 1000000, delay_us % 1000000 * 1000};
  int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  nanosleep(&delay, NULL);
  return sync(descriptor);
}

int fsync(int descriptor) { return slowly("fsync", descriptor); }
int fdatasync(int descriptor) { return slowly("fdatasync", descriptor); }
