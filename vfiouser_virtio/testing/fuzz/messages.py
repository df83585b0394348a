"""Grammar of vfio-user messages, and of the mistakes in one ("Message Protocol", "Commands")."""

import json
from collections.abc import Callable
from random import Random

from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    DIRTY_PAGES,
    DMA_ACCESS,
    DMA_MAP,
    DMA_UNMAP,
    IRQ_INFO,
    IRQ_SET,
    MIG_DATA,
    REGION_ACCESS,
    REGION_INFO,
    REGION_IO_FDS,
    WRITE_MULTI_ENTRY,
    Command,
)
from vfiouser_virtio.testing.fuzz import fd_kinds
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.client import ANSWERS, hello
from vfiouser_virtio.testing.fuzz.ram import PIECES
from vfiouser_virtio.testing.fuzz.values import mutated, number, pick, remapped
from vfiouser_virtio.testing.raw.client import MAX_MESSAGE_SIZE

Made = tuple[bytes, list[str]]
"""A payload, and the kinds of fds that come with it."""


def generate(random: Random, case: Case) -> list[Step]:
    """Messages of all commands, most of them nearly right; in between the device is used."""
    case.hello = random.random() < 0.9
    steps: list[Step] = []
    if not case.hello:
        steps.append(_first(random))
        if random.random() < 0.5:
            return steps
    for _ in range(random.randint(1, 24)):
        roll = random.random()
        if roll < 0.72:
            steps.append(message(random))
        elif roll < 0.77:
            steps.append({"do": "bring_up", "size": random.choice((4, 16, 64))})
        elif roll < 0.87:
            steps.append(_request(random))
        elif roll < 0.90:
            steps.append({"do": random.choice(("unmap", "map", "pause", "answer_late", "settle"))})
        elif roll < 0.92:
            steps += remapped(random)
        elif roll < 0.96:
            steps.append({"do": "answers", "how": [random.choice(ANSWERS) for _ in range(random.randint(1, 6))]})
        else:
            steps.append({"do": "read", "region": 4, "offset": 0x14, "count": 1})
    if random.random() < 0.1:
        steps.append({"do": "raw", "data": random.randbytes(random.randint(1, 40)).hex()})
    return steps


def _request(random: Random) -> Step:
    out = [random.choice((b"S", b"e", b"C")) + random.randbytes(random.randint(0, 40)) for _ in range(2)]
    return {
        "do": "request",
        "queue": random.randrange(2),
        "out": [data.hex() for data in out],
        "room": [random.choice((1, 64, 5000)) for _ in range(random.randint(0, 3))],
        "indirect": random.random() < 0.3,
    }


def _first(random: Random) -> Step:
    """What a client that cannot introduce itself sends first."""
    if random.random() < 0.2:
        return message(random)
    step: Step = {"do": "message", "command": int(Command.VERSION)}
    choice = random.randrange(6)
    if choice == 0:
        step["body"] = mutated(random, hello()).hex()
    elif choice == 1:
        step["body"] = hello(text=json.dumps({"capabilities": _capabilities(random)})).hex()
    elif choice == 2:
        text = random.choice(
            ("[" * 100000, "1" * 5000, "{}", "[]", '{"capabilities":[]}', "null", '"\\ud800"', "\x00", "")
        )
        step["body"] = hello(text=text).hex()
    elif choice == 3:
        step["body"] = hello().hex()
        step["flags"] = random.choice((1, 2, 0x10, 0x20, 0x40, 0xFFFFFFFF))
    elif choice == 4:
        step["body"] = hello()[: random.randint(0, 6)].hex()
    else:
        step["body"] = hello().hex()
        step["fds"] = [random.choice(fd_kinds.KINDS) for _ in range(random.randint(1, 20))]
        step["cuts"] = [random.randint(1, 60)]
    return step


def _capabilities(random: Random) -> dict[str, object]:
    odd: tuple[object, ...] = (0, 1, -1, 2**64, 1.5, True, None, "x", "\ud800", [], {}, 16, 4096, 1 << 20)
    keys = ("max_msg_fds", "max_data_xfer_size", "pgsizes", "max_dma_maps", "write_multiple", "twin_socket", "what")
    offered: dict[str, object] = {key: random.choice(odd) for key in keys if random.random() < 0.3}
    if random.random() < 0.3:
        offered["twin_socket"] = {"supported": random.choice((True, False, 1, "yes")), "fd_index": random.choice(odd)}
    return offered


