"""Grammar of good conversations with a vfio-user server: what QEMU does, and what the next QEMU and others do.

Every function makes one message as it should be. What is wrong in a case is put in by `mutations`.
"""

from collections.abc import Callable
from random import Random

from vfiouser_virtio.protocols.vfio_user import (
    DIRTY_BITMAP_RANGE,
    FEATURE_DMA_LOGGING_CONTROL,
    FEATURE_DMA_LOGGING_REPORT,
    FEATURE_MIG_DEVICE_STATE,
    WRITE_MULTI_ENTRY,
    Command,
    DeviceFeature,
    DeviceFeatureFlags,
    DirtyPagesFlags,
    DmaUnmapFlags,
    IrqSetFlags,
)
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.ram import PIECES
from vfiouser_virtio.testing.fuzz.servers.shown import ShownDevice
from vfiouser_virtio.testing.fuzz.servers.virtio_talk import talk
from vfiouser_virtio.testing.raw.client import QEMU_CAPABILITIES

_STATES = (1, 2, 4, 2, 1, 3, 5, 0)  # linux/vfio.h: VFIO_DEVICE_STATE_*
_WIDTHS = (1, 2, 4, 4, 4, 8)
_MAX_DATA = 4096
_TALKS = 0.4
"""Part of the conversations with a virtio device in which its queues are used."""


def message(command: Command, **content: object) -> Step:
    """A message of a case."""
    return {"do": "message", "command": command.name, **{key: value for key, value in content.items() if value != ""}}


def version() -> Step:
    """VERSION as QEMU's."""
    return message(Command.VERSION, fields={"major": 0, "minor": 0}, text=QEMU_CAPABILITIES + "\0")


def _info(_random: Random, _shown: ShownDevice) -> Step:
    return message(Command.DEVICE_GET_INFO, fields={"argsz": 16})


def _region_info(random: Random, shown: ShownDevice) -> Step:
    return message(
        Command.DEVICE_GET_REGION_INFO, fields={"argsz": random.choice((32, 4096)), "index": _region(random, shown)}
    )


def _io_fds(random: Random, shown: ShownDevice) -> Step:
    fields = {"argsz": random.choice((16, 16 + 40, 4096)), "index": _region(random, shown)}
    return message(Command.DEVICE_GET_REGION_IO_FDS, fields=fields)


def _irq_info(random: Random, shown: ShownDevice) -> Step:
    return message(Command.DEVICE_GET_IRQ_INFO, fields={"argsz": 16, "index": _irq(random, shown)})


def dma_map(index: int) -> Step:
    """A piece of the RAM."""
    piece = PIECES[index]
    fields = {"argsz": 32, "flags": piece.flags, "offset": piece.address, "address": piece.address, "size": piece.size}
    return message(Command.DMA_MAP, fields=fields, fds=["ram"])


def _dma_map(random: Random, _shown: ShownDevice) -> Step:
    if random.random() < 0.5:
        return dma_map(random.randrange(len(PIECES)))
    size = random.choice((0x1000, 0x2000, 0x40000))
    fields = {"argsz": 32, "flags": 3, "address": random.choice((0x100000, 0x200000, 1 << 32, 1 << 40)), "size": size}
    return message(Command.DMA_MAP, fields=fields, **random.choice(({"fds": ["memfd"]}, {"fds": ["memfd"]}, {})))


