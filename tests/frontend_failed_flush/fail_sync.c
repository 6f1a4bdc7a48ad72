/* Makes one fdatasync fail when the file that FAIL_SYNC names is there, and takes it away. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int fdatasync(int fd)
{
    const char *path = getenv("FAIL_SYNC");

    if (path && unlink(path) == 0) {
        errno = EIO;
        return -1;
    }
    return syscall(SYS_fdatasync, fd);
}
