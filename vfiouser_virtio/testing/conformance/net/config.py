"""Configuration of a network device (virtio 1.4, 5.1.4)."""

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.net import SPEED_UNKNOWN, VQ_PAIRS_MAX, VQ_PAIRS_MIN, Duplex, NetFeature, Status
from vfiouser_virtio.testing.conformance.checks import CONFIG, SHOULD
from vfiouser_virtio.testing.conformance.net.declare import net_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver
from vfiouser_virtio.testing.conformance.verdicts import expect, note
from vfiouser_virtio.vfio_user import RemoteError

_LAYOUT = "Device configuration layout"
_LEAST_IPV6_MTU = 1280
_MAX_SPEED = 0x7FFF_FFFF


@net_check(
    "virtio14/NC1",
    section=_LAYOUT,
    observe="max_virtqueue_pairs, and queue_size of the last pair and of the control queue behind it",
    features=(NetFeature.MQ, NetFeature.CTRL_VQ),
)
async def nc1(driver: ConformanceDriver) -> None:
    """max_virtqueue_pairs is 1 to 0x8000, and there are so many pairs of queues, and a control queue behind them."""
    bench, pairs = driver.bench, await driver.max_pairs()
    expect(VQ_PAIRS_MIN <= pairs <= VQ_PAIRS_MAX, f"max_virtqueue_pairs is {pairs:#x}")
    for index in (2 * pairs - 2, 2 * pairs - 1, 2 * pairs):
        await bench.select(index)
        size = await bench.get("queue_size")
        note(size > 0, f"max_virtqueue_pairs is {pairs:#x}, but queue {index:#x} has queue_size 0")


@net_check(
    "virtio14/NC2",
    section=_LAYOUT,
    observe="mtu after a reset, while the driver runs, and after the next reset",
    features=(NetFeature.MTU,),
)
async def nc2(driver: ConformanceDriver) -> None:
    """mtu is 68 to 65535, and never changes."""
    mtu = await driver.number("mtu")
    note(net.MIN_MTU <= mtu <= net.MAX_MTU, f"mtu is {mtu}")
    await driver.start(NetFeature.MTU)
    seen = {"while the driver runs": await driver.number("mtu")}
    await driver.bench.reset()
    seen["after the next reset"] = await driver.number("mtu")
    for when, now in seen.items():
        note(now == mtu, f"mtu was {mtu}, and is {now} {when}")


@net_check("virtio14/NC2-1280", section=_LAYOUT, keyword=SHOULD, observe="mtu", features=(NetFeature.MTU,))
async def nc2_1280(driver: ConformanceDriver) -> None:
    """mtu is at least 1280, so that IPv6 works."""
    mtu = await driver.number("mtu")
    expect(mtu >= _LEAST_IPV6_MTU, f"mtu is {mtu}")


@net_check(
    "virtio14/NC3",
    section=_LAYOUT,
    observe="rss_max_key_size, and rss_max_indirection_table_length where RSS is offered",
    features=(NetFeature.HASH_REPORT,),
)
async def nc3(driver: ConformanceDriver) -> None:
    """A hash key may have at least 40 bytes, and an indirection table at least 128 entries."""
    key, table = await driver.number("rss_max_key_size"), await driver.number("rss_max_indirection_table_length")
    note(key >= net.MIN_RSS_KEY, f"rss_max_key_size is {key}")
    if driver.offers(NetFeature.RSS):
        note(table >= net.MIN_RSS_TABLE, f"rss_max_indirection_table_length is {table}")


@net_check("virtio14/NC4", section=_LAYOUT, observe="speed and duplex", features=(NetFeature.SPEED_DUPLEX,))
async def nc4(driver: ConformanceDriver) -> None:
    """speed is 0 to 0x7fffffff Mbit/s, or 0xffffffff for unknown; duplex is 0, 1 or 0xff."""
    speed, duplex = await driver.number("speed"), await driver.number("duplex")
    note(speed <= _MAX_SPEED or speed == SPEED_UNKNOWN, f"speed is {speed:#x}")
    note(duplex in set(Duplex), f"duplex is {duplex:#x}")


@net_check(
    "virtio14/NC5",
    section=_LAYOUT,
    observe="write to each field after FEATURES_OK, read it again; an error reply is as good",
    needs=(CONFIG,),
)
async def nc5(driver: ConformanceDriver) -> None:
    """All fields of the configuration are read-only for the driver."""
    bench = driver.bench
    await driver.start()
    structure = bench.layout.device
    assert structure is not None
    before = await driver.config()
    for name, (at, size) in offsets(net.CONFIG).items():
        if at + size > structure.length:
            break
        for offset in range(at, at + size, step := size if size in (1, 2, 4) else 1):
            old = before.data[offset : offset + step]
            new = int.from_bytes(old, "little") ^ (1 << 8 * step) - 1
            try:
                await bench.client.bar_write(structure.bar, structure.offset + offset, step, new)
            except RemoteError:
                break
        now = (await driver.config())[name]
        note(now == before[name], f"{name} was {_shown(before[name])}, and is {_shown(now)} after a write")


@net_check(
    "virtio14/NC6",
    section=_LAYOUT,
    observe="status without GUEST_ANNOUNCE, before and after DRIVER_OK",
    features=(NetFeature.STATUS,),
)
async def nc6(driver: ConformanceDriver) -> None:
    """status has no bits but LINK_UP and ANNOUNCE; ANNOUNCE is only for a driver that knows of it."""
    await driver.start(NetFeature.STATUS)
    assert await driver.bench.get("device_status") & DeviceStatus.DRIVER_OK
    status = await driver.number("status")
    expect(not status & ~int(Status.LINK_UP), f"status is {status:#x}")


def _shown(value: int | bytes) -> str:
    return f"{value:#x}" if isinstance(value, int) else value.hex(":")