def _dma_unmap(random: Random, _shown: ShownDevice) -> Step:
    if random.random() < 0.1:
        return message(Command.DMA_UNMAP, fields={"argsz": 24, "flags": int(DmaUnmapFlags.ALL)})
    piece = random.choice(PIECES)
    fields = {"argsz": 24, "flags": 0, "address": piece.address, "size": piece.size}
    if random.random() < 0.2:
        # Behind the structure the bitmap that is asked for: its page size and its length.
        data = (4096).to_bytes(8, "little") + (piece.size // 4096 // 8).to_bytes(8, "little")
        fields |= {"argsz": 40, "flags": int(DmaUnmapFlags.GET_DIRTY_BITMAP)}
        return message(Command.DMA_UNMAP, fields=fields, data=data.hex())
    return message(Command.DMA_UNMAP, fields=fields)


def _set_irqs(random: Random, shown: ShownDevice) -> Step:
    index = _irq(random, shown)
    count = random.randint(0, min(shown.irqs.get(index, 1), 8))
    data = random.choice((IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, *[IrqSetFlags.DATA_EVENTFD] * 3))
    action = random.choice((IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, *[IrqSetFlags.ACTION_TRIGGER] * 3))
    fields = {"argsz": 20, "flags": int(data | action), "index": index, "start": 0, "count": count}
    if data == IrqSetFlags.DATA_BOOL:
        fields["argsz"] += count
        return message(Command.DEVICE_SET_IRQS, fields=fields, data=random.randbytes(count).hex())
    if data == IrqSetFlags.DATA_EVENTFD and count and random.random() < 0.9:
        return message(Command.DEVICE_SET_IRQS, fields=fields, fds=["eventfd"] * count)
    return message(Command.DEVICE_SET_IRQS, fields=fields)


def _access(random: Random, shown: ShownDevice) -> dict[str, int]:
    region = _region(random, shown)
    size = shown.regions.get(region, 0x1000)
    count = random.choice(_WIDTHS) if random.random() < 0.85 else random.randint(1, _MAX_DATA)
    count = min(count, size)
    place = random.choice((0, random.randrange(0, min(size, 0x100)), random.randrange(size), size - count))
    return {"offset": min(place // count * count, size - count), "region": region, "count": count}


def _region_read(random: Random, shown: ShownDevice) -> Step:
    return message(Command.REGION_READ, fields=_access(random, shown))


def _region_write(random: Random, shown: ShownDevice) -> Step:
    fields = _access(random, shown)
    data = random.choice((bytes(fields["count"]), b"\xff" * fields["count"], random.randbytes(fields["count"])))
    posted = {"flags": 0x10} if random.random() < 0.3 else {}
    return message(Command.REGION_WRITE, fields=fields, data=data.hex(), **posted)


def _write_multi(random: Random, shown: ShownDevice) -> Step:
    count = random.randint(0, 4)
    entries = [_access(random, shown) for _ in range(count)]
    data = b"".join(
        WRITE_MULTI_ENTRY.build({**entry, "count": min(entry["count"], 8), "data": random.randbytes(8)})
        for entry in entries
    )
    return message(Command.REGION_WRITE_MULTI, fields={"wr_cnt": count}, data=data.hex())


def _reset(_random: Random, _shown: ShownDevice) -> Step:
    return message(Command.DEVICE_RESET)


def _feature(random: Random, _shown: ShownDevice) -> Step:
    feature = random.choice(list(DeviceFeature))
    how = random.choice((DeviceFeatureFlags.GET, DeviceFeatureFlags.SET, DeviceFeatureFlags.PROBE))
    if random.random() < 0.2:
        how |= DeviceFeatureFlags.PROBE
    data = b""
    piece = random.choice(PIECES)
    if feature == DeviceFeature.MIG_DEVICE_STATE:
        data = FEATURE_MIG_DEVICE_STATE.build({"device_state": random.choice(_STATES), "data_fd": -1})
    elif feature == DeviceFeature.DMA_LOGGING_START:
        ranges = [{"iova": piece.address, "length": piece.size}]
        data = FEATURE_DMA_LOGGING_CONTROL.build({"page_size": 4096, "ranges": ranges})
    elif feature == DeviceFeature.DMA_LOGGING_REPORT:
        fields = {"iova": piece.address, "length": piece.size, "page_size": 4096, "bitmap": b""}
        data = FEATURE_DMA_LOGGING_REPORT.build(fields)
    elif feature == DeviceFeature.MIGRATION:
        data = bytes(8)
    argsz = 8 + len(data) + (8 if feature == DeviceFeature.DMA_LOGGING_REPORT else 0)
    return message(Command.DEVICE_FEATURE, fields={"argsz": argsz, "flags": int(how) | feature}, data=data.hex())


def _mig_read(random: Random, _shown: ShownDevice) -> Step:
    size = random.choice((0, 1, 64, 4096, 0x100000))
    return message(Command.MIG_DATA_READ, fields={"argsz": 8 + size, "size": size})


def _mig_write(random: Random, _shown: ShownDevice) -> Step:
    size = random.choice((0, 1, 64, 4096))
    return message(Command.MIG_DATA_WRITE, fields={"argsz": 8 + size, "size": size}, data=random.randbytes(size).hex())


def _dirty_pages(random: Random, _shown: ShownDevice) -> Step:
    flags = random.choice(list(DirtyPagesFlags))
    data = b""
    if flags == DirtyPagesFlags.GET_BITMAP:
        piece = random.choice(PIECES)
        fields = {"iova": piece.address, "size": piece.size, "bitmap_pgsize": 4096}
        data = DIRTY_BITMAP_RANGE.build({**fields, "bitmap_size": piece.size // 4096 // 8, "bitmap": b""})
    return message(Command.DIRTY_PAGES, fields={"argsz": 8 + len(data), "flags": int(flags)}, data=data.hex())


def _migration(random: Random, _shown: ShownDevice) -> list[Step]:
    """A device's state, read or written from end to end."""

    def state(number: int) -> Step:
        data = FEATURE_MIG_DEVICE_STATE.build({"device_state": number, "data_fd": -1})
        flags = int(DeviceFeatureFlags.SET) | DeviceFeature.MIG_DEVICE_STATE
        return message(Command.DEVICE_FEATURE, fields={"argsz": 8 + len(data), "flags": flags}, data=data.hex())

    size = random.choice((1, 64, 4096, 20000))
    read = message(Command.MIG_DATA_READ, fields={"argsz": 8 + size, "size": size})
    write = message(Command.MIG_DATA_WRITE, fields={"argsz": 8 + size, "size": size}, data=random.randbytes(size).hex())
    if random.random() < 0.5:
        return [state(3), *[read] * random.randint(1, 4), state(1), state(2)]
    return [state(1), state(4), *[write] * random.randint(1, 4), state(1), state(2)]


_MAKERS: tuple[tuple[Callable[[Random, ShownDevice], Step], int], ...] = (
    (_info, 1),
    (_region_info, 3),
    (_io_fds, 1),
    (_irq_info, 2),
    (_dma_map, 5),
    (_dma_unmap, 4),
    (_set_irqs, 6),
    (_region_read, 5),
    (_region_write, 6),
    (_write_multi, 2),
    (_reset, 1),
    (_feature, 4),
    (_mig_read, 1),
    (_mig_write, 1),
    (_dirty_pages, 1),
)


def any_message(random: Random, shown: ShownDevice) -> Step:
    """A good message of any command but VERSION."""
    [maker] = random.choices([maker for maker, _ in _MAKERS], [weight for _, weight in _MAKERS])
    return maker(random, shown)


def conversation(random: Random, shown: ShownDevice) -> list[Step]:
    """A good conversation: VERSION, memory, and what comes after it."""
    steps = [version()]
    if random.random() < 0.8:
        steps += [dma_map(index) for index in range(random.randint(1, len(PIECES)))]
        if shown.virtio is not None and random.random() < _TALKS:
            steps += talk(random, shown.virtio)
    for _ in range(random.choice((1, 2, 4, 8, 16, 24))):
        if random.random() < 0.03:
            steps += _migration(random, shown)
        else:
            steps.append(any_message(random, shown))
    return [step | {"id": number} for number, step in enumerate(steps, 1)]


def _region(random: Random, shown: ShownDevice) -> int:
    return random.choice(list(shown.regions) or [0])


def _irq(random: Random, shown: ShownDevice) -> int:
    return random.choice(list(shown.irqs) or [0])
