"""Register accesses: config space, the virtio structures behind BAR 4, MSI-X (virtio 1.4, 4.1.4; PCI 3.0 §6)."""

from random import Random

from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.testing.fuzz import messages
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.ram import RINGS
from vfiouser_virtio.testing.fuzz.values import number, pick
from vfiouser_virtio.transports.pci import COMMON, DEVICE, ISR, MSIX_BAR, NOTIFY, VIRTIO_BAR

_CONFIG_SIZE = 0x1000
_BAR_SIZE = 0x4000
# What matters in config space: command, status, BARs, capability pointer, and then the capabilities, to 0xff.
_CONFIG_SPOTS = (4, 6, 0x10, 0x20, 0x34, 0x3C, *range(0x40, 0x100, 2))


def generate(random: Random, case: Case) -> list[Step]:  # noqa: ARG001 - all generators look alike
    """Walks over the registers: sometimes the way a driver goes, with a step wrong here and there."""
    steps: list[Step] = []
    if random.random() < 0.6:
        steps.append({"do": "bring_up", "size": random.choice((1, 2, 16, 64))})
    for _ in range(random.randint(4, 40)):
        roll = random.random()
        if roll < 0.55:
            steps.append(_common(random))
        elif roll < 0.75:
            steps += _config(random)
        elif roll < 0.85:
            steps.append(_anywhere(random))
        elif roll < 0.90:
            steps.append(_request(random))
        elif roll < 0.94:
            steps.append({"do": random.choice(("unmap", "map", "settle", "pause", "kick"))})
        elif roll < 0.97:
            steps.append(messages.message(random))
        else:
            steps.append({"do": "bring_up"})
    return [step | {"queue": random.randrange(3)} if step["do"] == "kick" else step for step in steps]


def _request(random: Random) -> Step:
    first = random.choice((b"S", b"e", b"C"))
    return {
        "do": "request",
        "queue": random.randrange(2),
        "out": [(first + b"1234").hex()],
        "room": [random.choice((1, 8))],
    }


def _write(random: Random, region: int, offset: int, data: bytes) -> Step:
    step: Step = {"do": "write", "region": region, "offset": offset, "data": data.hex()}
    return step | {"posted": True} if random.random() < 0.5 else step


def _common(random: Random) -> Step:
    """A field of the common configuration, by name."""
    name = random.choice(list(COMMON_CFG_OFFSETS))
    offset, size = COMMON_CFG_OFFSETS[name]
    if random.random() < 0.25:
        return {"do": "read", "region": VIRTIO_BAR, "offset": COMMON + offset, "count": size}
    if size == 8 and random.random() < 0.4:  # halves
        offset, size = offset + random.choice((0, 4)), 4
    elif random.random() < 0.1:
        size = random.choice((1, 2, 3, 4, 8, 16, 64 - offset))
    return _write(random, VIRTIO_BAR, COMMON + offset, (_value(random, name, size)).to_bytes(size, "little"))


def _value(random: Random, name: str, size: int) -> int:
    if name == "device_status":
        value = random.choice(
            (0, 1, 3, 0xB, 0xF, 0xF, 0x4B, 0x8F, 0x1F, 0x40, 0x80, int(DeviceStatus.DRIVER_OK), random.getrandbits(8))
        )
    elif name in ("queue_desc", "queue_driver", "queue_device"):
        value = random.choice((RINGS, RINGS + 0x800, RINGS + 0x1000, number(random, 64), number(random, 64) & ~0xF))
    elif name in ("queue_enable", "queue_reset"):
        value = random.choice((0, 1, 1, 1, 2, 0xFFFF))
    elif name == "queue_size":
        value = random.choice((0, 1, 2, 3, 8, 64, 65, 128, 0x8000, 0xFFFF))
    elif name == "queue_select":
        value = random.choice((0, 0, 1, 1, 2, 3, 0xFFFF))
    else:
        value = pick(random, 8 * size)
    return value & ((1 << 8 * size) - 1)


def _config(random: Random) -> list[Step]:
    """Config space: a register, or the window onto a BAR that is in it (4.1.4.9)."""
    config = PciRegion.CONFIG
    if random.random() < 0.3:
        # With the layout of VirtioPci the PCI_CFG capability is the fifth; find it the way a fuzzer does: by trying.
        at = random.choice(_WINDOWS)
        bar = random.choice((4, 4, 4, 1, 0, 5, 6, 7, 255))
        offset = random.choice((COMMON, ISR, DEVICE, NOTIFY, COMMON + 0x14, _BAR_SIZE - 1, _BAR_SIZE, pick(random, 32)))
        length = random.choice((1, 2, 4, 0, 3, 8, 0xFFFFFFFF))
        access: Step = {"do": "read", "region": config, "offset": at + 16, "count": random.choice((1, 2, 4, 3))}
        if random.random() < 0.5:
            access = _write(random, config, at + 16, random.randbytes(random.choice((1, 2, 4, 8))))
        return [
            _write(random, config, at + 4, bytes([bar])),
            _write(random, config, at + 8, offset.to_bytes(4, "little")),
            _write(random, config, at + 12, length.to_bytes(4, "little")),
            access,
        ]
    offset = random.choice(_CONFIG_SPOTS) if random.random() < 0.9 else random.randrange(_CONFIG_SIZE)
    count = random.choice((1, 2, 4, 4, 3, 8, 64, _CONFIG_SIZE - offset))
    if random.random() < 0.3:
        return [{"do": "read", "region": config, "offset": offset, "count": count}]
    data = random.choice((b"\0", b"\xff", b"\x06\x04", b"\x80\x00", b"\x03\xc0", random.randbytes(4)))
    return [_write(random, config, offset, (data * count)[: min(count, 64)])]


_WINDOWS = tuple(range(0x40, 0xB0, 4))


def _anywhere(random: Random) -> Step:
    """Any width at any place of any region."""
    region = random.choice((VIRTIO_BAR, VIRTIO_BAR, MSIX_BAR, random.randrange(10)))
    offset = random.choice((COMMON, ISR, DEVICE, NOTIFY, NOTIFY + 4, number(random, 16))) + random.randrange(8)
    count = random.choice((1, 2, 3, 4, 8, 64, 0x1000))
    if random.random() < 0.5:
        return {"do": "read", "region": region, "offset": offset, "count": count}
    return _write(random, region, offset, random.randbytes(min(count, 64)))
