"""Common configuration structure layout (virtio 1.4, 4.1.4.3): the registers themselves."""

from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.ring import MAX_QUEUE_SIZE
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import ADVICE, CONFIG, check, offers
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, expect, note
from vfiouser_virtio.testing.raw.bring_up import negotiate

_SECTION = "Common configuration structure layout"
_MAX_QUEUES = 0x10000
_QUEUES_TRIED = 64
_NO_SPLIT_SIZE = 3  # of a split ring, which has a power of two (2.7)


@check("virtio14/CC2", section=_SECTION, observe="device_feature after each of many device_feature_select")
async def cc2(bench: Bench) -> None:
    """device_feature shows the 32 bits that device_feature_select asks for, whatever was written there."""
    words: dict[int, int] = {}
    for select in (0, 1, 2, 3, 1, 0, 4, 5, 0xFF, 0x8000_0000, 0xFFFF_FFFF, 0, 1):
        await bench.set("device_feature_select", select)
        seen = await bench.get("device_feature")
        if select in words:
            note(seen == words[select], f"word {select:#x} was {words[select]:#x}, and now is {seen:#x}")
        words[select] = seen
        note(
            select < 4 or not seen, f"word {select:#x} is {seen:#x}: bits from {32 * select} on, which nothing defines"
        )


@check("virtio14/CC3", section=_SECTION, observe="write driver_feature, select the other word and back, read")
async def cc3(bench: Bench) -> None:
    """driver_feature reads back what the driver has accepted."""
    await bench.set_all(list(negotiate(bench.minimum))[:-1])  # all but FEATURES_OK
    for word in (1, 0, 1):
        await bench.set("driver_feature_select", word)
        seen, written = await bench.get("driver_feature"), bench.minimum >> 32 * word & 0xFFFF_FFFF
        note(seen & written == written, f"word {word}: {written:#x} was accepted, {seen:#x} is read")


@check(
    "virtio14/CC4",
    section=_SECTION,
    observe="read the configuration between two reads of config_generation, often: other bytes, another generation",
    needs=(CONFIG,),
)
async def cc4(bench: Bench) -> None:
    """config_generation changes when the configuration has changed since the driver has read it."""
    before = None
    for _ in range(16):
        first = await bench.get("config_generation")
        data = await bench.config(64)
        if first != await bench.get("config_generation"):
            continue  # it changed meanwhile, and says so
        if before is not None and before[0] == first:
            expect(data == before[1], f"the configuration has changed, config_generation is {first:#x} as before")
        before = first, data


@check("virtio14/CC5", section=_SECTION, observe="set ACKNOWLEDGE and DRIVER, write 0, poll; then initialise again")
async def cc5(bench: Bench) -> None:
    """Writing 0 to device_status resets the device, and it reads as 0 when that is done."""
    for status in (DeviceStatus.ACKNOWLEDGE, DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER):
        await bench.set("device_status", int(status))
        seen = await bench.get("device_status")
        note(seen == status, f"device_status: {int(status):#x} was written, {seen:#x} is read")
    await bench.negotiate()


@check(
    "virtio14/CC6",
    section=_SECTION,
    observe="enable a queue, read; reset, read; queue_reset where RING_RESET is offered",
)
async def cc6(bench: Bench) -> None:
    """queue_enable is 0 after a reset; queue_reset is 0 after a reset, and after the queue was enabled."""
    ring_reset = bool(bench.offered & Feature.RING_RESET.mask)
    await bench.start(*[Feature.RING_RESET] * ring_reset)
    names = ["queue_enable"] + ["queue_reset"] * ring_reset  # which is not there without RING_RESET
    for name in names:
        seen = await bench.get(name)
        note(seen == (name == "queue_enable"), f"{name} of a live queue is {seen:#x}")
    await bench.reset()
    await bench.select(bench.queue)
    for name in names:
        seen = await bench.get(name)
        note(seen == 0, f"{name} is {seen:#x} after a reset")


