/* Network load for scripts/bench net: small, static, the same program at both ends.
 *
 *   netload serve PORT                    answers until it is killed, on TCP and UDP
 *   netload tcp-out ADDRESS PORT MS       sends;  prints MB/s and bytes that the other end has got
 *   netload tcp-in  ADDRESS PORT MS       gets;   the same
 *   netload udp-out ADDRESS PORT MS       sends datagrams in frames of 64 bytes; prints k/s and how many have arrived
 *   netload udp-in  ADDRESS PORT MS       gets them; the same
 *   netload rr      ADDRESS PORT MS       a byte there and back over TCP, again and again;
 *                                         prints round trips per second, how many, and the 99th percentile in us
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAYLOAD = 18, BATCH = 32, MAX_TIMES = 1 << 20 }; /* 14 + 20 + 8 + 18 bytes, and 4 of FCS */
static char buffer[128 << 10];

static void die(const char *what) {
    fprintf(stderr, "netload: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int udp_socket(uint32_t address, int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = address};
    int one = 1, size = 4 << 20, fd = socket(AF_INET, SOCK_DGRAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
    if (bind(fd, (struct sockaddr *)&at, sizeof at)) die("bind");
    return fd;
}

/* Datagrams as fast as they go, for so many seconds. */
static void flood(int fd, double seconds) {
    struct iovec piece = {buffer, PAYLOAD};
    struct mmsghdr messages[BATCH];
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < BATCH; i++) messages[i].msg_hdr = (struct msghdr){.msg_iov = &piece, .msg_iovlen = 1};
    for (double end = now() + seconds; now() < end;)
        if (sendmmsg(fd, messages, BATCH, 0) < 0 && errno != ENOBUFS && errno != ECONNREFUSED) die("sendmmsg");
}

/* Packets that this machine's interfaces have got: what a slow program loses of them is no fault of the network's. */
static uint64_t received(void) {
    char line[512], *colon;
    uint64_t total = 0;
    FILE *file = fopen("/proc/net/dev", "r");
    while (file && fgets(line, sizeof line, file)) {
        unsigned long long bytes, packets;
        if ((colon = strchr(line, ':')) && sscanf(colon + 1, "%llu %llu", &bytes, &packets) == 2) total += packets;
    }
    if (file) fclose(file);
    return total;
}

struct arrived {
    uint64_t packets;
    double seconds; /* from the first datagram to the last: what is in buffers on the way arrives after the sender's end */
};

/* Reads datagrams until `stop` can be read, or has nothing more to come; returns how many packets came meanwhile. */
static struct arrived count(int fd, int stop) {
    static char data[BATCH][64];
    struct iovec pieces[BATCH];
    struct mmsghdr messages[BATCH];
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < BATCH; i++) {
        pieces[i] = (struct iovec){data[i], sizeof data[i]};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &pieces[i], .msg_iovlen = 1};
    }
    uint64_t before = received();
    double first = 0, last = 0;
    for (;;) {
        if (recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL) > 0) {
            last = now();
            if (!first) first = last;
            continue;
        }
        struct pollfd both[] = {{fd, POLLIN, 0}, {stop, POLLIN, 0}};
        poll(both, 2, -1);
        if (both[1].revents && !(both[0].revents & POLLIN))
            return (struct arrived){received() - before, last > first ? last - first : 1};
    }
}

static uint64_t drain(int fd) {
    uint64_t total = 0;
    for (ssize_t got; (got = recv(fd, buffer, sizeof buffer, 0)) > 0;) total += got;
    return total;
}

static void answer(int fd, int port) {
    char what;
    uint32_t ms;
    uint64_t total = 0;
    struct arrived arrived;
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    if (recv(fd, &what, 1, 0) != 1 || recv(fd, &ms, sizeof ms, MSG_WAITALL) != sizeof ms) return;
    int udp = what == 'U' || what == 'u' ? udp_socket(INADDR_ANY, port) : -1;
    if (send(fd, "k", 1, 0) != 1) return;
    switch (what) {
    case 'T': /* the client sends */
        total = drain(fd);
        send(fd, &total, sizeof total, 0);
        break;
    case 't':
        for (double end = now() + ms / 1e3; now() < end;)
            if (send(fd, buffer, sizeof buffer, MSG_NOSIGNAL) < 0) return;
        break;
    case 'U':
        arrived = count(udp, fd);
        send(fd, &arrived, sizeof arrived, 0);
        break;
    case 'u':
        if (recvfrom(udp, buffer, sizeof buffer, 0, (struct sockaddr *)&peer, &size) < 0) return;
        if (connect(udp, (struct sockaddr *)&peer, size)) return;
        flood(udp, ms / 1e3);
        break;
    case 'r':
        for (ssize_t got; (got = recv(fd, buffer, sizeof buffer, 0)) > 0;)
            if (send(fd, buffer, got, MSG_NOSIGNAL) < 0) return;
    }
}

