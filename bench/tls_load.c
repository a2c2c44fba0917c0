/* Both ends of a benchmark of TLS: clients in front of a proxy, and the service behind it.
 *
 *   tls_load serve plain|tls PORT DIR              serve on 127.0.0.1:PORT; no session is resumed
 *   tls_load serve resumable PORT DIR              the same over TLS, with tickets
 *   tls_load connect|resume plain|tls PORT DIR AT_A_TIME COUNT
 *   tls_load down|up plain|tls PORT DIR BYTES
 *   tls_load ping plain|tls PORT DIR COUNT
 *   tls_load idle plain|tls PORT DIR COUNT BYTES   each moves BYTES down and up first; then they
 *                                                  stay until standard input ends
 *
 * One side of the proxy is plain and the other is TLS, with certificates both ways. DIR has the
 * identities, in client/ and server/: cert.pem, key.pem, ca.pem. Every client says CONNECT first,
 * and behind it a command: one letter and a number of eight bytes. Who answers the CONNECT is the
 * proxy, or the service if the proxy passes it on.
 *
 * Threads that wait: simple, and not what is measured. Results go to standard output as
 * "name value" lines, times in seconds.
 */

#include "load.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <pthread.h>

enum {
    PIECE = 1 << 16,      /* bytes sent or received at a time */
    STACK = PIECE * 4,    /* of a thread: two pieces, and what OpenSSL needs */
};

static const char CONNECT[] =
    "CONNECT service.example:443 HTTP/1.1\r\nHost: service.example:443\r\n\r\n";
static const char ANSWER[] = "HTTP/1.1 200 OK\r\n\r\n";

/* One end of a connection, with TLS or without. */
struct end {
    int fd;
    SSL *ssl;
};

static SSL_CTX *context; /* NULL: plain */
static int port;

static void fail(const char *what)
{
    perror(what);
    ERR_print_errors_fp(stderr);
    exit(111);
}

static int receive(struct end *end, char *data, int most)
{
    return end->ssl ? SSL_read(end->ssl, data, most) : recv(end->fd, data, most, 0);
}

/* Returns 0 if the peer has gone. */
static int send_all(struct end *end, const char *data, int size)
{
    while (size > 0) {
        int sent = end->ssl ? SSL_write(end->ssl, data, size)
                            : send(end->fd, data, size, MSG_NOSIGNAL);
        if (sent <= 0)
            return 0;
        data += sent;
        size -= sent;
    }
    return 1;
}

static int move(struct end *end, char *piece, uint64_t bytes, int down)
{
    while (bytes) {
        int size = bytes < PIECE ? bytes : PIECE;
        if (!down)
            size = receive(end, piece, size);
        else if (!send_all(end, piece, size))
            return 0;
        if (size <= 0)
            return 0;
        bytes -= size;
    }
    return 1;
}

static void leave(struct end *end)
{
    if (end->ssl) {
        SSL_shutdown(end->ssl);
        SSL_free(end->ssl);
    }
    close(end->fd);
}

