/* Both ends of a benchmark: clients in front of a proxy, and the backend behind it.
 *
 *   load backend PATH PORT                 serve on the Unix socket PATH and on 127.0.0.1:PORT; and
 *                                          whoever is handed over at PATH.handoff
 *   load connect PORT HELLO HOSTS AT_A_TIME COUNT
 *   load bulk PORT HELLO down|up|both STREAMS BYTES
 *   load ping PORT HELLO CONNECTIONS COUNT
 *   load idle PORT HELLO COUNT             stay until standard input ends
 *
 * HELLO is a file with a ClientHello. Behind it every client sends a command, for the backend:
 * one letter and a number of eight bytes. So the same backend serves every kind of load, and no
 * TLS is spoken: what costs time is the proxy. With HOSTS above 1 the five digits of the first
 * "host00000" in the hello count up from connection to connection.
 *
 * One thread, epoll, and as few system calls as it takes, so that the proxy is what is measured.
 * Results go to standard output as "name value" lines, times in seconds.
 */

#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/un.h>

enum {
    MOST_FDS = 1 << 17,
    PIECE = 1 << 18,  /* bytes sent or received at a time: what a socket buffer takes */
    MOST_EVENTS = 256,
};

/* What a connection is there for. The first five are the letters of commands. */
enum role {
    CONNECT = 'c', DOWN = 'd', UP = 'u', BOTH = 'b', ECHO = 'e', NEW = 'n', LISTEN = 'l', TAKE = 't',
};

struct connection {
    enum role role;
    uint64_t to_send, to_receive;
    int head_size;
    char *head;
    double sent_at;
    int is_unix;
    int is_handoff; /* what is accepted there brings a client */
};

static struct connection connections[MOST_FDS];
static char piece[PIECE];
static char hello[HEAD];
static int hello_size;
static char *digits; /* in the hello, or NULL */
static int epoll;

static void fail(const char *what)
{
    fprintf(stderr, "load: unable to %s: %s\n", what, strerror(errno));
    exit(111);
}

static void watch(int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        fail("watch a socket");
}

static void rewatch(int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event) < 0)
        fail("watch a socket");
}

static struct connection *enter(int fd, enum role role)
{
    if (fd >= MOST_FDS) {
        fprintf(stderr, "load: descriptor %d is too high\n", fd);
        exit(111);
    }
    connections[fd] = (struct connection){.role = role};
    return &connections[fd];
}

/* Send what is left to send, as far as it goes. */
static void send_more(int fd, struct connection *connection)
{
    while (connection->to_send) {
        size_t size = connection->to_send < PIECE ? connection->to_send : PIECE;
        ssize_t sent = send(fd, piece, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN)
                return;
            fail("send");
        }
        connection->to_send -= sent;
    }
}

/* Receive and throw away; on TCP the kernel does so without copying. Returns 0 at the end. */
static int receive_more(int fd, struct connection *connection)
{
    int flags = MSG_DONTWAIT | (connection->is_unix ? 0 : MSG_TRUNC);
    for (;;) {
        ssize_t size = recv(fd, piece, PIECE, flags);
        if (size < 0) {
            if (errno == EAGAIN)
                return 1;
            fail("receive");
        }
        if (size == 0)
            return 0;
        connection->to_receive -= (uint64_t)size < connection->to_receive
            ? (uint64_t)size : connection->to_receive;
        if (connection->to_receive == 0)
            return 1;
    }
}

/* ---- the backend ---- */

static void serve_new(int fd, struct connection *connection)
{
    if (!connection->head)
        connection->head = malloc(HEAD);
    ssize_t got = recv(fd, connection->head + connection->head_size,
                       HEAD - connection->head_size, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        free(connection->head);
        close(fd);
        return;
    }
    connection->head_size += got;
    char *at = connection->head, *end = at + connection->head_size;
    if (*at == 'P') {
        at = memchr(at, '\n', end - at);
        if (!at)
            return;
        at++;
    }
    if (end - at < 5)
        return;
    at += 5 + ((uint8_t)at[3] << 8 | (uint8_t)at[4]);
    if (end - at < COMMAND)
        return;
    uint64_t number;
    memcpy(&number, at + 1, sizeof number);
    uint64_t early = end - at - COMMAND; /* bytes of a load, come with the command */
    connection->role = *at;
    free(connection->head);
    connection->head = NULL;
    switch (connection->role) {
    case CONNECT:
    case ECHO:
        if (send(fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL) != 1)
            fail("send");
        break;
    case DOWN:
        connection->to_send = number;
        break;
    case UP:
        connection->to_receive = number - early;
        break;
    case BOTH:
        connection->to_send = number;
        connection->to_receive = number - early;
        break;
    default:
        fprintf(stderr, "load: no such command: %d\n", connection->role);
        exit(111);
    }
    if (connection->to_send) {
        rewatch(fd, EPOLLIN | EPOLLOUT | EPOLLET);
        send_more(fd, connection);
    } else if (connection->to_receive) {
        rewatch(fd, EPOLLIN | EPOLLET);
    }
}

