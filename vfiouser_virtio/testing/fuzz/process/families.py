"""Families of attacks: each makes a case out of a random number generator, with counts, sizes, orders and flags drawn.

Of each of them one point is an attack that was once found by hand (docs/fuzzing.md, "Found again").
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from vfiouser_virtio.protocols.vfio_user import PciIrq
from vfiouser_virtio.testing.fuzz.process.case import HostileStep, ProcessCase
from vfiouser_virtio.testing.fuzz.process.configurations import configurations, log_files
from vfiouser_virtio.testing.fuzz.process.hostile_words import words
from vfiouser_virtio.testing.raw.long_chains import FAR, NEAR, PAGE

_OTHERS = ["rng", "rng"]
"""The device that is not attacked, and the neighbour's."""
_RAM = 16 << 20
_RING_AREAS = 0x30_0000


def mappings(random: Random) -> ProcessCase:
    """Clients that map page by page, as much as they may, and leave in any order while others stay or come."""
    clients = random.choice((1, 2, 2, 3))
    steps: list[HostileStep] = []
    for client in range(clients):
        steps.append({"do": "connect", "client": client, "device": client})
        count = random.choice((100, 3000, 16_000, 30_000, 40_000))
        base, step = random.choice((NEAR, NEAR, FAR)), random.choice((1, 2, 2, 3))
        steps.append({"do": "pages", "client": client, "base": base, "count": count, "step": step})
        if random.random() < 0.3:
            steps += [{"do": "start", "client": client}, {"do": "request", "client": client}]
    for client in random.sample(range(clients), random.randint(0, clients)):
        steps.append({"do": "leave", "client": client, "how": random.choice(("close", "half", "unmap", "busy"))})
        if random.random() < 0.5:
            steps.append({"do": "connect", "client": client, "device": client})
    return ProcessCase("mappings", ["rng"] * clients + _OTHERS, lanes=[steps], seconds=60)


def flags(random: Random) -> ProcessCase:
    """Flags and counters of shared eventfds that change between the server's look at them and its system call."""
    what = random.choice(("irq_race", "irq_race", "notification_race", "resample_race"))
    race: HostileStep = {"do": what, "client": 0, "seconds": random.choice((5, 10))}
    if what == "irq_race":
        race["dwell"] = random.choice((1, 1, 2, 5))
        race["index"] = int(random.choice((PciIrq.MSIX, PciIrq.MSIX, PciIrq.INTX, PciIrq.ERR, PciIrq.REQ)))
        race["batch"] = random.choice((50, 500, 2000))
        race["full"] = random.random() < 0.8
    else:
        race["spread"] = random.choice((30, 100, 300, 1000))
    steps: list[HostileStep] = [{"do": "connect", "client": 0, "device": 0}]
    if random.random() < 0.5:
        steps.append({"do": "start", "client": 0})
    return ProcessCase("flags", ["rng", *_OTHERS], lanes=[[*steps, race]])


def chains(random: Random) -> ProcessCase:
    """Many and long chains in one kick, in rings of all sizes, and in memory of many regions."""
    size = random.choice((None, None, 256, 1024, 32_768))
    packed = random.random() < 0.25
    device = random.choice(("rng", "rng", "rng", "console,chardev=null", "blk,size=1M"))
    if size is not None and device == "rng":
        device += f",queue-size={size}"
    if packed:
        device += ",packed=on"
    layout: HostileStep = {"do": "long_chains", "client": 0, "seconds": random.choice((3, 6)), "packed": packed}
    layout["table"] = random.choice((0, 0, 16, 1024))
    layout["length"] = random.choice((None, 2, 32, 50, 1000))
    layout["regions"] = random.choice((0, 0, 300, 3000, 20_000))
    layout["base"] = random.choice((NEAR, FAR))
    steps = [{"do": "connect", "client": 0, "device": 0}, layout]
    return ProcessCase("chains", [device, *_OTHERS], lanes=[steps], seconds=30)


_Writes = Sequence[tuple[str, int]]
_NEGOTIATION: _Writes = [("device_status", status) for status in (0, 1, 3, 11)]
_NOISE: _Writes = (
    ("device_status", 0), ("device_status", 11), ("device_status", 15), ("queue_size", 0), ("queue_size", 3),
    ("queue_enable", 1), ("queue_enable", 0), ("queue_select", 0), ("queue_select", 7), ("queue_desc", 1),
    ("queue_reset", 1), ("driver_feature_select", 9), ("driver_feature", 0xFFFFFFFF), ("queue_msix_vector", 999),
)  # fmt: skip


def logging(random: Random) -> ProcessCase:
    """Mistakes of which each is worth a line, over and over."""
    steps: list[HostileStep] = [{"do": "connect", "client": 0, "device": 0}]
    seconds = random.choice((3, 5))
    roll = random.random()
    if roll < 0.6:
        noise = list(_NEGOTIATION if random.random() < 0.5 else _NEGOTIATION[:1])
        noise += random.sample(_NOISE, random.randint(0, 4))
        steps.append({"do": "flood", "client": 0, "seconds": seconds, "writes": noise, "ask": random.random() < 0.7})
    elif roll < 0.8:
        descriptor = random.choice(([1 << 50, 4096, 2, 0], [0, 16, 1, 9999], [0, 0xFFFFFFFF, 2, 0], [0, 16, 1, 0]))
        steps += [{"do": "start", "client": 0}]
        steps += [{"do": "malformed", "client": 0, "seconds": seconds, "descriptor": descriptor}]
    else:
        steps.append({"do": "strangers", "device": 0, "seconds": seconds})
    unread = random.random() < 0.4
    return ProcessCase("logging", ["rng", *_OTHERS], stderr="unread" if unread else "read", lanes=[steps])