static void serve(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 8)) die("listen");
    signal(SIGCHLD, SIG_IGN);
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) continue;
        if (!fork()) {
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            answer(fd, port);
            exit(0);
        }
        close(fd);
    }
}

static int compare(const void *one, const void *other) {
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

/* Connected, and told what to do. */
static int client(struct sockaddr_in *to, char what, uint32_t ms) {
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)to, sizeof *to)) die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    char request[1 + sizeof ms], ready;
    request[0] = what;
    memcpy(request + 1, &ms, sizeof ms);
    if (send(fd, request, sizeof request, 0) != sizeof request || recv(fd, &ready, 1, 0) != 1) die("no answer");
    return fd;
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "serve")) serve(atoi(argv[2]));
    if (argc != 5) return 2;
    const char *what = argv[1];
    int port = atoi(argv[3]);
    uint32_t ms = atoi(argv[4]);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (!inet_aton(argv[2], &to.sin_addr)) return 2;
    uint64_t total = 0;
    struct arrived arrived;
    double begin, seconds;
    if (!strcmp(what, "tcp-out")) {
        int fd = client(&to, 'T', ms);
        begin = now();
        while (now() < begin + ms / 1e3)
            if (send(fd, buffer, sizeof buffer, 0) < 0) die("send");
        shutdown(fd, SHUT_WR);
        if (recv(fd, &total, sizeof total, MSG_WAITALL) != sizeof total) die("no total");
        seconds = now() - begin;
        printf("%.3f %llu\n", total / 1e6 / seconds, (unsigned long long)total);
    } else if (!strcmp(what, "tcp-in")) {
        int fd = client(&to, 't', ms);
        begin = now();
        total = drain(fd);
        seconds = now() - begin;
        printf("%.3f %llu\n", total / 1e6 / seconds, (unsigned long long)total);
    } else if (!strcmp(what, "udp-out")) {
        int fd = client(&to, 'U', ms), udp = udp_socket(INADDR_ANY, 0);
        if (connect(udp, (struct sockaddr *)&to, sizeof to)) die("connect");
        flood(udp, ms / 1e3);
        usleep(50000); /* for the last of them to arrive */
        shutdown(fd, SHUT_WR);
        if (recv(fd, &arrived, sizeof arrived, MSG_WAITALL) != sizeof arrived) die("no total");
        printf("%.3f %llu\n", arrived.packets / 1e3 / arrived.seconds, (unsigned long long)arrived.packets);
    } else if (!strcmp(what, "udp-in")) {
        int fd = client(&to, 'u', ms), udp = udp_socket(INADDR_ANY, 0);
        if (connect(udp, (struct sockaddr *)&to, sizeof to) || send(udp, buffer, PAYLOAD, 0) < 0) die("send");
        arrived = count(udp, fd);
        printf("%.3f %llu\n", arrived.packets / 1e3 / arrived.seconds, (unsigned long long)arrived.packets);
    } else if (!strcmp(what, "rr")) {
        static float times[MAX_TIMES];
        int fd = client(&to, 'r', ms);
        begin = now();
        double end = begin + ms / 1e3, last = begin;
        while (last < end && total < MAX_TIMES) {
            if (send(fd, buffer, 1, 0) != 1 || recv(fd, buffer, 1, 0) != 1) die("round trip");
            double at = now();
            times[total++] = (at - last) * 1e6;
            last = at;
        }
        qsort(times, total, sizeof *times, compare);
        printf("%.3f %llu %.1f\n", total / (last - begin), (unsigned long long)total, times[total * 99 / 100]);
    } else {
        return 2;
    }
    return 0;
}
