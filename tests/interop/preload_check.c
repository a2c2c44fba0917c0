/* What shows in C alone, for a test that compiles it with packaging/handoff_preload.c:
 *
 *   preload_check LISTENER    accept with room for addresses of all sizes; then be cancelled
 *
 * Each client is in the queue before this starts. The sanitizers say what is wrong with memory.
 */

#define _GNU_SOURCE

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static int listener;

static int descriptors(void)
{
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void *wait_for_clients(void *unused)
{
    for (;;) { /* there may be a client, or a silent connection */
        int client = accept(listener, NULL, NULL), before;
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
        if (client >= 0)
            close(client);
        pthread_setcancelstate(before, NULL);
    }
    return unused;
}

int main(int argc, char **argv)
{
    listener = argc == 2 ? atoi(argv[1]) : -1;
    for (socklen_t room = 0; room <= 32; room += 4) {
        socklen_t size = room;
        struct sockaddr *address = malloc(room); /* so that no byte behind it may be touched */
        int client = accept4(listener, address, &size, SOCK_CLOEXEC);
        if (client < 0) {
            perror("accept4");
            return 1;
        }
        printf("%u\n", size);
        free(address);
        close(client);
    }
    int before = descriptors();
    pthread_t thread;
    void *result;
    pthread_create(&thread, NULL, wait_for_clients, NULL);
    /* Wherever it is by then, with a silent connection or without one. */
    nanosleep(&(struct timespec){.tv_nsec = 20 * 1000 * 1000}, NULL);
    pthread_cancel(thread);
    pthread_join(thread, &result);
    puts(result == PTHREAD_CANCELED ? "cancelled" : "not cancelled");
    printf("%d lost\n", descriptors() - before);
    return 0;
}