static SSL_CTX *make_context(const SSL_METHOD *method, const char *directory, const char *who)
{
    char path[HEAD];
    SSL_CTX *made = SSL_CTX_new(method);
    snprintf(path, sizeof path, "%s/%s/cert.pem", directory, who);
    if (SSL_CTX_use_certificate_chain_file(made, path) != 1)
        fail(path);
    snprintf(path, sizeof path, "%s/%s/key.pem", directory, who);
    if (SSL_CTX_use_PrivateKey_file(made, path, SSL_FILETYPE_PEM) != 1)
        fail(path);
    snprintf(path, sizeof path, "%s/%s/ca.pem", directory, who);
    if (SSL_CTX_load_verify_locations(made, path, NULL) != 1)
        fail(path);
    SSL_CTX_set_verify(made, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    return made;
}

/* ---- the service ---- */

static void converse(struct end *end)
{
    char head[HEAD], piece[PIECE] = {0}, *at = head;
    int size = 0, begun = 0;
    for (;;) { /* a CONNECT, or none; then a command */
        int got = receive(end, head + size, HEAD - 1 - size);
        if (got <= 0)
            return;
        size += got;
        head[size] = 0;
        if (!begun && *head == 'C') {
            char *last = strstr(head, "\r\n\r\n");
            if (!last)
                continue;
            if (!send_all(end, ANSWER, sizeof ANSWER - 1))
                return;
            at = last + 4;
            begun = 1;
        }
        while (head + size - at >= COMMAND) {
            uint64_t number;
            char role = *at;
            memcpy(&number, at + 1, sizeof number);
            at += COMMAND;
            begun = 1;
            switch (role) {
            case 'c': /* tell whether the session was resumed */
                if (!send_all(end, end->ssl && SSL_session_reused(end->ssl) ? "r" : "!", 1))
                    return;
                break;
            case 'd':
                if (!move(end, piece, number, 1))
                    return;
                break;
            case 'u':
                number -= head + size - at; /* came with the command */
                at = head + size;
                if (!move(end, piece, number, 0) || !send_all(end, "!", 1))
                    return;
                break;
            case 'e':
                if (!send_all(end, "!", 1))
                    return;
                while ((got = receive(end, piece, PIECE)) > 0 && send_all(end, piece, got))
                    ;
                return;
            default:
                fprintf(stderr, "tls_load: no such command: %d\n", role);
                exit(111);
            }
        }
        if (at == head + size) {
            size = 0;
            at = head;
        }
    }
}

static void *serve_one(void *argument)
{
    struct end end = {.fd = (intptr_t)argument};
    set_nodelay(end.fd);
    if (context) {
        end.ssl = SSL_new(context);
        SSL_set_fd(end.ssl, end.fd);
        if (SSL_accept(end.ssl) == 1)
            converse(&end);
    } else {
        converse(&end);
    }
    leave(&end);
    return NULL;
}

static pthread_t begin(void *(*work)(void *), void *argument, int is_detached)
{
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    if (is_detached)
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &attributes, work, argument))
        fail("start a thread");
    return thread;
}

static void serve(void)
{
    int listening = listen_on(port, 0);
    say_ready();
    for (;;) {
        int fd = accept(listening, NULL, NULL);
        if (fd < 0)
            fail("accept");
        begin(serve_one, (void *)(intptr_t)fd, 1);
    }
}

/* ---- the clients ---- */

/* Connect, say CONNECT, and hear that it stands. */
static struct end greet(SSL_SESSION *earlier)
{
    struct sockaddr_in address = address_of(port);
    struct end end = {.fd = socket(AF_INET, SOCK_STREAM, 0)};
    char head[HEAD];
    int size = 0, got;
    set_nodelay(end.fd);
    if (connect(end.fd, (struct sockaddr *)&address, sizeof address))
        fail("connect");
    if (context) {
        end.ssl = SSL_new(context);
        SSL_set_fd(end.ssl, end.fd);
        SSL_set_tlsext_host_name(end.ssl, "peer.example");
        if (earlier)
            SSL_set_session(end.ssl, earlier);
        if (SSL_connect(end.ssl) != 1)
            fail("do the handshake");
    }
    if (!send_all(&end, CONNECT, sizeof CONNECT - 1))
        fail("say CONNECT");
    do {
        if ((got = receive(&end, head + size, HEAD - 1 - size)) <= 0)
            fail("hear an answer");
        size += got;
        head[size] = 0;
    } while (!strstr(head, "\r\n\r\n"));
    if (strncmp(head, "HTTP/1.", 7) || strncmp(head + 8, " 200", 4))
        fail(head);
    return end;
}

static void command(struct end *end, char role, uint64_t number)
{
    char bytes[COMMAND] = {role};
    memcpy(bytes + 1, &number, sizeof number);
    if (!send_all(end, bytes, COMMAND))
        fail("send a command");
}

static char await_byte(struct end *end)
{
    char byte;
    if (receive(end, &byte, 1) != 1)
        fail("get a byte");
    return byte;
}

