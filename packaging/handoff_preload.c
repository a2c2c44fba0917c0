/* Handing over, for servers that know nothing of it: LD_PRELOAD=/usr/local/lib/sniproxy-handoff.so
 *
 * Where a server listens on a Unix stream socket called handoff-socket, accept(2) and accept4(2)
 * return the client's TCP connection, which sniproxy sends down each connection to that socket: one
 * byte, and one descriptor (SCM_RIGHTS, unix(7)). The address is the client's, and errors are those
 * of accept(2). All other listeners are as they were, for one getsockname(2) more.
 *
 * scripts/preload makes it. There is no state but where the C library has its own accept4.
 */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char NAME[] = "handoff-socket";

/* The daemon sends right after connect(2), so there is something to wait for only if it has lost
 * its processor in between: to others, or to a quota, which stops a process for a tenth of a second.
 * So twice that; and no longer, since a server that has one thread does nothing else meanwhile, and
 * whoever can connect to it may be silent. */
static const struct timespec PATIENCE = {.tv_nsec = 200 * 1000 * 1000};

typedef int accept4_function(int, struct sockaddr *restrict, socklen_t *restrict, int);

/* The C library's. Threads that find it at the same time find the same. */
static accept4_function *next_accept4(void)
{
    static accept4_function *_Atomic found;
    accept4_function *function = atomic_load_explicit(&found, memory_order_relaxed);
    if (!function) {
        void *symbol = dlsym(RTLD_NEXT, "accept4");
        memcpy(&function, &symbol, sizeof function); /* ISO C has no cast for that; dlsym(3) */
        atomic_store_explicit(&found, function, memory_order_relaxed);
    }
    return function;
}

/* accept(2) may be called by a signal handler, dlsym(3) may not. */
__attribute__((constructor)) static void find_early(void)
{
    next_accept4();
}

/* Whether clients are handed over to this listener. */
static bool is_ours(int listener)
{
    /* A path that fills sun_path does not end there, unix(7): one byte more, which stays zero. */
    union {
        struct sockaddr_un address;
        char bytes[sizeof(struct sockaddr_un) + 1];
    } name = {.bytes = {0}};
    socklen_t size = sizeof name.address;
    if (getsockname(listener, (struct sockaddr *)&name.address, &size) < 0
            || name.address.sun_family != AF_UNIX)
        return false;
    const char *path = name.bytes + offsetof(struct sockaddr_un, sun_path);
    const char *slash = strrchr(path, '/'), *last = slash ? slash + 1 : path;
    if (strncmp(last, NAME, sizeof NAME - 1))
        return false;
    /* The kernel tells what was bound. HAProxy binds handoff-socket.PID.tmp, and renames that. */
    const char *rest = last + sizeof NAME - 1;
    if (*rest && (*rest != '.' || strcmp(strrchr(rest, '.'), ".tmp")))
        return false;
    int type;
    size = sizeof type;
    return !getsockopt(listener, SOL_SOCKET, SO_TYPE, &type, &size) && type == SOCK_STREAM;
}

/* Whether there is something to receive, or an end, before our patience is over. No signal cuts
 * that short, and none makes it longer: they come afterwards. */
static bool speaks(int connection)
{
    struct pollfd readable = {.fd = connection, .events = POLLIN};
    sigset_t all;
    sigfillset(&all);
    return ppoll(&readable, 1, &PATIENCE, &all) > 0;
}

/* Returns the descriptor that the message brings; -1 if it brings none, or several. */
static int receive(int connection, int flags)
{
    char byte;
    union {
        struct cmsghdr first;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {.iov_base = &byte, .iov_len = sizeof byte};
    struct msghdr message = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = &control,
        /* Not CMSG_SPACE, whose padding has room for a second descriptor. The kernel closes what
         * finds no room, and says MSG_CTRUNC. */
        .msg_controllen = CMSG_LEN(sizeof(int)),
    };
    if (recvmsg(connection, &message, flags & SOCK_CLOEXEC ? MSG_CMSG_CLOEXEC : 0) < 0)
        return -1;
    const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
        return -1;
    int client;
    memcpy(&client, CMSG_DATA(header), sizeof client);
    if (message.msg_flags & MSG_CTRUNC) {
        close(client);
        return -1;
    }
    return client;
}

