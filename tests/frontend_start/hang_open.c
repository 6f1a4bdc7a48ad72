/* The file that HANG_OPEN names cannot be opened: an attempt waits for ever, as for a network
 * that does not answer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void hang(const char *path)
{
    const char *name = getenv("HANG_OPEN");
    const char *file = strrchr(path, '/');
    if (!name || strcmp(file ? file + 1 : path, name) != 0)
        return;
    write(2, "hanging\n", 8);
    for (;;)
        pause();
}

/* What the daemon opens files with. */
int open64(const char *path, int flags, ...)
{
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    va_list list;
    va_start(list, flags);
    int mode = va_arg(list, int);
    va_end(list);
    hang(path);
    return real(path, flags, mode);
}
