/* A vfio-user client that measures, and a tiny server to measure beside ours. Plain C, so that neither end is what counts.
 *
 *   registers client SOCKET REGION   then on stdin, a line each, answered by a line with a time in nanoseconds:
 *       read OFFSET COUNT THINK_US [1]   the median of round trips of 8-byte reads, after a pause each; with 1 it waits
 *                                        for the answer in poll(2), as QEMU does, else in recv(2)
 *       write OFFSET COUNT               one of many posted 4-byte writes, until all have been handled
 *   registers server SOCKET          answers every request with zeros, for one client
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { VERSION = 1, REGION_READ = 9, REGION_WRITE = 10 };
enum { REPLY = 1, NO_REPLY = 0x10 };

struct message {
    uint16_t id, command;
    uint32_t size, flags, error;
    uint64_t offset;
    uint32_t region, count;
    char data[65536];
} __attribute__((packed));

enum { HEADER = 16, ACCESS = 32 };

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int receive(int fd, void *to, size_t size) {
    for (size_t got = 0; got < size;) {
        ssize_t n = recv(fd, (char *)to + got, size - got, 0);
        if (n <= 0)
            return 0;
        got += n;
    }
    return 1;
}

static void send_all(int fd, const void *from, size_t size) {
    for (size_t sent = 0; sent < size;) {
        ssize_t n = send(fd, (const char *)from + sent, size - sent, MSG_NOSIGNAL);
        if (n <= 0)
            fail("send");
        sent += n;
    }
}

static void receive_reply(int fd, struct message *reply) {
    if (!receive(fd, reply, HEADER) || reply->size > sizeof *reply || !receive(fd, &reply->offset, reply->size - HEADER))
        fail("the server has left");
    if (reply->error) {
        fprintf(stderr, "error %u\n", reply->error);
        exit(1);
    }
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static struct message reply;

static int64_t read_round_trip(int fd, uint32_t region, uint64_t offset, int polls) {
    struct message request = {.command = REGION_READ, .size = ACCESS, .offset = offset, .region = region, .count = 8};
    int64_t begin = now();
    struct pollfd answered = {.fd = fd, .events = POLLIN};
    send_all(fd, &request, ACCESS);
    if (polls)
        poll(&answered, 1, -1);
    receive_reply(fd, &reply);
    return now() - begin;
}

static int64_t median_read(int fd, uint32_t region, uint64_t offset, int count, int think_us, int polls) {
    int64_t *took = calloc(count, sizeof *took);
    struct timespec pause = {.tv_nsec = think_us * 1000L};
    for (int i = 0; i < count; i++) {
        if (think_us)
            nanosleep(&pause, NULL);
        took[i] = read_round_trip(fd, region, offset, polls);
    }
    qsort(took, count, sizeof *took, by_size);
    int64_t median = took[count / 2];
    free(took);
    return median;
}

static int64_t posted_write(int fd, uint32_t region, uint64_t offset, int count) {
    struct message request = {
        .command = REGION_WRITE, .size = ACCESS + 4, .flags = NO_REPLY, .offset = offset, .region = region, .count = 4};
    int64_t begin = now();
    for (int i = 0; i < count; i++)
        send_all(fd, &request, ACCESS + 4);
    /* Requests are handled in their order: when this one is answered, all are done. */
    read_round_trip(fd, region, offset & ~7ULL, 0);
    return (now() - begin) / count;
}

static int client(int fd, uint32_t region) {
    struct message hello = {.command = VERSION};
    const char capabilities[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8}}";
    hello.size = HEADER + sizeof capabilities;
    memcpy(&hello.offset, capabilities, sizeof capabilities);
    send_all(fd, &hello, hello.size);
    receive_reply(fd, &reply);
    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long offset;
        int count, think_us = 0, polls = 0;
        if (sscanf(line, "read %li %d %d %d", &offset, &count, &think_us, &polls) >= 3)
            printf("%lld\n", (long long)median_read(fd, region, offset, count, think_us, polls));
        else if (sscanf(line, "write %li %d", &offset, &count) == 2)
            printf("%lld\n", (long long)posted_write(fd, region, offset, count));
        fflush(stdout);
    }
    return 0;
}

static int server(int listener) {
    static struct message request;
    int fd = accept(listener, NULL, NULL);
    while (receive(fd, &request, HEADER) && request.size <= sizeof request &&
           receive(fd, &request.offset, request.size - HEADER)) {
        if (request.flags & NO_REPLY)
            continue;
        if (request.command == REGION_READ)
            request.size = ACCESS + request.count;
        request.flags = REPLY;
        send_all(fd, &request, request.size);
    }
    return 0;
}

int main(int argc, char **argv) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc < 3)
        return 2;
    strncpy(address.sun_path, argv[2], sizeof address.sun_path - 1);
    if (argc == 4) {
        if (connect(fd, (struct sockaddr *)&address, sizeof address))
            fail("connect");
        return client(fd, atoi(argv[3]));
    }
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1))
        fail("bind");
    return server(fd);
}