/* Makes it what accept4 returns. False if it is no TCP connection, or none any more. */
static bool adopt(int client, struct sockaddr *addr, socklen_t *addrlen, int flags)
{
    int protocol, nonblocking = (flags & SOCK_NONBLOCK) != 0;
    struct sockaddr_storage peer;
    socklen_t size = sizeof protocol;
    if (getsockopt(client, SOL_SOCKET, SO_PROTOCOL, &protocol, &size) < 0
            || protocol != IPPROTO_TCP)
        return false;
    size = sizeof peer;
    if (getpeername(client, (struct sockaddr *)&peer, &size) < 0
            || (peer.ss_family != AF_INET && peer.ss_family != AF_INET6))
        return false;
    /* All copies of a descriptor share O_NONBLOCK, so it is as whoever had it last has left it. */
    if (ioctl(client, FIONBIO, &nonblocking) < 0)
        return false;
    if (addr) {
        memcpy(addr, &peer, size < *addrlen ? size : *addrlen);
        *addrlen = size; /* "will return a value greater than was supplied", accept(2) */
    }
    return true;
}

/* Whether two more descriptors can be had: one for a connection, one for the client in it. With one
 * the client would be lost; with EMFILE both stay in the queue, as accept(2) has it. */
static bool has_room(int any)
{
    int first = fcntl(any, F_DUPFD_CLOEXEC, 0);
    if (first < 0)
        return false;
    int second = fcntl(any, F_DUPFD_CLOEXEC, 0), error = errno;
    close(first);
    if (second >= 0)
        close(second);
    errno = error;
    return second >= 0;
}

/* Takes connections until one brings a client: returns that. -1 with errno as accept(2) has it;
 * ECONNABORTED, upon which servers try again, if nothing comes down a connection. */
static int accept_client(int listener, struct sockaddr *addr, socklen_t *addrlen, int flags,
                         int cancellation)
{
    for (;;) {
        if (!has_room(listener))
            return -1;
        pthread_setcancelstate(cancellation, NULL);
        /* With the caller's flags: the kernel refuses those that do not exist. */
        int connection = next_accept4()(listener, NULL, NULL, flags | SOCK_CLOEXEC | SOCK_NONBLOCK);
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
        if (connection < 0)
            return -1;
        bool is_silent = !speaks(connection);
        int client = is_silent ? -1 : receive(connection, flags);
        close(connection);
        if (is_silent) {
            errno = ECONNABORTED;
            return -1;
        }
        if (client < 0)
            continue;
        if (adopt(client, addr, addrlen, flags))
            return client;
        close(client);
    }
}

static int accept_any(int listener, struct sockaddr *addr, socklen_t *addrlen, int flags)
{
    if (!is_ours(listener))
        return next_accept4()(listener, addr, addrlen, flags);
    /* A thread may be cancelled while it waits for a connection, pthreads(7), but not while it has
     * descriptors that nobody else knows. */
    int cancellation;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancellation);
    int client = accept_client(listener, addr, addrlen, flags, cancellation);
    pthread_setcancelstate(cancellation, NULL);
    return client;
}

/* They have names of their own in C, since the headers declare libc's with other types. */
int handoff_accept(int, struct sockaddr *restrict, socklen_t *restrict) __asm__("accept");
int handoff_accept4(int, struct sockaddr *restrict, socklen_t *restrict, int) __asm__("accept4");

int handoff_accept(int fd, struct sockaddr *restrict addr, socklen_t *restrict addrlen)
{
    return accept_any(fd, addr, addrlen, 0);
}

int handoff_accept4(int fd, struct sockaddr *restrict addr, socklen_t *restrict addrlen, int flags)
{
    return accept_any(fd, addr, addrlen, flags);
}