/* Take the client that a connection brings. */
static void take(int fd)
{
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } control;
    char byte;
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1,
        .msg_control = control.room, .msg_controllen = sizeof control.room,
    };
    ssize_t size = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (size < 0 && errno == EAGAIN)
        return;
    struct cmsghdr *rights = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    close(fd);
    if (!rights)
        return;
    int client;
    memcpy(&client, CMSG_DATA(rights), sizeof client);
    fcntl(client, F_SETFL, O_NONBLOCK);
    enter(client, NEW);
    watch(client, EPOLLIN);
}

static void serve(int fd, struct connection *connection)
{
    ssize_t size;
    switch (connection->role) {
    case LISTEN:
        while ((size = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
            enter(size, connection->is_handoff ? TAKE : NEW)->is_unix = connection->is_unix;
            watch(size, EPOLLIN);
        }
        break;
    case TAKE:
        take(fd);
        break;
    case NEW:
        serve_new(fd, connection);
        break;
    case CONNECT:
        size = recv(fd, piece, PIECE, MSG_DONTWAIT);
        if (size == 0 || (size < 0 && errno != EAGAIN))
            close(fd);
        break;
    case ECHO:
        size = recv(fd, piece, PIECE, MSG_DONTWAIT);
        if (size > 0)
            send(fd, piece, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        else if (size == 0 || errno != EAGAIN)
            close(fd);
        break;
    case DOWN:
    case UP:
    case BOTH: {
        int receiving = connection->to_receive > 0;
        send_more(fd, connection);
        if (!receive_more(fd, connection)) {
            close(fd);
            break;
        }
        if (receiving && !connection->to_receive && connection->role == UP)
            send(fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        break;
    }
    }
}

static struct connection *listen_unix(const char *path, const char *suffix)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    snprintf(name.sun_path, sizeof name.sun_path, "%s%s", path, suffix);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (bind(fd, (struct sockaddr *)&name, sizeof name) < 0 || listen(fd, BACKLOG) < 0)
        fail("listen on the Unix socket");
    chmod(name.sun_path, 0777); /* some proxies go on as another user */
    watch(fd, EPOLLIN);
    return enter(fd, LISTEN);
}

static void backend(const char *path, int port)
{
    int far = listen_on(port, SOCK_NONBLOCK | SOCK_CLOEXEC);
    set_nodelay(far);
    listen_unix(path, "")->is_unix = 1;
    listen_unix(path, ".handoff")->is_handoff = 1;
    enter(far, LISTEN);
    watch(far, EPOLLIN);
    say_ready();
    struct epoll_event events[MOST_EVENTS];
    for (;;) {
        int count = epoll_wait(epoll, events, MOST_EVENTS, -1);
        for (int i = 0; i < count; i++)
            serve(events[i].data.fd, &connections[events[i].data.fd]);
    }
}

/* ---- the clients ---- */

static void read_hello(const char *file)
{
    int fd = open(file, O_RDONLY);
    if (fd < 0 || (hello_size = read(fd, hello, HEAD - COMMAND)) < 0)
        fail("read the hello");
    close(fd);
    char *name = memmem(hello, hello_size, "host00000", 9);
    digits = name ? name + 4 : NULL;
}

static struct sockaddr_in proxy;

/* Connect and send hello and command; the answer is still to come. */
static int greet(enum role role, uint64_t number)
{
    char head[HEAD];
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("make a socket");
    if (role == ECHO)
        set_nodelay(fd);
    if (connect(fd, (struct sockaddr *)&proxy, sizeof proxy) < 0)
        fail("connect");
    memcpy(head, hello, hello_size);
    head[hello_size] = role;
    memcpy(head + hello_size + 1, &number, sizeof number);
    if (send(fd, head, hello_size + COMMAND, MSG_NOSIGNAL) != hello_size + COMMAND)
        fail("send");
    enter(fd, role);
    return fd;
}

static void await_byte(int fd)
{
    char byte;
    ssize_t got = recv(fd, &byte, 1, 0);
    if (got != 1 || byte != '!') {
        if (got >= 0)
            errno = ECONNRESET;
        fail("get an answer from the backend");
    }
}

static void connect_load(int hosts, int at_a_time, long count)
{
    long begun = 0, ended = 0;
    long first = getpid() * 4099L % hosts; /* anywhere: the next run is to see other hosts */
    struct epoll_event events[MOST_EVENTS];
    double began = now();
    while (ended < count) {
        for (; begun < count && begun - ended < at_a_time; begun++) {
            if (hosts > 1 && digits) {
                long number = (first + begun) % hosts;
                for (int i = 4; i >= 0; i--, number /= 10)
                    digits[i] = '0' + number % 10;
            }
            watch(greet(CONNECT, 0), EPOLLIN);
        }
        int ready = epoll_wait(epoll, events, MOST_EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            await_byte(events[i].data.fd);
            close(events[i].data.fd);
            ended++;
        }
    }
    printf("seconds %.6f\n", now() - began);
}

static void bulk_load(const char *direction, int streams, uint64_t bytes)
{
    enum role role = *direction;
    int left = streams;
    struct epoll_event events[MOST_EVENTS];
    double began = now();
    for (int i = 0; i < streams; i++) {
        int fd = greet(role, bytes);
        connections[fd].to_send = role == DOWN ? 0 : bytes;
        connections[fd].to_receive = role == UP ? 1 : bytes;
        watch(fd, EPOLLIN | EPOLLET | (role == DOWN ? 0 : EPOLLOUT));
    }
    while (left) {
        int ready = epoll_wait(epoll, events, MOST_EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            struct connection *connection = &connections[fd];
            send_more(fd, connection);
            if (!receive_more(fd, connection)) {
                errno = ECONNRESET;
                fail("get all from the backend");
            }
            if (!connection->to_send && !connection->to_receive) {
                close(fd);
                left--;
            }
        }
    }
    printf("seconds %.6f\n", now() - began);
}

/* One byte there and back, on every connection again and again, `count` times in all. */
static void ping_load(int many, long count)
{
    double *times = malloc(count * sizeof *times);
    struct epoll_event events[MOST_EVENTS];
    int *fds = malloc(many * sizeof *fds);
    long sent = 0, got = 0;
    for (int i = 0; i < many; i++) {
        fds[i] = greet(ECHO, 0);
        await_byte(fds[i]);
        watch(fds[i], EPOLLIN);
    }
    say_ready();
    getchar();
    double began = now();
    for (int i = 0; i < many && sent < count; i++, sent++) {
        connections[fds[i]].sent_at = now();
        send(fds[i], "!", 1, MSG_NOSIGNAL);
    }
    while (got < count) {
        int ready = epoll_wait(epoll, events, MOST_EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            await_byte(fd);
            double time = now();
            times[got++] = time - connections[fd].sent_at;
            if (sent < count) {
                sent++;
                connections[fd].sent_at = time;
                send(fd, "!", 1, MSG_NOSIGNAL);
            }
        }
    }
    print_round_trips(now() - began, times, count);
}

static void idle_load(int count)
{
    for (int i = 0; i < count; i++)
        await_byte(greet(CONNECT, 0));
    rest();
}

int main(int argc, char **argv)
{
    prepare();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        fail("make an epoll set");
    if (argc == 4 && !strcmp(argv[1], "backend")) {
        backend(argv[2], atoi(argv[3]));
    } else if (argc >= 5) {
        proxy = address_of(atoi(argv[2]));
        read_hello(argv[3]);
        alarm(PATIENCE);
        if (!strcmp(argv[1], "connect") && argc == 7)
            return connect_load(atoi(argv[4]), atoi(argv[5]), atol(argv[6])), 0;
        if (!strcmp(argv[1], "bulk") && argc == 7)
            return bulk_load(argv[4], atoi(argv[5]), strtoull(argv[6], NULL, 10)), 0;
        if (!strcmp(argv[1], "ping") && argc == 6)
            return ping_load(atoi(argv[4]), atol(argv[5])), 0;
        if (!strcmp(argv[1], "idle"))
            return idle_load(atoi(argv[4])), 0;
    }
    fprintf(stderr, "load: called wrongly; its first lines say how\n");
    return 100;
}