static int left, resumed;
static SSL_SESSION *session; /* to be resumed, or NULL */

/* Do one connection; return whether its session was an earlier one's. */
static int connect_once(int keeps)
{
    struct end end = greet(session);
    command(&end, 'c', 0);
    int again = await_byte(&end) == 'r' || (end.ssl && SSL_session_reused(end.ssl));
    if (keeps && end.ssl)
        session = SSL_get1_session(end.ssl);
    leave(&end);
    return again;
}

static void *connect_some(void *unused)
{
    while (__atomic_fetch_sub(&left, 1, __ATOMIC_RELAXED) > 0)
        __atomic_fetch_add(&resumed, connect_once(0), __ATOMIC_RELAXED);
    return unused;
}

static void connect_load(int at_a_time, int count, int resumes)
{
    pthread_t threads[at_a_time];
    left = count;
    if (resumes)
        connect_once(1);
    double began = now();
    for (int i = 0; i < at_a_time; i++)
        threads[i] = begin(connect_some, NULL, 0);
    for (int i = 0; i < at_a_time; i++)
        pthread_join(threads[i], NULL);
    printf("seconds %.6f\nresumed %d\n", now() - began, resumed);
}

static void bulk(struct end *end, uint64_t bytes, int down)
{
    static char piece[PIECE];
    command(end, down ? 'd' : 'u', bytes);
    if (!move(end, piece, bytes, !down) || (!down && await_byte(end) != '!'))
        fail("move all");
}

static void bulk_load(uint64_t bytes, int down)
{
    struct end end = greet(NULL);
    double began = now();
    bulk(&end, bytes, down);
    printf("seconds %.6f\n", now() - began);
    leave(&end);
}

static void ping_load(int count)
{
    double *times = malloc(count * sizeof *times);
    struct end end = greet(NULL);
    command(&end, 'e', 0);
    await_byte(&end);
    double began = now();
    for (int i = 0; i < count; i++) {
        double sent = now();
        send_all(&end, "!", 1);
        await_byte(&end);
        times[i] = now() - sent;
    }
    print_round_trips(now() - began, times, count);
    leave(&end);
}

static void idle_load(int count, uint64_t bytes)
{
    for (int i = 0; i < count; i++) {
        struct end end = greet(NULL);
        if (bytes) {
            bulk(&end, bytes, 1);
            bulk(&end, bytes, 0);
        } else {
            command(&end, 'c', 0);
            await_byte(&end);
        }
    }
    rest();
}

int main(int argc, char **argv)
{
    prepare();
    if (argc >= 5) {
        const char *kind = argv[1], *how = argv[2], *directory = argv[4];
        int is_server = !strcmp(kind, "serve");
        port = atoi(argv[3]);
        if (strcmp(how, "plain"))
            context = make_context(is_server ? TLS_server_method() : TLS_client_method(), directory,
                                   is_server ? "server" : "client");
        if (is_server) {
            if (!strcmp(how, "tls")) {
                SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
                SSL_CTX_set_options(context, SSL_OP_NO_TICKET);
                SSL_CTX_set_num_tickets(context, 0);
            } else if (context) {
                SSL_CTX_set_session_id_context(context, (const unsigned char *)"load", 4);
            }
            return serve(), 0;
        }
        alarm(PATIENCE);
        int resumes = !strcmp(kind, "resume");
        if ((resumes || !strcmp(kind, "connect")) && argc == 7)
            return connect_load(atoi(argv[5]), atoi(argv[6]), resumes), 0;
        if (argc == 6 && !strcmp(kind, "ping"))
            return ping_load(atoi(argv[5])), 0;
        if (argc == 6 && (!strcmp(kind, "down") || !strcmp(kind, "up")))
            return bulk_load(strtoull(argv[5], NULL, 10), *kind == 'd'), 0;
        if (argc == 7 && !strcmp(kind, "idle"))
            return idle_load(atoi(argv[5]), strtoull(argv[6], NULL, 10)), 0;
    }
    fprintf(stderr, "tls_load: called wrongly; its first lines say how\n");
    return 100;
}
