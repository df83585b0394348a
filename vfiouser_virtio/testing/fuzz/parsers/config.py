"""Config space and BARs of a PCI function (PCI Local Bus 3.0, 6.1 and 6.2), accessed in any width at any place.

The function has one of everything: BARs of each kind, MSI-X, MSI, power management, PCI Express with function level
reset. Beside it stands a plain reading: bytes, masks, and what a few bits do.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import Bar, BarKind, Identity, PciFunction
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.parsers.bench import Op, ParserBench, as_ops, as_steps
from vfiouser_virtio.vfio_device import Buffer

PARAMETERS = {"write": ("region", "offset", "data"), "read": ("region", "offset", "count")}
_CONFIG, _MSIX_BAR = 7, 1
_SIZES = {0: 0x1000, 2: 0x4000, 4: 0x20}
"""Bytes of the BARs that are memory to be read and written, by index."""
_IO_BAR = 4
_D0, _D3 = 0, 3

# Bits that a driver may change, and those that it clears by writing ones, by offset: of the header (6.1) …
_WRITABLE = {0x04: 0x0547, 0x0C: 0xFFFF, 0x10: 0xFFFFF000, 0x14: 0xFFFFF000, 0x18: 0xFFFFC000, 0x1C: 0xFFFFFFFF}
_WRITABLE |= {0x20: 0xFFFFFFE0, 0x3C: 0xFF}
_CLEARED = {0x06: 0xF900}
# … and of capabilities, by id: offsets in each.
_CAP_WRITABLE = {
    0x05: {0x02: 0x0071, 0x04: 0xFFFFFFFC, 0x08: 0xFFFFFFFF, 0x0C: 0xFFFF, 0x10: 0x3},
    0x10: {0x08: 0x78FF, 0x10: 0xCB, 0x28: 0x10},
    0x11: {0x02: 0xC000},
}
_CAP_CLEARED = {0x10: {0x0A: 0x000F}}
_PM, _EXP = 0x01, 0x10

_OFFSETS: tuple[int, ...] = (
    0,
    4,
    4,
    4,
    5,
    6,
    7,
    0x0C,
    0x10,
    0x10,
    0x14,
    0x18,
    0x1C,
    0x20,
    0x24,
    0x2C,
    0x30,
    0x34,
    0x3C,
    0x3D,
    0xFC,
    0xFF,
)
_OFFSETS += (0x100, 0xFFF, 0x1000, 1 << 32, (1 << 64) - 1)
_WIDTHS = (1, 2, 2, 4, 4, 4, 4, 4, 8, 3, 5, 16, 64, 256)


class PciVariant(NamedTuple):
    """Variant of the function."""

    no_soft_reset: bool
    config_size: int


VARIANTS = tuple(PciVariant(soft, size) for soft in (False, True) for size in (256, 4096))


class PciCase(NamedTuple):
    """Accesses, and to which variant."""

    variant: int
    ops: list[Op]


class _NoClient:
    name = "fuzz"
    uid: int | None = None

    async def dma_read(self, address: int, count: int) -> bytes:
        raise NotImplementedError

    async def dma_write(self, address: int, data: Buffer) -> None:
        raise NotImplementedError


class _WholeFunction:
    """Function with one of everything."""

    def __init__(self, variant: PciVariant) -> None:
        self.memory = {index: bytearray(size) for index, size in _SIZES.items()}
        identity = Identity(0x1AF4, 0x1042, 0x5000, 0x1042, class_code=0x018000, revision=1)
        self.function = function = PciFunction(identity, config_size=variant.config_size)
        for index, kind in ((0, BarKind.MEM32), (2, BarKind.MEM64), (_IO_BAR, BarKind.IO)):
            function.add_bar(index, self._bar(index, kind))
        function.add_msix(3, bar=_MSIX_BAR)
        function.add_msi(2)
        function.add_pm(no_soft_reset=variant.no_soft_reset)
        function.add_pcie()

    def _bar(self, index: int, kind: BarKind) -> Bar:
        memory = self.memory[index]

        def read(offset: int, count: int) -> bytes:
            return bytes(memory[offset : offset + count])

        def write(offset: int, data: Buffer) -> None:
            memory[offset : offset + len(data)] = data

        return Bar(len(memory), read, write, kind)

    def begin(self) -> None:
        """Power on, with a client that has not decoded anything yet."""
        self.function.reset()
        self.function.connected(_NoClient())
        for memory in self.memory.values():
            memory[:] = bytes(len(memory))


class _PciModel:
    """Model of the registers and the memory of the function; `begin` it for each case."""

    def __init__(self, variant: PciVariant, power_on: bytes) -> None:
        self._variant, self._power_on = variant, power_on
        writable, cleared = bytearray(len(power_on)), bytearray(len(power_on))
        self.capabilities = dict(_capabilities(power_on))
        for mask, header, of_capabilities in ((writable, _WRITABLE, _CAP_WRITABLE), (cleared, _CLEARED, _CAP_CLEARED)):
            _put(mask, 0, header)
            for identity, at in self.capabilities.items():
                _put(mask, at, of_capabilities.get(identity, {}))
        self._writable, self._cleared = bytes(writable), bytes(cleared)
        self._pm_at, self._devctl_at = self.capabilities[_PM] + 4, self.capabilities[_EXP] + 9

    def begin(self) -> None:
        self.data = bytearray(self._power_on)
        self.memory = {index: bytearray(size) for index, size in _SIZES.items()}
        self._decoding = False
        """The client has enabled decoding once."""
        self._command()

    def _command(self) -> None:
        command, awake = self.data[4], self.data[self._pm_at] & 3 == _D0
        self._decoding = self._decoding or bool(command & 3)
        self.decodes_memory = awake and (bool(command & 2) or not self._decoding)
        self.decodes_io = awake and (bool(command & 1) or not self._decoding)
        self.bus_master = awake and bool(command & 4)

    def _reset(self) -> None:
        self.data[:] = self._power_on
        self._command()

    def write_config(self, offset: int, data: bytes) -> None:
        """6.2: bits that can be changed, bits that are cleared, and what they do."""
        end = offset + len(data)
        for at, value in enumerate(data, offset):
            writable, old = self._writable[at], self.data[at]
            self.data[at] = (old & ~writable | value & writable) & ~(value & self._cleared[at])
        if offset < 6 and end > 4:
            self._command()
        if offset <= self._pm_at < end:
            state, old = data[self._pm_at - offset] & 3, self.data[self._pm_at] & 3
            if state in (_D0, _D3):
                self.data[self._pm_at] = self.data[self._pm_at] & ~3 | state
                if (old, state) == (_D3, _D0) and not self._variant.no_soft_reset:
                    self._reset()
                self._command()
        if offset <= self._devctl_at < end and data[self._devctl_at - offset] & 0x80:
            self._reset()

    def decodes(self, index: int) -> bool:
        """Whether accesses of a BAR reach it."""
        return self.decodes_io if index == _IO_BAR else self.decodes_memory


class PciAccesses(ParserBench[PciCase]):
    """Accesses of a function's regions."""

    def __init__(self) -> None:
        self._chips = [_WholeFunction(variant) for variant in VARIANTS]
        self._models = []
        for variant, chip in zip(VARIANTS, self._chips, strict=True):
            chip.begin()
            power_on = bytes(chip.function.region_read(_CONFIG, 0, variant.config_size))
            self._models.append(_PciModel(variant, power_on))
        self._accesses: list[tuple[int, int, int]]
        self._data: list[bytes]

    # ---- cases ---------------------------------------------------------------------------------------------------

    def begin(self, chance: random.Random) -> None:
        registers = [at + more for at in self._models[0].capabilities.values() for more in (0, 2, 4, 8, 9, 10, 16)]
        self._accesses = [_access(chance, registers) for _ in range(1024)]
        self._data = [_written(chance) for _ in range(256)]

    def make(self, draw: bytes) -> PciCase:
        ops: list[Op] = []
        for number in range(2 + (draw[0] & 3)):
            kind, which, more, value = draw[4 + 4 * number : 8 + 4 * number]
            region, offset, count = self._accesses[which << 2 | more & 3]
            if kind < 170:
                ops.append(("write", region, offset, self._data[value][:count]))
            if kind > 120:
                ops.append(("read", region, offset, count))
        return PciCase(draw[1] % len(VARIANTS), ops)

    # ---- the oracle ----------------------------------------------------------------------------------------------

    def run(self, made: PciCase) -> None:
        chip, model = self._chips[made.variant], self._models[made.variant]
        chip.begin()
        model.begin()
        function = chip.function
        for name, region, offset, argument in made.ops:
            count = argument if name == "read" else len(argument)
            exists = self._exists(model, region, offset, count)
            try:
                if name == "read":
                    found = bytes(function.region_read(region, offset, count))
                else:
                    function.region_write(region, offset, memoryview(argument))
                    found = b""
            except PeerError:
                if exists:
                    raise Found(
                        "differs", f"{name} of {count:#x} bytes at {offset:#x} of region {region}", "refused"
                    ) from None
                continue
            if not exists:
                raise Found("differs", f"{name} of {count:#x} bytes at {offset:#x} of region {region}", "not refused")
            if name == "read":
                self._compare(model, region, offset, found, count)
            elif region == _CONFIG:
                model.write_config(offset, argument)
            elif region in _SIZES and model.decodes(region):
                model.memory[region][offset : offset + count] = argument
        if function.region_read(_CONFIG, 0, len(model.data)) != model.data:
            now = function.region_read(_CONFIG, 0, len(model.data))
            at = next(at for at, (one, other) in enumerate(zip(now, model.data, strict=True)) if one != other)
            raise Found(
                "differs", f"config space has {now[at]:#x} at {at:#x}, where {model.data[at]:#x} should be", "config"
            )
        if chip.memory != model.memory:
            raise Found("write", "memory of a BAR is not what it should be", "BAR")
        if function.bus_master != model.bus_master:
            raise Found("differs", f"Bus Master is {function.bus_master}", "bus master")

    @staticmethod
    def _exists(model: _PciModel, region: int, offset: int, count: int) -> bool:
        size = len(model.data) if region == _CONFIG else 0x1000 if region == _MSIX_BAR else _SIZES.get(region, 0)
        return bool(size) and offset + count <= size

    @staticmethod
    def _compare(model: _PciModel, region: int, offset: int, found: bytes, count: int) -> None:
        if region == _CONFIG:
            expected = bytes(model.data[offset : offset + count])
        elif not model.decodes(region):
            expected = b"\xff" * count
        elif region == _MSIX_BAR:
            expected = found  # whose words have masks of their own
        else:
            expected = bytes(model.memory[region][offset : offset + count])
        if found != expected:
            shown = f"{found[:16].hex()}, where {expected[:16].hex()} should be"
            raise Found("differs", f"{count:#x} bytes at {offset:#x} of region {region} are {shown}", "read")

    # ---- files ---------------------------------------------------------------------------------------------------

    def steps(self, made: PciCase) -> list[Step]:
        return [{"do": "function", "variant": made.variant}, *as_steps(made.ops, PARAMETERS)]

    def of_steps(self, steps: Sequence[Step]) -> PciCase:
        first, *others = steps
        if first["do"] != "function" or not 0 <= first["variant"] < len(VARIANTS):
            raise ValueError(f"the first step must be a function, of variant 0 to {len(VARIANTS) - 1}")
        return PciCase(first["variant"], as_ops(others, PARAMETERS))

    def close(self) -> None:
        for chip in self._chips:
            chip.function.disconnected()


