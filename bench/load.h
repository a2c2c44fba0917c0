/* What load.c and tls_load.c share. Each of them is a program of one file, which includes this one
 * first, and says in its own words what failed.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    COMMAND = 9,      /* one letter, eight bytes of a number */
    HEAD = 4096,      /* what stands before a load fits: PROXY header, hello or CONNECT, command */
    BACKLOG = 4096,   /* more than there are connections that begin at a time */
    PATIENCE = 120,   /* seconds, many times what any load takes; then something is stuck */
};

/* Say what failed, and end with 111. */
static void fail(const char *what);

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* Allow as many descriptors as may be; who writes to a peer that has gone is told by an error. */
static void prepare(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    signal(SIGPIPE, SIG_IGN);
}

/* Where to connect, or to listen: BENCH_HOST of the environment, or on loopback. */
static struct sockaddr_in address_of(int port)
{
    const char *host = getenv("BENCH_HOST");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, host ? host : "127.0.0.1", &address.sin_addr) != 1)
        fail("understand BENCH_HOST");
    return address;
}

static void set_nodelay(int fd)
{
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

/* Listen on a port; `flags` are those of socket(2). */
static int listen_on(int port, int flags)
{
    struct sockaddr_in address = address_of(port);
    int yes = 1, fd = socket(AF_INET, SOCK_STREAM | flags, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, BACKLOG) < 0)
        fail("listen on the TCP port");
    return fd;
}

static void say_ready(void)
{
    puts("ready");
    fflush(stdout);
}

/* Stay, with all that is open, until standard input ends. */
static void rest(void)
{
    alarm(0);
    say_ready();
    while (getchar() != EOF)
        ;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Print what round trips took, all in all and one by one; this sorts them. */
static void print_round_trips(double seconds, double *times, long count)
{
    printf("seconds %.6f\n", seconds);
    qsort(times, count, sizeof *times, by_size);
    printf("median %.9f\n", times[count / 2]);
    printf("p99 %.9f\n", times[count * 99 / 100]);
}
