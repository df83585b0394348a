"""Queue pairs, receive-side scaling and hashes (virtio 1.4, 5.1.9.5.5 to 5.1.9.5.7): which settings are taken."""

from collections.abc import Sequence

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import MIN_RSS_KEY, MIN_RSS_TABLE, Ack, CtrlMq, HashType, NetFeature
from vfiouser_virtio.testing.conformance.checks import ADVICE
from vfiouser_virtio.testing.conformance.net.control import SECTION
from vfiouser_virtio.testing.conformance.net.declare import net_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, note

AUTOMATIC = f"{SECTION} / Automatic receive steering in multiqueue mode"
RSS = f"{SECTION} / Receive-side scaling (RSS)"
# The key of Microsoft's "Verifying the RSS hash calculation", by which everybody tests.
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
_F = NetFeature
_PAIRS, _HASH_CONFIG = codec(net.MQ_PAIRS), codec(net.HASH_CONFIG)
_RSS_CONFIG, _RSS_QUEUE, _RSS_TAIL = codec(net.RSS_CONFIG), codec(net.RSS_QUEUE), codec(net.RSS_CONFIG_TAIL)
_MAX_KEY = 255


def pairs_data(pairs: int) -> bytes:
    """Data of MQ_VQ_PAIRS_SET."""
    return _PAIRS.pack(pairs)


def rss_data(
    table: Sequence[int],
    *,
    mask: int | None = None,
    unclassified: int = 0,
    types: int = HashType.IPv4 | HashType.TCPv4,
    pairs: int = 1,
    key: bytes = KEY,
) -> bytes:
    """Data of MQ_RSS_CONFIG."""
    mask = len(table) - 1 if mask is None else mask
    queues = b"".join(map(_RSS_QUEUE.pack, table))
    return _RSS_CONFIG.pack(types, mask, unclassified) + queues + _RSS_TAIL.pack(pairs, len(key)) + key


def hash_data(types: int, key: bytes = KEY) -> bytes:
    """Data of MQ_HASH_CONFIG."""
    return _HASH_CONFIG.pack(types, bytes(8), len(key)) + key


def with_mq(driver: ConformanceDriver) -> list[NetFeature]:
    """RSS, and MQ where it is offered, too, as Linux negotiates them."""
    return [_F.RSS, *([_F.MQ] if driver.offers(_F.MQ) else [])]


@net_check(
    "virtio14/NM1",
    section=AUTOMATIC,
    observe="VQ_PAIRS_SET with 1, with 2, and with 1 again: ack",
    features=(_F.CTRL_VQ, _F.MQ),
)
async def nm1(driver: ConformanceDriver) -> None:
    """With MQ a driver may use any number of pairs from 1 to max_virtqueue_pairs."""
    await driver.start(_F.CTRL_VQ, _F.MQ, pairs=2)
    for pairs in (1, 2, 1):
        ack = (await driver.command(CtrlMq.VQ_PAIRS_SET, pairs_data(pairs))).ack
        note(ack == Ack.OK, f"MQ_VQ_PAIRS_SET {pairs}: ack is {ack:#x}")


@net_check(
    "virtio14/NM2",
    section=AUTOMATIC,
    keyword=ADVICE,
    observe="VQ_PAIRS_SET with 0, max_virtqueue_pairs + 1 and 0xffff: ack",
    features=(_F.CTRL_VQ, _F.MQ),
)
async def nm2(driver: ConformanceDriver) -> None:
    """A number of pairs of 0, or beyond max_virtqueue_pairs, is answered ERR."""
    await driver.start(_F.CTRL_VQ, _F.MQ)
    for pairs in (0, await driver.max_pairs() + 1, 0xFFFF):
        await driver.refused(CtrlMq.VQ_PAIRS_SET, pairs_data(pairs), f"{pairs:#x}")


@net_check(
    "virtio14/NH1",
    section="Device Operation / Processing of Incoming Packets / Hash calculation for incoming packets",
    observe="MQ_RSS_CONFIG with a table of the greatest length where RSS is offered, else MQ_HASH_CONFIG: ack",
    features=(_F.CTRL_VQ, _F.HASH_REPORT),
)
async def nh1(driver: ConformanceDriver) -> None:
    """With HASH_REPORT the device supports MQ_RSS_CONFIG if it offers RSS, and MQ_HASH_CONFIG if it does not."""
    types = await driver.number("supported_hash_types")
    if driver.offers(_F.RSS):
        await driver.start(_F.CTRL_VQ, _F.HASH_REPORT, *with_mq(driver))
        length = 1 << (await driver.number("rss_max_indirection_table_length")).bit_length() - 1
        await driver.ok(CtrlMq.RSS_CONFIG, rss_data([0] * length, types=types))
    else:
        await driver.start(_F.CTRL_VQ, _F.HASH_REPORT)
        await driver.ok(CtrlMq.HASH_CONFIG, hash_data(types))


@net_check(
    "virtio14/NH2",
    section=f"{RSS} / Setting RSS parameters",
    keyword=ADVICE,
    observe="tables of 3 and of too many entries, queues that there are not, unknown hash types, too long a key: ack",
    features=(_F.CTRL_VQ, _F.RSS),
)
async def nh2(driver: ConformanceDriver) -> None:
    """An RSS configuration that no driver may send is answered ERR."""
    await driver.start(_F.CTRL_VQ, *with_mq(driver))
    queues = await driver.max_pairs()
    longest = max(await driver.number("rss_max_indirection_table_length"), MIN_RSS_TABLE)
    key = max(await driver.number("rss_max_key_size"), MIN_RSS_KEY)
    alien = ~await driver.number("supported_hash_types") & 0xFFFF_FFFF
    wrong = {
        "with a table of 3 entries": rss_data([0, 0, 0]),
        f"with a table of {2 << longest.bit_length()} entries": rss_data([0] * (2 << longest.bit_length())),
        "with a table that it is too short for": rss_data([0], mask=longest - 1)[:-1],
        f"with queue {queues:#x} in its table": rss_data([queues]),
        f"with queue {queues:#x} for all that is unclassified": rss_data([0], unclassified=queues),
        "with a hash type that is not supported": rss_data([0], types=alien & -alien),
        "with 0 transmit queues": rss_data([0], pairs=0),
    }
    if key < _MAX_KEY:
        wrong[f"with a key of {key + 1} bytes"] = rss_data([0], key=bytes(key + 1))
    if not alien:
        raise NotApplicable("all bits are hash types that are supported")
    for why, data in wrong.items():
        await driver.refused(CtrlMq.RSS_CONFIG, data, why)
