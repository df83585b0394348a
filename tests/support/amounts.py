"""How much the tests do of what could go on for as long as one likes: one table, which decides how long a run takes.

``QUICK`` is for plain ``scripts/test`` (``--quick``), ``USUAL`` for CI and for pytest without an option, ``LONG`` for
``--long``.
"""

from dataclasses import dataclass, replace

MIB = 1 << 20


@dataclass(frozen=True)
class Amounts:
    """Amounts of one kind of run."""

    ring_examples: int = 50
    """Runs of each ring machine against the model of the specification."""
    ring_deaths: int = 45
    """Games of a driver with a device that dies again and again, of each kind of ring."""
    device_deaths: int = 4
    """How often the process of a disk under load is killed."""
    fuzz_cases: int = 16
    """Cases of each kind that the fuzzer makes."""
    process_cases: int = 2
    """Cases of attacks on a server process, of some 5 s each."""
    every_switch: int = 4 * MIB
    """Bytes through each of the disks that differ in their rings' features: a multiple of 2 MiB."""
    polled: int = 4 * MIB
    """Bytes through each disk that polls: likewise."""
    by_pages: int = 4 * MIB
    """Bytes that are copied behind an IOMMU, each page mapped for its request."""
    requests_of_pages: int = 24
    """Requests of 254 pages that are under way at a time behind an IOMMU."""
    rebinds: int = 6
    """How often, and twice, drivers leave their devices and come back."""
    gallery_rebinds: int = 4
    """How often each driver leaves a device of examples/pci and comes back."""
    card_rebinds: int = 2
    """The same of its network card, of which each return takes 13,000 accesses of registers."""
    tcp_file: int = 6 * MIB
    """Bytes of the file that guests move over TCP, each way."""
    boot_stride: int = 16
    """Of a recorded boot, clients are gone at every message (1), or at every sixteenth, and so on."""
    every_way: bool = False
    """Whether they are in every way at each of them, or in one way after the other."""
    flushed_writes: int = 300
    """Writes to each disk whose guest and server are killed, all of them flushed in the end."""
    resets: int = 240
    """Resets of each device, by turns in every state and in every way."""


USUAL = Amounts()
QUICK = replace(
    USUAL, ring_examples=20, ring_deaths=30, device_deaths=3, fuzz_cases=8, every_switch=2 * MIB, polled=2 * MIB,
    by_pages=2 * MIB, requests_of_pages=16, rebinds=4, gallery_rebinds=3, card_rebinds=1, tcp_file=4 * MIB,
    boot_stride=32, resets=120, flushed_writes=200, process_cases=1,
)  # fmt: skip
LONG = replace(
    USUAL, ring_examples=5000, ring_deaths=5000, device_deaths=100, every_switch=1024 * MIB, by_pages=1024 * MIB,
    gallery_rebinds=20, card_rebinds=20, tcp_file=100 * MIB, boot_stride=1, every_way=True, resets=4000,
    flushed_writes=10_000, process_cases=100,
)  # fmt: skip


def amounts(*, long: bool, quick: bool) -> Amounts:
    """Those that are asked for; ``long`` wins."""
    return LONG if long else QUICK if quick else USUAL