def truncation(random: Random) -> ProcessCase:
    """Memory whose file becomes shorter while the device uses it, or has no room for what it writes."""
    kind = random.choice(("unsealed", "unsealed", "file", "shm", "sparse"))
    length = random.choice((64, 4096, 65_536))
    steps: list[HostileStep] = [
        {"do": "connect", "client": 0, "device": 0, "memory": kind},
        {"do": "start", "client": 0},
        {"do": "request", "client": 0, "count": random.choice((1, 8, 64)), "length": length},
        {"do": "pause", "seconds": random.choice((0, 0.1))},
    ]
    if kind != "sparse":
        size = random.choice((0, PAGE, _RING_AREAS, _RAM // 2))
        steps.append({"do": "truncate", "client": 0, "size": size, "kicks": random.choice((0, 1, 5))})
    steps.append({"do": "pause", "seconds": 0.5})
    files = [{"do": "small_disk", "megabytes": random.choice((1, 2))}] if kind == "sparse" else []
    return ProcessCase("truncation", ["rng", *_OTHERS], foreign=True, files=files, lanes=[steps], seconds=5)


def hung_disks(random: Random) -> ProcessCase:
    """A disk of the host whose file system answers no more."""
    aio = random.choice(("", "", ",aio=io_uring", ",aio=threads"))
    op = random.choice(("READ", "READ", "WRITE", "FSYNC", "GETATTR", "STATFS"))
    header = {"READ": 0, "WRITE": 1, "FSYNC": 4}.get(op, random.choice((0, 1)))
    disk: HostileStep = {"do": "hanging_files", "name": "hung", "size": 1 << 20, "direct": random.random() < 0.7}
    steps: list[HostileStep] = [
        {"do": "connect", "client": 0, "device": 0},
        {"do": "start", "client": 0},
        {"do": "pause", "seconds": 0.5},
        {"do": "request", "client": 0, "count": random.choice((1, 4, 40)), "length": 4096, "header": header},
        {"do": "pause", "seconds": 1},
    ]
    host = [{"do": "hang", "op": op, "after": 0}]
    device = f"blk,path={{folder}}/hung/disk{aio}"
    return ProcessCase("hung_disks", [device, *_OTHERS], files=[disk], lanes=[steps], host=host)


def lost_rings(random: Random) -> ProcessCase:
    """A ring whose memory is gone, or read-only, when its queue is notified."""
    steps: list[HostileStep] = [{"do": "connect", "client": 0, "device": 0}, {"do": "start", "client": 0}]
    if random.random() < 0.5:
        steps += [{"do": "request", "client": 0}, {"do": "pause", "seconds": 0.1}]
    if random.random() < 0.5:
        steps.append({"do": "protect", "client": 0})
    else:
        steps.append({"do": "unmap", "client": 0, "base": 0, "size": _RAM})
    steps.append({"do": "request", "client": 0, "kicks": random.choice((1, 2, 50))})
    # What is said of clients that come and go would be something, too.
    return ProcessCase("lost_rings", ["rng", *_OTHERS], ["--log-level", "warning"], lanes=[steps], speaks=True)


def deaths(random: Random) -> ProcessCase:
    """The process of a device dies, with or without a client."""
    steps: list[HostileStep] = []
    if random.random() < 0.7:
        steps = [{"do": "connect", "client": 0, "device": 0}, {"do": "start", "client": 0}]
    steps.append({"do": "pause", "seconds": 1})
    kill: HostileStep = {"do": "kill_process", "index": 0, "after": random.choice((0, 0.3, 0.6))}
    kill["signal_name"] = random.choice(("SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT"))
    return ProcessCase("deaths", ["rng", *_OTHERS], ["--processes"], lanes=[steps], host=[kill])


def floods(random: Random) -> ProcessCase:
    """Clients that come and go, and notifications without an end."""
    steps: list[HostileStep] = []
    if random.random() < 0.5:
        how = random.choice(("close", "half", "unmap", "busy"))
        steps.append({"do": "visits", "device": 0, "count": random.choice((20, 60, 200)), "how": how})
    else:
        steps += [{"do": "connect", "client": 0, "device": 0}, {"do": "start", "client": 0}]
        steps.append({"do": "notify_flood", "client": 0, "seconds": 3, "queue": random.choice((0, 0, 1, 9))})
    device = random.choice(("rng", "console,chardev=null", "blk,size=1M"))
    return ProcessCase("floods", [device, *_OTHERS], lanes=[steps])


def streams(random: Random) -> ProcessCase:
    """A server whose stderr is not read, or is closed, and has something to say."""
    steps: list[HostileStep] = [{"do": "connect", "client": 0, "device": 0}, {"do": "start", "client": 0}]
    steps.append({"do": "malformed", "client": 0, "seconds": 0.5, "descriptor": [1 << 50, 4096, 2, 0]})
    return ProcessCase("streams", ["rng", *_OTHERS], stderr=random.choice(("unread", "closed")), lanes=[steps])


FAMILIES: Mapping[str, Callable[[Random], ProcessCase]] = {
    function.__name__: function
    for function in (
        mappings, flags, chains, logging, truncation, hung_disks, words, configurations, lost_rings, log_files, deaths,
        floods, streams,
    )
}  # fmt: skip
"""By the name that a case has."""