def _capabilities(config: bytes) -> list[tuple[int, int]]:
    """Id and offset of each, along the list (6.7)."""
    found: list[tuple[int, int]] = []
    at = config[0x34]
    while at and len(found) < 48:
        found.append((config[at], at))
        at = config[at + 1]
    return found


def _put(mask: bytearray, at: int, bits: dict[int, int]) -> None:
    for offset, value in bits.items():
        size = (value.bit_length() + 7) // 8
        mask[at + offset : at + offset + size] = value.to_bytes(size, "little")


def _access(chance: random.Random, registers: Sequence[int]) -> tuple[int, int, int]:
    region = _CONFIG if chance.random() < 0.7 else chance.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1 << 31))
    roll = chance.random()
    if region != _CONFIG:
        size = _SIZES.get(region, 0x1000)
        offset = chance.choice((0, size - 4, size - 1, size, 4 * chance.randrange(size // 4), *_OFFSETS[-3:]))
    elif roll < 0.5:
        offset = chance.choice(_OFFSETS)
    else:
        offset = chance.choice(registers) if roll < 0.85 else chance.randrange(0x110)
    return region, offset, chance.choice(_WIDTHS)


def _written(chance: random.Random) -> bytes:
    """256 bytes, of which a write takes as many as it has room for."""
    roll = chance.random()
    if roll < 0.25:
        return b"\xff" * 256
    if roll < 0.35:
        return bytes(256)
    first = chance.choice((0, 1, 2, 3, 4, 6, 7, 0x47, 0x80, 0xFC, chance.getrandbits(8)))
    rest = bytes(255) if roll < 0.6 else chance.randbytes(255)
    return bytes((first,)) + rest
