/* Preloaded into a process under test: the wall clock, the boot-time clock, adjtimex and the boot's name are what a
 * file says, which may change while the process runs. The monotonic clock stays as it is. See clocks.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <time.h>
#include <unistd.h>

struct told {
    int64_t wall_s; /* added to the wall clock */
    int64_t off_s;  /* added to the boot-time clock */
    int64_t synchronised;
    char boot[40];
};

static const struct told *told;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("TEST_CLOCKS");
    int fd = path ? open(path, O_RDONLY) : -1;
    void *at = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *told, PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        abort(); /* a test that believes in a clock that is not there proves nothing */
    close(fd);
    told = at;
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    int failed = (int)syscall(SYS_clock_gettime, id, now);
    if (!failed && told && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE || id == CLOCK_TAI))
        now->tv_sec += told->wall_s;
    if (!failed && told && id == CLOCK_BOOTTIME)
        now->tv_sec += told->off_s;
    return failed;
}

time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

int adjtimex(struct timex *state)
{
    memset(state, 0, sizeof *state);
    return told->synchronised ? TIME_OK : TIME_ERROR;
}

static int boots_name(void)
{
    int fd = memfd_create("boot_id", MFD_CLOEXEC);
    if (fd < 0 || write(fd, told->boot, strlen(told->boot)) < 0 || lseek(fd, 0, SEEK_SET) < 0)
        abort();
    return fd;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        if (told && !strcmp(path, "/proc/sys/kernel/random/boot_id"))                                                  \
            return boots_name();                                                                                       \
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);                                                  \
    }

OPEN(open)
OPEN(open64)
