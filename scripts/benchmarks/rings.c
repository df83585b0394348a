/* The floor under the ring engines: what a device must do for each chain, and nothing else, in C.
 *
 *   rings SHAPE BURST COUNT     on stdin nothing, on stdout the CPU time per chain in nanoseconds
 *
 * The program is driver and device. A driver's part that is timed as well is as small as in the Python benchmark: it
 * makes a burst available. SHAPE: {split,packed}-{1,3,indirect}; EVENT_IDX is on.
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 1 << 7, USED = 1 << 15 };
enum { DESC = 0, DRIVER = 0x10000, DEVICE = 0x20000, TABLES = 0x80000, DATA = 0x100000, RAM = 0x400000 };

struct split_desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct packed_desc { uint64_t addr; uint32_t len; uint16_t id, flags; };
struct segment { uint8_t *at; uint32_t len; };

static uint8_t *ram;
static unsigned size, pieces;
static int indirect;
static struct segment segments[8];

static void fail(const char *what) { fprintf(stderr, "rings: %s\n", what); exit(1); }

static uint8_t *translate(uint64_t addr, uint64_t len)
{
    if (addr > RAM || len > RAM - addr)
        fail("hole");
    return ram + addr;
}

static void use(unsigned count)
{
    /* "A device": somebody looks at every segment. */
    __asm__ volatile("" : : "r"(segments), "r"(count) : "memory");
}

static void fill(void *at, unsigned i, unsigned piece, int packed, unsigned link, unsigned marks)
{
    static const uint32_t lengths[] = {16, 2048, 1}, starts[] = {0, 16, 4000};
    uint64_t addr = DATA + 4096ull * i + (pieces == 1 ? 0 : starts[piece]);
    uint32_t len = pieces == 1 ? 4096 : lengths[piece];
    uint16_t flags = (pieces == 1 || piece ? WRITE : 0) | (link && piece + 1 < pieces ? NEXT : 0) | marks;
    if (packed)
        *(struct packed_desc *)at = (struct packed_desc){addr, len, i, flags};
    else
        *(struct split_desc *)at = (struct split_desc){addr, len, flags, link && piece + 1 < pieces ? link : 0};
}

/* ---- split ---- */

static unsigned split_chain(uint16_t head)
{
    struct split_desc *table = (void *)(ram + DESC);
    unsigned limit = size, found = 0, index = head;
    for (;;) {
        if (index >= limit || found >= limit || found >= 8)
            fail("link");
        struct split_desc d = table[index];
        if (d.flags & INDIRECT) {
            if (limit != size || d.len % sizeof d || !d.len)
                fail("table");
            table = (void *)translate(d.addr, d.len);
            limit = d.len / sizeof d;
            index = 0;
            continue;
        }
        segments[found++] = (struct segment){translate(d.addr, d.len), d.len};
        if (!(d.flags & NEXT))
            return found;
        index = d.next;
    }
}