def message(random: Random) -> Step:
    """One message: a payload of its command, mutated in half of the cases."""
    command = random.choice(_COMMANDS) if random.random() < 0.97 else pick(random, 16)
    body, fds = _MAKERS.get(command, _anything)(random)
    step: Step = {"do": "message", "command": command, "id": pick(random, 16)}
    if random.random() < 0.3:
        body = mutated(random, body)
    if random.random() < 0.1:
        fds = [random.choice(fd_kinds.KINDS) for _ in range(random.choice((1, 2, 8, 16, 17, 40)))]
    if random.random() < 0.03:
        step["size"] = random.choice((0, 15, 16, len(body) + 15, len(body) + 17, MAX_MESSAGE_SIZE + 1, 0xFFFFFFFF))
    if random.random() < 0.12:
        step["flags"] = random.choice((0x10, 0x10, 0x10, 0x20, 0x40, 0x80000000, 1, 0x21, 2, 0xF))
    if random.random() < 0.1:
        step["cuts"] = [random.randint(1, 15 + len(body)) for _ in range(random.randint(1, 3))]
    if random.random() < 0.25:
        step["wait"] = False
    if random.random() < 0.05:
        step["error"] = pick(random, 32)
    return step | {"body": body.hex()} | ({"fds": fds} if fds else {})


def made(random: Random, command: int) -> Step:
    """A message of one command, as it should be but for its values."""
    body, fds = _MAKERS[command](random)
    return {"do": "message", "command": command, "body": body.hex()} | ({"fds": fds} if fds else {})


def _anything(random: Random) -> Made:
    return random.randbytes(random.choice((0, 1, 8, 24, 32, 100, 5000))), []


def _dma_map(random: Random) -> Made:
    piece = random.choice(PIECES)
    good = {"argsz": 32, "flags": piece.flags, "offset": piece.address, "address": piece.address, "size": piece.size}
    kind = random.choice(("ram", "ram", "none", random.choice(fd_kinds.KINDS)))
    if random.random() < 0.6:  # beside the RAM, or over it
        good["address"] = number(random, 64, aligned=0.8)
        good["size"] = (
            number(random, 64, aligned=0.8) if random.random() < 0.3 else random.choice((0x1000, 0x2000, 0x40000))
        )
        good["offset"] = number(random, 64, aligned=0.8) if random.random() < 0.3 else 0
        good["flags"] = random.choice((0, 1, 2, 3, 3, 3, 4, 0xFFFFFFFF))
    return DMA_MAP.build(good), [] if kind == "none" else [kind]


def _dma_unmap(random: Random) -> Made:
    piece = random.choice(PIECES)
    good = {"argsz": random.choice((24, 24, 0)), "flags": 0, "address": piece.address, "size": piece.size}
    if random.random() < 0.3:
        good |= {"address": number(random, 64, aligned=0.8), "size": number(random, 64, aligned=0.8)}
    elif random.random() < 0.2:
        good |= {"address": 0, "size": 0, "flags": random.choice((1, 2, 2, 3))}
    return DMA_UNMAP.build(good), []


def _info(random: Random) -> Made:
    return DEVICE_INFO.build({"argsz": _argsz(random, 16), "flags": 0, "num_regions": 0, "num_irqs": 0}), []


def _region_info(random: Random) -> Made:
    fields = {"argsz": _argsz(random, 32), "flags": 0, "index": _index(random), "cap_offset": 0, "size": 0, "offset": 0}
    return REGION_INFO.build(fields), []


def _io_fds(random: Random) -> Made:
    argsz = random.choice((16, 16 + 40, 16 + 80, 4096, _argsz(random, 16)))
    return REGION_IO_FDS.build({"argsz": argsz, "flags": 0, "index": _index(random), "count": 0}), []


def _irq_info(random: Random) -> Made:
    return IRQ_INFO.build({"argsz": _argsz(random, 16), "flags": 0, "index": _index(random), "count": 0}), []


