/* When a file is there, takes it away and makes one fdatasync other than usual: it fails if the file
 * is the one that FAIL_SYNC names, and takes three seconds if it is that of SLOW_SYNC. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static int taken(const char *variable)
{
    const char *path = getenv(variable);

    return path && unlink(path) == 0;
}

int fdatasync(int fd)
{
    if (taken("FAIL_SYNC")) {
        errno = EIO;
        return -1;
    }
    if (taken("SLOW_SYNC")) {
        sleep(3);
    }
    return syscall(SYS_fdatasync, fd);
}