static void split(unsigned burst, unsigned long rounds)
{
    _Atomic uint16_t *avail = (void *)(ram + DRIVER), *used = (void *)(ram + DEVICE);
    uint32_t *elements = (uint32_t *)(ram + DEVICE + 4);
    uint16_t last = avail[1], index = used[1], interrupts = 0;
    while (rounds--) {
        atomic_store_explicit(&avail[1], avail[1] + burst, memory_order_release);
        uint16_t now = atomic_load_explicit(&avail[1], memory_order_acquire), old = index;
        while (last != now) {
            uint16_t head = avail[2 + (last++ & (size - 1))];
            use(split_chain(head));
            elements[2 * (index & (size - 1))] = head;
            elements[2 * (index++ & (size - 1)) + 1] = 4096;
        }
        atomic_store_explicit(&used[1], index, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        interrupts += (uint16_t)(index - avail[2 + size] - 1) < (uint16_t)(index - old);
        used[2 + 4 * size] = last;
        atomic_thread_fence(memory_order_seq_cst);
        if (avail[1] != last)
            fail("race");
    }
    use(interrupts);
}

/* ---- packed ---- */

static void packed(unsigned burst, unsigned long rounds)
{
    struct packed_desc *ring = (void *)(ram + DESC);
    _Atomic uint32_t *driver = (void *)(ram + DRIVER), *device = (void *)(ram + DEVICE);
    unsigned next = 0, each = indirect ? 1 : pieces, interrupts = 0;
    uint16_t wrap = 1;
    while (rounds--) {
        unsigned at = next, turn = wrap;
        for (unsigned i = 0; i < burst * each; i++) {
            if (indirect)
                ring[at] = (struct packed_desc){TABLES + 64 * at, 48, at, INDIRECT | (turn ? AVAIL : USED)};
            else
                fill(&ring[at], at / each * each, at % each, 1, 1, turn ? AVAIL : USED);
            if (++at == size)
                at = 0, turn = !turn;
        }
        atomic_thread_fence(memory_order_release);
        for (unsigned taken = 0; taken < burst; taken++) {
            unsigned found = 0, slot = next;
            uint16_t id, mark = wrap;
            struct packed_desc d;
            do {
                uint16_t flags = atomic_load_explicit((_Atomic uint16_t *)&ring[slot].flags, memory_order_acquire);
                if ((flags & (AVAIL | USED)) != (mark ? AVAIL : USED) || found >= 8)
                    fail("list");
                d = ring[slot];
                id = d.id;
                if (d.flags & INDIRECT) {
                    struct packed_desc *table = (void *)translate(d.addr, d.len);
                    for (unsigned i = 0; i < d.len / sizeof d && i < 8; i++)
                        segments[found++] = (struct segment){translate(table[i].addr, table[i].len), table[i].len};
                } else {
                    segments[found++] = (struct segment){translate(d.addr, d.len), d.len};
                }
                if (++slot == size)
                    slot = 0, mark = !mark;
            } while (d.flags & NEXT);
            use(found);
            uint64_t word = 4096 | (uint64_t)id << 32 | (uint64_t)(WRITE | (wrap ? AVAIL | USED : 0)) << 48;
            atomic_store_explicit((_Atomic uint64_t *)&ring[next].len, word, memory_order_release);
            next = slot;
            wrap = mark;
        }
        atomic_thread_fence(memory_order_seq_cst);
        uint32_t event = *driver;
        interrupts += (event >> 16 & 3) != 1 && (event & 0xffff) == next;
        *device = 2u << 16 | next | (uint32_t)wrap << 15;
        atomic_thread_fence(memory_order_seq_cst);
    }
    use(interrupts);
}

static double cpu_time(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        fail("usage: rings SHAPE BURST COUNT");
    int is_packed = !strncmp(argv[1], "packed", 6);
    indirect = strstr(argv[1], "indirect") != NULL;
    pieces = indirect || strstr(argv[1], "-3") ? 3 : 1;
    unsigned each = indirect ? 1 : pieces, burst = atoi(argv[2]);
    size = each == 1 ? 256 : is_packed ? 384 : 512;
    ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        fail("mmap");
    for (unsigned i = 0; i < 256; i++)
        for (unsigned piece = 0; indirect && piece < 3; piece++)
            fill(ram + TABLES + 64 * i + 16 * piece, i, piece, is_packed, is_packed ? 0 : piece + 1, 0);
    if (!is_packed) {
        struct split_desc *table = (void *)(ram + DESC);
        uint16_t *heads = (uint16_t *)(ram + DRIVER + 4);
        unsigned chains = each == 3 ? 128 : 256;
        for (unsigned i = 0; i < size; i++)
            heads[i] = i % chains * each;
        for (unsigned i = 0; i < chains * each; i++)
            if (indirect)
                table[i] = (struct split_desc){TABLES + 64 * i, 48, INDIRECT, 0};
            else
                fill(&table[i], i, i % each, 0, i + 1, 0);
    }
    unsigned long rounds = strtoul(argv[3], NULL, 0) / burst;
    double start = cpu_time();
    (is_packed ? packed : split)(burst, rounds);
    printf("%.3f\n", (cpu_time() - start) / rounds / burst);
    return 0;
}