@check(
    "virtio14/CC7",
    section=_SECTION,
    observe="write 1 to queue_reset, poll until it is 0, read queue_enable",
    needs=(offers(Feature.RING_RESET),),
)
async def cc7(bench: Bench) -> None:
    """queue_reset reads 1 while the queue is being reset; then both it and queue_enable read 0."""
    await bench.start(Feature.RING_RESET)
    await bench.set("queue_reset", 1)

    async def done() -> bool:
        return await bench.get("queue_reset") == 0

    await bench.until(done, "queue_reset does not become 0")
    seen = await bench.get("queue_enable")
    expect(seen == 0, f"queue_enable is {seen:#x} after the queue was reset")


@check("virtio14/CC8", section=_SECTION, observe="queue_size for every queue_select, existing ones and others")
async def cc8(bench: Bench) -> None:
    """queue_size is 0 for a queue that does not exist; until RING_PACKED is negotiated it is a power of two."""
    number = await bench.get("num_queues")
    for packed in [False, True][: 2 if bench.offered & Feature.RING_PACKED.mask else 1]:
        await bench.negotiate(*[Feature.RING_PACKED] * packed)
        for queue in range(number):
            await bench.select(queue)
            size = await bench.get("queue_size")
            note(packed or not size & (size - 1), f"queue {queue} has size {size:#x}, no power of two")
            note(size <= MAX_QUEUE_SIZE, f"queue {queue} has size {size:#x}, above {MAX_QUEUE_SIZE:#x}")
    for queue in (number + 64, 0x7FFF, 0xFFFF):  # far from where an administration queue may be
        await bench.select(queue)
        size = await bench.get("queue_size")
        note(size == 0, f"queue {queue:#x}, which does not exist, has size {size:#x}")


@check(
    "virtio14/CC8-reset",
    section=_SECTION,
    keyword=ADVICE,  # the description of queue_size says so (4.1.4.3), no MUST of 4.1.4.3.1 does
    observe="write half of queue_size, reset, read; for up to 64 queues",
)
async def cc8_reset(bench: Bench) -> None:
    """On reset queue_size specifies the maximum queue size that the device supports."""
    await bench.negotiate()
    largest: dict[int, int] = {}
    for queue in range(min(await bench.get("num_queues"), _QUEUES_TRIED)):
        await bench.select(queue)
        largest[queue] = await bench.get("queue_size")
        await bench.set("queue_size", largest[queue] // 2)
    if not any(size > 1 for size in largest.values()):
        raise NotApplicable("no queue can be made smaller")
    await bench.reset()
    for queue, size in largest.items():
        await bench.select(queue)
        seen = await bench.get("queue_size")
        note(seen == size, f"queue {queue} has size {seen:#x} after a reset, {size:#x} before the driver changed it")


@check(
    "virtio14/CC8-split",
    section=_SECTION,
    observe="without RING_PACKED write 3 to queue_size, and read it",
)
async def cc8_split(bench: Bench) -> None:
    """Without RING_PACKED the device presents 0 or a power of 2 in queue_size, also after 3 was written there."""
    await bench.negotiate()
    await bench.select(bench.queue)
    if await bench.get("queue_size") < _NO_SPLIT_SIZE:
        raise NotApplicable("queue_size is smaller than 3")
    await bench.set("queue_size", _NO_SPLIT_SIZE)
    seen = await bench.get("queue_size")
    note(not seen & (seen - 1), f"queue_size is {seen:#x} after {_NO_SPLIT_SIZE:#x} was written, no power of two")


@check(
    "virtio14/CC9",
    section=_SECTION,
    observe="admin_queue_index, admin_queue_num and num_queues",
    needs=(offers(Feature.ADMIN_VQ),),
)
async def cc9(bench: Bench) -> None:
    """Administration queues come after the others, and end within 16 bits."""
    if bench.layout.common.length < 64:
        raise NotApplicable(f"the structure has {bench.layout.common.length:#x} bytes, and no such fields")
    await bench.negotiate(Feature.ADMIN_VQ)
    index, count = await bench.get("admin_queue_index"), await bench.get("admin_queue_num")
    queues = await bench.get("num_queues")
    expect(index >= queues, f"admin_queue_index {index:#x} is below num_queues {queues:#x}")
    expect(index + count <= _MAX_QUEUES, f"admin_queue_index {index:#x} and {count:#x} queues go beyond 0x10000")
