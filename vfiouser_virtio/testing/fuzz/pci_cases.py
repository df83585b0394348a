"""Cases of PCI devices of authors' own: their dictionary and grammar are the device's declarations (`register_map`).

Requests are what a driver does: registers, mostly whole, with values that mean something, and memory that they point
to. Accesses of registers are of any width anywhere.
"""

from random import Random

from vfiouser_virtio.protocols.pci import CapId
from vfiouser_virtio.protocols.vfio_user import Command, PciRegion
from vfiouser_virtio.testing.fuzz import messages
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.client import ANSWERS
from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS
from vfiouser_virtio.testing.fuzz.ram import SIZE
from vfiouser_virtio.testing.fuzz.register_map import RegisterMap, Spot
from vfiouser_virtio.testing.fuzz.values import number, pick, remapped

# What registers point to: plain memory, across two pieces, read-only, before a hole, a hole, the ends.
_HOMES = (0x20000, 0x21000, 0x28000, 0x2FFF0, 0x2FFF8, 0x60000, 0x4FFF8, 0x4FFFC, 0x50000, 0x70000, SIZE - 16, 0)
_CONFIG_SPOTS = (4, 6, 0x0C, 0x10, 0x14, 0x18, 0x20, 0x24, 0x30, 0x34, 0x3C, *range(0x40, 0x100, 2))
_CONFIG_SIZE = 0x1000
# D3hot and back, FLR, MSI and MSI-X on, masked and off: (capability, offset in it, bytes).
_POWER = ((CapId.PM, 4, "0300"), (CapId.PM, 4, "0000"), (CapId.PM, 4, "0100"), (CapId.EXP, 8, "0080"))
_MESSAGES = (
    (CapId.MSIX, 2, "0080"),
    (CapId.MSIX, 2, "00c0"),
    (CapId.MSIX, 2, "0000"),
    (CapId.MSI, 2, "0100"),
    (CapId.MSI, 2, "7100"),
    (CapId.MSI, 2, "0000"),
    (CapId.MSI, 0x10, "ffffffff"),
)
_COMMANDS = ("0000", "0200", "0300", "0600", "0700", "0704", "0504", "ffff")
_MOST_BYTES = 64


