/* A block driver that behaves as SPDK's does, and the least that a server could do for it, in C both.
 *
 *   requests client SOCKET BYTES     drives a virtio-blk device of BYTES by vfio-user messages and a memfd of its own
 *   requests loop BYTES [FILE [direct]]   the same driver; the device is a loop in a thread: poll, check, copy or pread
 *                                         (direct: with O_DIRECT), used
 *
 * Then on stdin, a line each, "DEPTH SIZE MILLISECONDS": so many reads of SIZE bytes are kept under way, each at random
 * and made available as soon as another one is back. The answer is a line: how many were served, and in how many ns.
 * As SPDK's: VERSION without data, one split queue as large as the device says, no SET_IRQS, and never a notification.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { VERSION = 1, DMA_MAP = 2, REGION_READ = 9, REGION_WRITE = 10, CONFIG = 7, BAR4 = 4 };
enum { FEATURE_SELECT = 0, FEATURE = 4, DRIVER_SELECT = 8, DRIVER_FEATURE = 12, STATUS = 20, SELECT = 22, SIZE = 24,
       ENABLE = 28, DESC = 32, DRIVER = 40, DEVICE = 48 };
enum { NEXT = 1, WRITE = 2, EVENT_IDX = 1 << 29 };
enum { MAX_DEPTH = 128, MAX_SIZE = 128 << 10, SECTOR = 512 };
/* In guest memory: the rings, a header and a status byte for each request, and its data. */
enum { TABLE = 0, AVAIL = 0x10000, USED = 0x20000, HEADERS = 0x40000, DATA = 0x100000, RAM = DATA + MAX_DEPTH * MAX_SIZE };
#define IOVA 0x200000000000ull /* where DPDK has its memory, and takes its virtual addresses for the device's */