def _set_irqs(random: Random) -> Made:
    index = random.choice((0, 0, 2, 2, 2, _index(random)))
    data, action = random.choice((1, 2, 4, 4)), random.choice((8, 16, 32, 32))
    count = random.choice((0, 1, 1, 2, 3, 4, pick(random, 32)))
    start = random.choice((0, 0, 0, 1, 2, pick(random, 32)))
    flags = data | action if random.random() < 0.95 else pick(random, 32)
    body = IRQ_SET.build({"argsz": 20, "flags": flags, "index": index, "start": start, "count": count})
    fds = [random.choice(fd_kinds.EVENTFDS) for _ in range(min(count, 20))] if data == 4 else []
    if fds and random.random() < 0.2:
        fds = []
    return body + (random.randbytes(min(count, 64)) if data == 2 else b""), fds


def _access(random: Random) -> tuple[int, int, int]:
    region = random.choice((4, 4, 4, 1, 7, 7, _index(random)))
    count = random.choice((1, 2, 4, 8, 3, 256, 4096, 0, number(random, 32)))
    return random.choice((0, 0x14, 0x1000, 0x2000, 0x3000, number(random, 64))), region, count


def _region_read(random: Random) -> Made:
    offset, region, count = _access(random)
    return REGION_ACCESS.build({"offset": offset, "region": region, "count": count}), []


def _region_write(random: Random) -> Made:
    offset, region, count = _access(random)
    count = count if random.random() < 0.2 else count % 65
    body = REGION_ACCESS.build({"offset": offset, "region": region, "count": count})
    return body + random.randbytes(min(count, 4096)), []


def _write_multi(random: Random) -> Made:
    count = random.randint(0, 4)
    body = b"".join(
        WRITE_MULTI_ENTRY.build({"offset": access[0], "region": access[1], "count": access[2] % 10, "data": bytes(8)})
        for access in (_access(random) for _ in range(count))
    )
    return random.choice((count, count, number(random, 64))).to_bytes(8, "little") + body, []


def _dma_access(random: Random) -> Made:
    count = random.choice((0, 1, 64, number(random, 64)))
    return DMA_ACCESS.build({"address": number(random, 64), "count": count}) + bytes(min(count, 64)), []


def _feature(random: Random) -> Made:
    header = DIRTY_PAGES.build({"dirty": {"argsz": _argsz(random, 8), "flags": pick(random, 32)}, "data": b""})
    return header + random.randbytes(random.choice((0, 8, 32))), []


def _mig_data(random: Random) -> Made:
    return MIG_DATA.build({"argsz": _argsz(random, 8), "size": pick(random, 32)}) + bytes(random.choice((0, 8, 64))), []


def _argsz(random: Random, good: int) -> int:
    return good if random.random() < 0.7 else pick(random, 32)


def _index(random: Random) -> int:
    return random.randrange(10) if random.random() < 0.8 else pick(random, 32)


def _version(random: Random) -> Made:
    return hello(twin=random.random() < 0.3), []


_MAKERS: dict[int, Callable[[Random], Made]] = {
    Command.VERSION: _version,
    Command.DMA_MAP: _dma_map,
    Command.DMA_UNMAP: _dma_unmap,
    Command.DEVICE_GET_INFO: _info,
    Command.DEVICE_GET_REGION_INFO: _region_info,
    Command.DEVICE_GET_REGION_IO_FDS: _io_fds,
    Command.DEVICE_GET_IRQ_INFO: _irq_info,
    Command.DEVICE_SET_IRQS: _set_irqs,
    Command.REGION_READ: _region_read,
    Command.REGION_WRITE: _region_write,
    Command.DMA_READ: _dma_access,
    Command.DMA_WRITE: _dma_access,
    Command.DEVICE_RESET: lambda _: (b"", []),
    Command.DIRTY_PAGES: _feature,
    Command.REGION_WRITE_MULTI: _write_multi,
    Command.DEVICE_FEATURE: _feature,
    Command.MIG_DATA_READ: _mig_data,
    Command.MIG_DATA_WRITE: _mig_data,
}
# The commands that change something come more often.
_COMMANDS = [int(command) for command in Command] + [
    int(command) for command in (Command.DMA_MAP, Command.DMA_UNMAP, Command.DEVICE_SET_IRQS) for _ in range(4)
]
