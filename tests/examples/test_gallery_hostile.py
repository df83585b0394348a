"""Attacks on each device of examples/pci, with the fuzzer's oracle: bad accesses, and descriptors that lie.

Each is a case of the fuzzer: the oracle looks for exceptions, stalls, a device that does not rest, stores where none
may be, leaks, and registers that a reset has not brought back. ``seen`` is what must have been in registers before
that, so that an attack which misses is noticed.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from i2c_board import I2cBoard
from pci.accelerator import JOB, Accelerator
from pci.e1000 import E1000
from pci.edu import Edu
from pci.idio16 import Idio16
from pci.uart import Uart

from vfiouser_virtio.pci import PciDevice
from vfiouser_virtio.pci.register import Register
from vfiouser_virtio.testing.fuzz import Case, run_case
from vfiouser_virtio.testing.fuzz.case import Memory, Step
from vfiouser_virtio.testing.fuzz.pci_target import PciTarget

OWN_BAR, RAM, RING, END, HOLE, READ_ONLY = 0xFEB0_0000, 0x2_0000, 0x2_2000, 0x4_FFF8, 0x5_0000, 0x6_0000
NOWHERE = 0xFFFF_FFFF_FFFF_FFF0
CONFIG = 7


class Attack(NamedTuple):
    """Steps of a driver; ``seen`` are registers that have these values before the reset."""

    steps: Sequence[Step]
    seen: Mapping[str, int]


def put(register: str, value: int) -> Step:
    return {"do": "set", "register": register, "value": value}


def poke(at: int, data: bytes) -> Step:
    return {"do": "poke", "at": at, "data": data.hex()}


SETTLE: Step = {"do": "settle"}
UNMAP: Step = {"do": "unmap"}
MAP: Step = {"do": "map"}
RESET: Step = {"do": "reset"}
FLR: Step = {"do": "capability", "id": 0x10, "at": 8, "data": "0080"}
SLEEP: Step = {"do": "capability", "id": 1, "at": 4, "data": "0300"}
WAKE: Step = {"do": "capability", "id": 1, "at": 4, "data": "0000"}
NO_MASTER: Step = {"do": "write", "region": CONFIG, "offset": 4, "data": "0300"}
MASTER: Step = {"do": "write", "region": CONFIG, "offset": 4, "data": "0700"}
BAR_ADDRESS: Step = {"do": "write", "region": CONFIG, "offset": 0x10, "data": OWN_BAR.to_bytes(4, "little").hex()}


# ---- edu: both ends of a DMA are the driver's to say


def transfer(source: int, target: int, count: int, command: int = 1) -> list[Step]:
    return [put("source", source), put("target", target), put("count", count), put("command", command)]


BUFFER = 0x4_0000
DONE = {"command": 0}
EDU = {
    "from own BAR": Attack([*transfer(OWN_BAR + BUFFER, BUFFER, 16), SETTLE], DONE),
    "to own BAR": Attack([*transfer(BUFFER, OWN_BAR + BUFFER, 16, 3), SETTLE], {"command": 2}),
    "more than its buffer": Attack([*transfer(RAM, BUFFER, 4097), SETTLE], DONE),
    "a count that wraps": Attack([*transfer(RAM, BUFFER + 16, (1 << 64) - 8), SETTLE], DONE),
    "in front of its buffer": Attack([*transfer(RAM, BUFFER - 1, 4), SETTLE], DONE),
    "both ends outside": Attack([*transfer(RAM, RAM, 16), SETTLE], DONE),
    "to memory that is read-only": Attack([*transfer(BUFFER, READ_ONLY, 16, 3), SETTLE], {"command": 2}),
    "across the end of memory": Attack([*transfer(BUFFER, END, 16, 3), SETTLE], {"command": 2}),
    "nowhere": Attack([*transfer(NOWHERE, BUFFER, 64), SETTLE], DONE),
    "interrupts that nothing awaits": Attack(
        [*[put("irq_raise", 0xFFFF_FFFF)] * 40, SETTLE], {"irq_status": 0xFFFF_FFFF}
    ),
    "a reset in the middle": Attack([*transfer(BUFFER, RAM, 4096, 7), FLR, SETTLE], {"count": 4096}),
    "a factorial of all": Attack([put("factorial", 0xFFFF_FFFF), SETTLE], {"factorial": 0}),
    "both at once, twice": Attack(
        [
            put("status", 0x80),
            put("factorial", 5),
            *transfer(RAM, BUFFER, 8, 5),
            put("factorial", 6),
            put("command", 7),
            SETTLE,
        ],
        {"irq_status": 0x101},
    ),
}


# ---- the accelerator: a ring of jobs


def jobs(*entries: tuple[int, int, int], at: int = RING, size: int = 8, tail: int | None = None) -> list[Step]:
    ring = b"".join(JOB.pack(source, digest, length, 0) for source, digest, length in entries)
    tail = len(entries) if tail is None else tail
    return [poke(at, ring), put("control", 1), put("ring", at), put("size", size), put("tail", tail), SETTLE]


BROKEN = {"status": 2}
ACCELERATOR = {
    "a ring in own BAR": Attack(jobs((RAM, RAM, 1), at=OWN_BAR), BROKEN),
    "a ring across the end of memory": Attack(jobs((RAM, RAM, 1), at=END), BROKEN),
    "a ring nowhere": Attack(jobs((RAM, RAM, 1), at=NOWHERE), BROKEN),
    "a ring that cannot be written": Attack(jobs((RAM, RAM, 1), at=READ_ONLY), BROKEN),
    "a source in own BAR": Attack(jobs((OWN_BAR, RAM, 64)), BROKEN),
    "a source in a hole": Attack(jobs((HOLE - 4, RAM, 8)), BROKEN),
    "a digest in own BAR": Attack(jobs((RAM, OWN_BAR, 64)), BROKEN),
    "a digest that is read-only": Attack(jobs((RAM, READ_ONLY, 64)), BROKEN),
    "a digest over the next jobs": Attack(jobs((RAM, RING + JOB.size, 64), (RAM, RAM, 1), (RAM, RAM, 1)), {}),
    "a job that is its own source and target": Attack(jobs((RING, RING, JOB.size)), {"status": 1, "head": 1}),
    "a length that is too big": Attack(jobs((RAM, RAM, 0xFFFF_FFFF)), {"status": 1, "head": 1}),
    "a length that memory has not": Attack(jobs((RAM, RAM, 1 << 20)), BROKEN),
    "no ring": Attack(jobs((RAM, RAM, 1), size=0), BROKEN),
    "a ring of 4 G": Attack(jobs((RAM, RAM, 1), size=0xFFFF_FFFF, tail=0xFFFF_FFFE), BROKEN),
    "a tail behind the ring": Attack(jobs((RAM, RAM, 1), tail=8), BROKEN),
    "a size that becomes smaller than the head": Attack(
        [*jobs(*[(RAM, RAM, 1)] * 7), put("size", 2), put("tail", 1), SETTLE], {"size": 2}
    ),
    "memory goes": Attack([*jobs((RAM, RAM, 1))[:-2], UNMAP, put("tail", 1), SETTLE, MAP], BROKEN),
    "disabled in the middle": Attack(
        [*jobs(*[(RAM, RAM, 0x1_0000)] * 7)[:-1], put("control", 0), put("tail", 3), SETTLE], {"tail": 3}
    ),
    "without Bus Master": Attack([NO_MASTER, *jobs((RAM, RAM, 1)), MASTER, SETTLE], {"tail": 1}),
}


# ---- iSMT: a ring of descriptors, whose pointers are read and written


def descriptors(*entries: bytes, at: int = RING, last: int = 7, head: int | None = None) -> list[Step]:
    head = (len(entries) if head is None else head) << 16
    ring = b"".join(entries)
    return [poke(at, ring), put("ring", at), put("size", last), put("control", head), put("control", head | 1), SETTLE]


def transaction(pointer: int, *, address: int = 0x90, length: int = 1, count: int = 2, flags: int = 0x01) -> bytes:
    return struct.pack("<BBBBIQ", address, length, count, flags, 0, pointer)


STANDS = {"control": 1 << 16 | 1}
ISMT = {
    "a ring in own BAR": Attack(descriptors(transaction(RAM), at=OWN_BAR), STANDS),
    "a ring in a hole": Attack(descriptors(transaction(RAM), at=HOLE), STANDS),
    "a ring across the end of memory": Attack(descriptors(transaction(RAM), at=END), STANDS),
    "a ring that cannot be written": Attack(descriptors(transaction(RAM), at=READ_ONLY), STANDS),
    "an answer to own BAR": Attack(descriptors(transaction(OWN_BAR)), STANDS),
    "an answer over its own descriptor": Attack(descriptors(transaction(RING)), {"control": 1 << 16}),
    "data from a hole": Attack(descriptors(transaction(HOLE, length=8, flags=0)), STANDS),
    "a block of nothing": Attack(descriptors(transaction(RAM, length=0, count=0, flags=4)), {"control": 1 << 16}),
    "a block that is too long": Attack(descriptors(transaction(RAM, length=255, flags=4)), {"control": 1 << 16}),
    "all flags": Attack(descriptors(transaction(RAM, length=32, count=32, flags=0xFF)), {"control": 1 << 16}),
    "a chip that is not there": Attack(descriptors(transaction(RAM, address=0xFE)), {"control": 1 << 16}),
    "a head that no tail comes to": Attack(descriptors(*[transaction(RAM)] * 8, head=0xEE), {"control": 0xEE << 16}),
    "a tail behind the ring": Attack(
        [put("status", 0xFF << 16), *descriptors(transaction(RAM), last=0)], {"control": 1 << 16}
    ),
    "a log in own BAR": Attack([put("interrupt_log", OWN_BAR), *descriptors(transaction(RAM))], STANDS),
    "a reset by itself in the middle": Attack(
        [*descriptors(*[transaction(RAM)] * 8)[:-1], put("general_control", 0x40), SETTLE], {"size": 7}
    ),
    "memory goes": Attack(
        [*descriptors(transaction(RAM))[:-2], UNMAP, put("control", 1 << 16 | 1), SETTLE, MAP], STANDS
    ),
}


# ---- the 82540EM: two rings; what is sent comes back through its PHY


def shown(
    *entries: bytes,
    at: int = RING,
    length: int = 128,
    tail: int | None = None,
    head: int = 0,
    receive: int = RAM + 0x800,
    buffer: int = RAM + 0x1000,
) -> list[Step]:
    tail = len(entries) if tail is None else tail
    return [
        poke(receive, struct.pack("<QQ", buffer, 0) * 8), poke(RAM, b"\xff" * 64), poke(at, b"".join(entries)),
        put("mdic", 0x0420_4140), put("ctrl", 0x40),
        put("rings[0].base", receive), put("rings[0].length", 128), put("rings[0].tail", 7), put("rctl", 0x8002),
        put("rings[1].base", at), put("rings[1].length", length), put("rings[1].head", head), put("tctl", 0x0A),
        put("rings[1].tail", tail), SETTLE,
    ]  # fmt: skip


def frame(address: int = RAM, length: int = 60, command: int = 0x0B) -> bytes:
    return struct.pack("<QHBBI", address, length, 0, command, 0)


def offloaded(options: int, command: int, *numbers: int, mss: int = 0) -> tuple[bytes, bytes]:
    """A context with these six numbers, and a packet that is what it says."""
    return (
        struct.pack("<BBHBBHIBBH", *numbers, 0x20 << 24 | command << 24, 0, 54, mss),
        struct.pack("<QIBBH", RAM, 1 << 20 | (0x2B | command & 4) << 24 | 64, 0, options, 0),
    )


TX_STANDS, SENT = {"rings[1].head": 0, "rings[1].tail": 1}, {"rings[1].head": 1}
E1000_ATTACKS = {
    "a ring in own BAR": Attack(shown(frame(), at=OWN_BAR), TX_STANDS),
    "a ring in a hole": Attack(shown(frame(), at=HOLE), TX_STANDS),
    "a ring across the end of memory": Attack(shown(frame(), at=END & ~15), SENT),
    "a ring that cannot be written": Attack(shown(frame(), at=READ_ONLY), TX_STANDS),
    "a ring nowhere": Attack(shown(frame(), at=NOWHERE), TX_STANDS),
    "no ring": Attack(shown(frame(), length=0), TX_STANDS),
    "a tail behind the ring": Attack(shown(frame(), tail=0xFFFF), {"rings[1].head": 0}),
    "a head behind the ring": Attack(shown(frame(), head=8), {"rings[1].head": 8}),
    "a frame from own BAR": Attack(shown(frame(OWN_BAR)), SENT),
    "a frame from a hole": Attack(shown(frame(HOLE - 4)), SENT),
    "a frame of nothing": Attack(shown(frame(length=0)), SENT),
    "a frame of 64 KiB": Attack(shown(frame(length=0xFFFF)), SENT),
    "frames without an end": Attack(
        [*shown(*[frame(length=0xFFFF, command=8)] * 8, tail=7), put("rings[1].tail", 6), SETTLE], {"rings[1].head": 6}
    ),
    "segments of nothing": Attack(shown(*offloaded(3, 7, 14, 24, 33, 34, 50, 0)), {"rings[1].head": 2}),
    "segments of a frame that has no such headers": Attack(
        shown(*offloaded(3, 7, 255, 255, 0xFFFF, 255, 255, 0xFFFF, mss=1)), {"rings[1].head": 2}
    ),
    "checksums outside of the frame": Attack(
        shown(*offloaded(3, 3, 255, 255, 0xFFFF, 255, 255, 0xFFFF)), {"rings[1].head": 2}
    ),
    "checksums that end before they begin": Attack(shown(*offloaded(3, 3, 63, 0, 1, 63, 0, 1)), {"rings[1].head": 2}),
    "a receive ring in own BAR": Attack(shown(frame(), receive=OWN_BAR), SENT | {"rings[0].head": 0}),
    "a receive ring that cannot be written": Attack(shown(frame(), receive=READ_ONLY), SENT | {"rings[0].head": 0}),
    "a receive buffer that is the ring": Attack(shown(frame(), buffer=RAM + 0x800), SENT | {"rings[0].head": 1}),
    "a receive buffer in own BAR": Attack(shown(frame(), buffer=OWN_BAR), SENT | {"rings[0].head": 0}),
    "more frames than buffers": Attack(
        [*shown(*[frame()] * 8, tail=7), put("rings[1].tail", 3), SETTLE, put("rings[1].tail", 1), SETTLE],
        {"rings[0].head": 7, "rings[1].head": 1},
    ),
    "memory goes": Attack([*shown(frame())[:-2], UNMAP, put("rings[1].tail", 1), SETTLE, MAP], TX_STANDS),
    "a reset by itself in the middle": Attack(
        [*shown(*[frame()] * 7)[:-1], put("ctrl", 1 << 26), SETTLE], {"rings[1].length": 128}
    ),
    "without Bus Master": Attack([NO_MASTER, *shown(frame()), MASTER, SETTLE], SENT),
}


# ---- ports: no memory, but reads and writes with effects, of any width

PORTS = {
    "all ports in one": Attack(
        [
            {"do": "write", "region": 0, "offset": 0, "data": "ff" * 8},
            {"do": "read", "region": 0, "offset": 0, "count": 8},
            {"do": "read", "region": 0, "offset": 7, "count": 4},
        ],
        {"scratch": 0xFF},
    ),
    "more than the FIFO in a loop": Attack(
        [put("modem_control", 0x1F), put("enable", 0x0F), *[put("data", 0x55)] * 100, put("scratch", 1)], {"scratch": 1}
    ),
    "FIFO control over and over": Attack(
        [*[put("ident", value) for value in range(256)], put("scratch", 2)], {"scratch": 2}
    ),
}
GPIO = {
    "all ports in one": Attack(
        [
            {"do": "read", "region": 2, "offset": 0, "count": 8},
            {"do": "write", "region": 2, "offset": 0, "data": "ff" * 8},
            {"do": "read", "region": 2, "offset": 6, "count": 4},
        ],
        {"outputs_low": 0xFF, "outputs_high": 0xFF},
    ),
    "interrupts that nothing acknowledges": Attack(
        [{"do": "get", "register": "irq_enable"}, *[put("outputs_low", value & 0xFF) for value in range(300)]],
        {"irq_status": 4},
    ),
}


# ---- for all of them: how a function is treated, whatever it is

WIDTHS = (1, 2, 3, 4, 5, 7, 8, 16, 64, 4096)


def accesses(region: int, size: int) -> Attack:
    """Each width, at the ends and unaligned, read and written; D3, FLR and no decoding in between; other regions."""
    steps: list[Step] = []
    for width in WIDTHS:
        for offset in (0, 1, 3, size - width, size - 1, size, 1 << 40, (1 << 64) - 1):
            if offset >= 0:
                steps.append({"do": "read", "region": region, "offset": offset, "count": width})
                data = b"\xa5" * min(width, 64)
                steps.append({"do": "write", "region": region, "offset": offset, "data": data.hex()})
    steps += [{"do": "read", "region": other, "offset": 0, "count": 4} for other in range(10)]
    for between in (SLEEP, FLR, NO_MASTER, RESET, WAKE):
        steps += [
            between,
            {"do": "read", "region": region, "offset": 0, "count": 1},
            {"do": "write", "region": region, "offset": 0, "data": "01"},
        ]
    return Attack(steps, {})


DEVICES: dict[str, tuple[Callable[[], PciDevice], dict[str, Attack]]] = {
    "edu": (Edu, EDU | {"accesses": accesses(0, 1 << 20)}),
    "accelerator": (Accelerator, ACCELERATOR | {"accesses": accesses(0, 0x1000)}),
    "ismt": (I2cBoard, ISMT | {"accesses": accesses(0, 0x400)}),
    "e1000": (E1000, E1000_ATTACKS | {"accesses": accesses(0, 0x20000), "ports": accesses(2, 64)}),
    "uart": (Uart, PORTS | {"accesses": accesses(0, 8)}),
    "idio16": (lambda: Idio16(loopback=True), GPIO | {"accesses": accesses(2, 8)}),
}
CASES = [(device, name) for device, (_, attacks) in DEVICES.items() for name in attacks]


@pytest.mark.parametrize(("device", "name"), CASES, ids=[f"{device}: {name}" for device, name in CASES])
@pytest.mark.parametrize("memory", ["shared", pytest.param("private", marks=pytest.mark.variant)])
def test_nothing_is_found_and_it_has_hit(device: str, name: str, memory: Memory) -> None:
    make, attacks = DEVICES[device]
    attack = attacks[name]
    registers: list[dict[str, int]] = []

    def watched() -> PciDevice:
        made = make()
        power_on = made.power_on

        def power_on_after_a_look() -> None:
            parts = [part for _, space in made.bars.values() for part in space.parts if isinstance(part, Register)]
            registers.append({part.name: part.value for part in parts})
            power_on()

        vars(made)["power_on"] = power_on_after_a_look
        return made

    steps: list[dict[str, Any]] = [{"do": "bring_up"}, BAR_ADDRESS, *attack.steps, SETTLE]
    found = run_case(Case("requests", device, memory, steps=steps), PciTarget(watched))
    assert found is None, found
    assert any(attack.seen.items() <= each.items() for each in registers), registers[-3:]