struct descriptor { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct request { uint32_t type, reserved; uint64_t sector; uint8_t status, unused[15]; };
struct used_element { uint32_t id, len; };

static uint8_t *ram;
static int ram_fd;
static uint64_t capacity;
static unsigned entries;
static uint16_t made, seen; /* avail->idx, and used->idx as far as it has been looked at */
static uint64_t state = 88172645463325252ull;

static void fail(const char *what)
{
    fprintf(stderr, "requests: %s\n", what);
    exit(1);
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static uint64_t xorshift(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

/* ---- the socket ---- */

struct message {
    uint16_t id, command;
    uint32_t size, flags, error;
    uint8_t body[4096];
} __attribute__((packed));

struct access { uint64_t offset; uint32_t region, count; uint64_t value; } __attribute__((packed));

static int connection;

static void receive(void *to, size_t size)
{
    for (size_t got = 0; got < size;) {
        ssize_t n = recv(connection, (char *)to + got, size - got, 0);
        if (n <= 0)
            fail("the server has left");
        got += n;
    }
}

static void call(unsigned command, void *body, size_t size, int fd)
{
    static struct message message;
    union { struct cmsghdr align; char room[CMSG_SPACE(sizeof fd)]; } control;
    struct iovec part = {&message, 16 + size};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    message = (struct message){.command = command, .size = 16 + size}; /* every id is 0 */
    memcpy(message.body, body, size);
    if (fd >= 0) {
        header.msg_control = &control, header.msg_controllen = sizeof control;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        *rights = (struct cmsghdr){CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    if (sendmsg(connection, &header, MSG_NOSIGNAL) != (ssize_t)part.iov_len)
        fail("sendmsg");
    receive(&message, 16);
    if (message.size < 16 || message.size > sizeof message)
        fail("a reply's size");
    receive(message.body, message.size - 16);
    if (message.error)
        fail(strerror(message.error));
    if (command == REGION_READ)
        memcpy(body, message.body, message.size - 16);
}

static uint64_t get(unsigned offset, unsigned count)
{
    struct access access = {offset, BAR4, count, 0};
    call(REGION_READ, &access, 16, -1);
    return access.value;
}

static void put(unsigned region, unsigned offset, unsigned count, uint64_t value)
{
    struct access access = {offset, region, count, value};
    call(REGION_WRITE, &access, 16 + count, -1);
}

static void put_status(unsigned status)
{
    put(BAR4, STATUS, 1, status);
    if (get(STATUS, 1) != status)
        fail("the status is not what was written");
}

static void put_address(unsigned offset, uint64_t address)
{
    put(BAR4, offset, 4, address & 0xffffffff);
    put(BAR4, offset + 4, 4, address >> 32);
}

static void bring_up(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct { uint32_t argsz, flags; uint64_t offset, address, size; } map = {32, 3, 0, IOVA, RAM};
    uint16_t version[2] = {0, 1};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    connection = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(connection, (struct sockaddr *)&address, sizeof address))
        fail("connect");
    call(VERSION, version, sizeof version, -1);
    call(DMA_MAP, &map, sizeof map, ram_fd);
    put(CONFIG, 4, 2, 0x406); /* memory, bus master, no INTx */
    put_status(0), put_status(1), put_status(3);
    put(BAR4, FEATURE_SELECT, 4, 0);
    put(BAR4, DRIVER_SELECT, 4, 0);
    put(BAR4, DRIVER_FEATURE, 4, get(FEATURE, 4) & EVENT_IDX);
    put(BAR4, DRIVER_SELECT, 4, 1);
    put(BAR4, DRIVER_FEATURE, 4, 1); /* VERSION_1 */
    put_status(11);
    put(BAR4, SELECT, 2, 0);
    entries = get(SIZE, 2);
    if (entries < 3 || entries > 4096)
        fail("the size of queue 0");
    put_address(DESC, IOVA + TABLE), put_address(DRIVER, IOVA + AVAIL), put_address(DEVICE, IOVA + USED);
    put(BAR4, ENABLE, 2, 1);
    put_status(15);
}

/* ---- the least that a device must do, in a thread ---- */

static uint8_t *disk;
static int file = -1;
/* Between two runs the loop waits for this: others are measured then, and one that only naps takes a third from them. */
static sem_t begins;
static _Atomic int active;

static uint8_t *translate(uint64_t addr, uint64_t len)
{
    if (addr < IOVA || addr - IOVA > RAM || len > RAM - (addr - IOVA))
        fail("hole");
    return ram + (addr - IOVA);
}

static uint32_t carry_out(uint16_t head)
{
    struct descriptor *table = (void *)(ram + TABLE), d[3];
    for (unsigned i = 0, at = head; i < 3; i++) {
        if (at >= entries)
            fail("link");
        d[i] = table[at];
        at = d[i].next;
    }
    if (d[0].flags != NEXT || d[1].flags != (NEXT | WRITE) || d[2].flags != WRITE || d[0].len != 16 || d[2].len != 1)
        fail("framing");
    struct request *header = (void *)translate(d[0].addr, 16);
    uint8_t *data = translate(d[1].addr, d[1].len), *status = translate(d[2].addr, 1);
    uint64_t offset = header->sector * SECTOR;
    if (header->type || d[1].len % SECTOR || offset > capacity || d[1].len > capacity - offset)
        fail("request");
    if (file < 0)
        memcpy(data, disk + offset, d[1].len);
    else if (pread(file, data, d[1].len, offset) != d[1].len)
        fail("pread");
    *status = 0;
    return d[1].len + 1;
}

static void *device_loop(void *unused)
{
    _Atomic uint16_t *avail = (void *)(ram + AVAIL), *used = (void *)(ram + USED);
    struct used_element *elements = (void *)(ram + USED + 4);
    for (uint16_t last = 0, index = 0;;) {
        uint16_t there = atomic_load_explicit(&avail[1], memory_order_acquire);
        if (last == there) {
            if (!active)
                sem_wait(&begins);
            continue;
        }
        for (; last != there; last++, index++) {
            uint16_t head = avail[2 + last % entries];
            elements[index % entries] = (struct used_element){head, carry_out(head)};
        }
        atomic_store_explicit(&used[1], index, memory_order_release);
    }
    return unused;
}

static void start_loop(const char *path, int direct)
{
    pthread_t thread;
    entries = 512;
    if (path && (file = open(path, O_RDONLY | (direct ? O_DIRECT : 0))) < 0)
        fail("open");
    if (!path)
        disk = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (sem_init(&begins, 0, 0) || disk == MAP_FAILED || pthread_create(&thread, NULL, device_loop, NULL))
        fail("no room for a disk");
}

/* ---- the driver ---- */

static void make_available(unsigned slot, uint64_t blocks, unsigned size)
{
    _Atomic uint16_t *avail = (void *)(ram + AVAIL);
    struct request *request = (struct request *)(ram + HEADERS) + slot;
    request->sector = xorshift() % blocks * (size / SECTOR);
    request->status = 0xff;
    avail[2 + made++ % entries] = 3 * slot;
    atomic_store_explicit(&avail[1], made, memory_order_release);
}

static void lay_out(unsigned depth, unsigned size)
{
    struct descriptor *table = (void *)(ram + TABLE);
    for (unsigned i = 0; i < depth; i++) {
        uint64_t header = IOVA + HEADERS + i * sizeof(struct request);
        table[3 * i] = (struct descriptor){header, 16, NEXT, 3 * i + 1};
        table[3 * i + 1] = (struct descriptor){IOVA + DATA + i * MAX_SIZE, size, NEXT | WRITE, 3 * i + 2};
        table[3 * i + 2] = (struct descriptor){header + 16, 1, WRITE, 0};
    }
}

static void run(unsigned depth, unsigned size, unsigned milliseconds)
{
    _Atomic uint16_t *used = (void *)(ram + USED);
    struct used_element *elements = (void *)(ram + USED + 4);
    uint64_t blocks = capacity / size;
    unsigned long count = 0;
    if (!depth || depth > MAX_DEPTH || 3 * depth > entries || !size || size % SECTOR || size > MAX_SIZE || !blocks)
        fail("depth or size");
    lay_out(depth, size);
    active = 1;
    sem_post(&begins);
    int64_t begin = now(), end = begin + milliseconds * 1000000LL, progress = begin, at = begin;
    for (unsigned slot = 0; slot < depth; slot++)
        make_available(slot, blocks, size);
    while (seen != made) {
        uint16_t there = atomic_load_explicit(&used[1], memory_order_acquire);
        at = now();
        if (seen == there && at - progress > 10000000000LL)
            fail("no request has come back for 10 s");
        for (; seen != there; seen++, count++) {
            struct used_element element = elements[seen % entries];
            unsigned slot = element.id / 3;
            if (element.id % 3 || slot >= depth || element.len != size + 1)
                fail("a used element that nothing was asked for");
            if (((struct request *)(ram + HEADERS))[slot].status)
                fail("a request has failed");
            progress = at;
            if (at < end)
                make_available(slot, blocks, size);
        }
    }
    active = 0;
    printf("%lu %lld\n", count, (long long)(at - begin));
    fflush(stdout);
}

int main(int argc, char **argv)
{
    unsigned depth, size, milliseconds;
    int is_client = argc == 4 && !strcmp(argv[1], "client"), is_loop = argc >= 3 && !strcmp(argv[1], "loop");
    if (!is_client && !is_loop)
        fail("usage: requests client SOCKET BYTES | loop BYTES [FILE [direct]]");
    capacity = strtoull(argv[is_client ? 3 : 2], NULL, 0);
    ram_fd = memfd_create("ram", MFD_ALLOW_SEALING);
    if (ram_fd < 0 || ftruncate(ram_fd, RAM))
        fail("memfd_create");
    ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ram_fd, 0);
    if (ram == MAP_FAILED)
        fail("mmap");
    if (is_client)
        bring_up(argv[2]);
    else
        start_loop(argc > 3 ? argv[3] : NULL, argc > 4);
    printf("ready\n");
    fflush(stdout);
    while (scanf("%u %u %u", &depth, &size, &milliseconds) == 3)
        run(depth, size, milliseconds);
    return 0;
}