class _Grammar:
    """Steps for one device, with a few places in memory that they have in common."""

    def __init__(self, random: Random, registers: RegisterMap) -> None:
        self.random = random
        self.registers = registers
        self.spots = list(registers.spots.values())
        self.homes = [random.choice(_HOMES[:3]), random.choice(_HOMES), number(random, 20)]
        # A driver has to do with some registers at a time; those of one case meet.
        self.liked = random.sample(self.spots, min(len(self.spots), random.randint(2, 8)))

    def spot(self) -> Spot:
        return self.random.choice(self.liked if self.random.random() < 0.7 else self.spots)

    def address(self) -> int:
        at = self.random.choice(self.homes)
        return at if self.random.random() < 0.7 else at + self.random.choice((1, 2, 4, 8, 16, 64, 0xFF8, 0x1000))

    def value(self, size: int, fields: tuple[int, ...] = ()) -> int:
        """A number of ``size`` bytes: fields, an address, a number of the device's source, or near a boundary."""
        if not size:
            return 0
        random, roll = self.random, self.random.random()
        if fields and roll < 0.45:
            value = 0
            for mask in fields:
                if random.random() < 0.5:
                    value |= random.choice((mask, mask & -mask, random.getrandbits(64) & mask))
        elif roll < 0.55 and size >= 4:
            value = self.address()
        elif roll < 0.7 and self.registers.words:
            value = random.choice(self.registers.words) + random.choice((0, 0, 0, 1, -1))
        elif roll < 0.9:
            value = pick(random, 8 * size)
        else:
            value = number(random, 8 * size)
        return value & (1 << 8 * size) - 1

    def memory(self) -> list[Step]:
        """A structure in memory, of a layout that the device's file has, or of any."""
        random = self.random
        sizes = random.choice(self.registers.layouts) if self.registers.layouts and random.random() < 0.8 else None
        data = b""
        for _ in range(random.choice((1, 1, 2, 4, 16))):
            fields = sizes or [random.choice((8, 8, 4, 4, 2, 1)) for _ in range(random.randint(1, 8))]
            for size in fields:
                data += self.value(min(size, 8)).to_bytes(min(size, 8), "little").ljust(size, b"\0")
        if random.random() < 0.1:
            data = random.randbytes(len(data))
        return [{"do": "poke", "at": self.address(), "data": data[:4096].hex()}]

    def register(self) -> list[Step]:
        """A whole register that is written, or read."""
        random, spot = self.random, self.spot()
        if random.random() < 0.25:
            return [self.whole_read(spot)]
        size = min(spot.size, 8)
        step: Step = {"do": "set", "register": spot.name, "value": self.value(size, spot.fields)}
        if spot.memory and spot.size > size:
            step |= {"at": random.randrange(spot.size - size + 1), "size": size}
        return [step if random.random() < 0.8 else step | {"posted": False}]

    def whole_read(self, spot: Spot) -> Step:
        if spot.size <= 8:
            return {"do": "get", "register": spot.name}
        count = self.random.choice((1, 2, 4, 8))
        return {"do": "get", "register": spot.name, "at": self.random.randrange(spot.size - count + 1), "size": count}

    def part(self) -> list[Step]:
        """Any width at, in, before or behind a register; unaligned at times."""
        random, spot = self.random, self.spot()
        count = random.choice((1, 2, 4, 8, 3, 5, 7, 16, 64, 4096))
        offset = spot.offset + random.choice((0, 0, 1, 2, 3, 4, -1, -2, -4, spot.size, spot.size - 1))
        return [self._access(spot.region, offset, count)]

    def anywhere(self) -> list[Step]:
        """A region that need not be there, and an offset that need not be in it."""
        random = self.random
        region = random.choice([*self.registers.sizes, 0, 1, 5, int(PciRegion.ROM), random.randrange(10)])
        size = self.registers.sizes.get(region, 0x1000)
        offset = random.choice((0, size - 4, size - 1, size, random.randrange(size), number(random, 64)))
        return [self._access(region, offset, random.choice((1, 2, 4, 8, 3, 64, 0)))]

    def _access(self, region: int, offset: int, count: int) -> Step:
        offset = max(offset, 0)
        if self.random.random() < 0.5:
            return {"do": "read", "region": region, "offset": offset, "count": count}
        count = min(count, _MOST_BYTES)
        step: Step = {
            "do": "write",
            "region": region,
            "offset": offset,
            "data": self.value(count).to_bytes(count, "little").hex(),
        }
        return step | {"posted": True} if self.random.random() < 0.5 else step

    def config(self) -> list[Step]:
        """Config space: COMMAND, BARs and what is at and behind the capabilities."""
        random = self.random
        if random.random() < 0.3:
            return [{"do": "write", "region": int(PciRegion.CONFIG), "offset": 4, "data": random.choice(_COMMANDS)}]
        offset = random.choice(_CONFIG_SPOTS) if random.random() < 0.9 else random.randrange(_CONFIG_SIZE)
        count = random.choice((1, 2, 4, 4, 3, 8, 64))
        return [self._access(int(PciRegion.CONFIG), offset, count)]

    def life(self) -> list[Step]:
        """Resets, power states, interrupts, and memory that goes under way."""
        random, roll = self.random, self.random.random()
        if roll < 0.3:
            name, at, data = random.choice(_POWER if roll < 0.15 else _MESSAGES)
            return [{"do": "capability", "id": int(name), "at": at, "data": data}]
        if roll < 0.5:
            return [messages.made(random, Command.DEVICE_SET_IRQS)]
        if roll < 0.65:
            return remapped(random)
        if roll < 0.75:
            return [{"do": "answers", "how": [random.choice(ANSWERS) for _ in range(random.randint(1, 4))]}]
        if roll < 0.85:
            return [{"do": random.choice(("reset", "pause", "answer_late"))}]
        if roll < 0.9:
            return [{"do": "sleep", "seconds": 0.01}]
        return [{"do": "bring_up"}]


def requests(random: Random, case: Case) -> list[Step]:
    """What a driver does: memory, registers that point to it, and a register that makes the device work."""
    grammar = _Grammar(random, PCI_TARGETS[case.target].map)
    steps: list[Step] = [{"do": "bring_up"}]
    for _ in range(random.randint(4, 40)):
        roll = random.random()
        if not grammar.spots or roll < 0.08:
            steps += grammar.life()
        elif roll < 0.25:
            steps += grammar.memory()
        elif roll < 0.85:
            steps += grammar.register()
        elif roll < 0.9:
            steps += grammar.part()
        else:
            steps.append({"do": random.choice(("pause", "settle"))})
    return [*steps, {"do": "settle"}]


def registers(random: Random, case: Case) -> list[Step]:
    """Accesses of any width anywhere, and all that can happen to a function meanwhile."""
    grammar = _Grammar(random, PCI_TARGETS[case.target].map)
    steps: list[Step] = [{"do": "bring_up"}] if random.random() < 0.7 else []
    for _ in range(random.randint(4, 40)):
        roll = random.random()
        if not grammar.spots or roll < 0.15:
            steps += grammar.anywhere()
        elif roll < 0.45:
            steps += grammar.part()
        elif roll < 0.65:
            steps += grammar.register()
        elif roll < 0.8:
            steps += grammar.config()
        elif roll < 0.97:
            steps += grammar.life()
        else:
            steps.append(messages.message(random))
    return steps
