/*
 * Preloaded into the daemon under valgrind.
 *
 * Valgrind runs one thread at a time. A thread gives way before a system call that may block, but
 * valgrind 3.19 does not know that io_uring_enter(2) is one: a queue's thread that waits for its
 * ring would hold up all others for ever. Here it looks at the ring each millisecond until it would
 * not have to wait. Neither a poll of the ring nor an eventfd of it would do: they are not woken by
 * what is put off until the thread enters the kernel (IORING_SETUP_DEFER_TASKRUN).
 *
 * A look takes about forty instructions, which is next to nothing in what is counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>

/* A thread waits in its first ring; what it makes after that, for signals, is never waited for. */
static __thread int ring = -1;
static __thread const volatile unsigned *head, *tail, *flags;

static void remember(int fd, const struct io_uring_params *params)
{
    size_t len = params->cq_off.cqes;
    const char *map;

    if (ring >= 0)
        return;
    map = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, IORING_OFF_SQ_RING);

    if (map == MAP_FAILED)
        return;
    ring = fd;
    head = (const unsigned *)(map + params->cq_off.head);
    tail = (const unsigned *)(map + params->cq_off.tail);
    flags = (const unsigned *)(map + params->sq_off.flags);
}

long syscall(long number, ...)
{
    static long (*next)(long, ...);
    long a, b, c, d, e, f, result;
    va_list list;

    va_start(list, number);
    a = va_arg(list, long);
    b = va_arg(list, long);
    c = va_arg(list, long);
    d = va_arg(list, long);
    e = va_arg(list, long);
    f = va_arg(list, long);
    va_end(list);
    if (!next)
        next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    /* A wait with a time limit comes back by itself. */
    if (number == SYS_io_uring_enter && c > 0 && !(d & IORING_ENTER_EXT_ARG) && ring == (int)a) {
        if (b > 0 && (result = next(number, a, b, 0L, d, e, f)) < b)
            return result;
        while (*head == *tail && !(*flags & IORING_SQ_TASKRUN))
            poll(NULL, 0, 1);
        result = next(number, a, 0L, c, d, e, f);
        return result < 0 ? result : b;
    }
    result = next(number, a, b, c, d, e, f);
    if (number == SYS_io_uring_setup && result >= 0)
        remember((int)result, (const struct io_uring_params *)b);
    return result;
}
