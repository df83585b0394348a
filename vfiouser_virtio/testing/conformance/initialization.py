"""Device status and feature bits (virtio 1.4, 2.1, 2.2 and 6), device reset (2.4), configuration (2.5)."""

from collections.abc import Mapping

from vfiouser_virtio.protocols.virtio.device_types import device_type, known_type
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature, is_device_type_bit
from vfiouser_virtio.protocols.virtio.pci import CfgType, Isr
from vfiouser_virtio.testing.conformance.bench import TRANSITIONAL, Bench
from vfiouser_virtio.testing.conformance.checks import ADVICE, CONFIG, EXERCISE, SHOULD, check, offers
from vfiouser_virtio.testing.conformance.verdicts import ExerciseFailed, Failed, NotApplicable, expect, fail, note
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK

_NOT_SET = "descriptor 0xffff was made available, NEEDS_RESET is not set"
_EXTENDED_CONFIG = 0x100
_EXT_CAP_SRIOV = 0x10
# With NOTIFY_ON_EMPTY and ANY_LAYOUT, which a transitional device may still offer (6.3).
_RESERVED = frozenset(feature.value for feature in Feature)


def _prerequisites(bench: Bench) -> tuple[Mapping[int, tuple[int, ...]], Mapping[int, tuple[int, ...]]]:
    """Bit to bits of which one, and to those that all must be offered with it (2.2.1, and the type's own section)."""
    known = device_type(bench.device_type)
    return known.requires, known.requires_all


def _bits(features: int) -> list[int]:
    return [bit for bit in range(features.bit_length()) if features >> bit & 1]


@check(
    "virtio14/ST1",
    section="Device Status Field",
    observe="make a buffer available and notify before DRIVER_OK, watch used.idx and ISR status; then set DRIVER_OK",
    needs=(EXERCISE,),
)
async def st1(bench: Bench) -> None:
    """Before DRIVER_OK the device consumes no buffers and sends no used buffer notifications."""
    await bench.negotiate()
    for queue in range(bench.queue):
        await bench.new_ring(queue)
    ring = await bench.new_ring()
    await bench.isr()
    ring.offer(bench.chain(ring, bench.request()))
    await bench.kick()
    await bench.quiet()
    note(ring.used_idx == 0, f"used.idx is {ring.used_idx:#x} before DRIVER_OK")
    seen = await bench.isr()
    note(not seen & Isr.QUEUE, f"ISR status is {seen:#x} before DRIVER_OK")
    await bench.driver_ok()
    await bench.kick()
    await bench.wait_used(ring, 1)


@check(
    "virtio14/ST2",
    section="Device Status Field",
    observe="make a descriptor index beyond the queue available; where NEEDS_RESET is set then: bit 1 of ISR status",
    needs=(EXERCISE,),
)
async def st2(bench: Bench) -> None:
    """When it sets NEEDS_RESET, and DRIVER_OK is set, the device sends a configuration change notification."""
    if not await _needs_reset(bench):
        raise NotApplicable(f"{_NOT_SET} (ST2-sets)")
    seen = await bench.wait_isr(Isr.CONFIG)
    expect(bool(seen & Isr.CONFIG), f"NEEDS_RESET without a configuration change notification: ISR status {seen:#x}")


@check(
    "virtio14/ST2-sets",
    section="Device Status Field",
    keyword=ADVICE,  # 2.1.2: SHOULD "when it enters an error state that a reset is needed"; it leaves open when that is
    observe="make a descriptor index beyond the queue available: NEEDS_RESET",
    needs=(EXERCISE,),
)
async def st2_sets(bench: Bench) -> None:
    """A ring that no driver could have written is an error state that the device shows by NEEDS_RESET."""
    expect(await _needs_reset(bench), _NOT_SET)


async def _needs_reset(bench: Bench) -> bool:
    """Break a running ring, with ISR status read before; whether the device sets NEEDS_RESET within its time."""
    ring = await bench.start()
    await bench.isr()
    ring.offer(0xFFFF)
    await bench.kick()

    async def is_set() -> bool:
        return bool(await bench.get("device_status") & DeviceStatus.NEEDS_RESET)

    try:
        await bench.until(is_set, _NOT_SET)
    except Failed:
        return False
    return True


@check(
    "virtio14/FB1",
    section="Feature Bits",
    observe="all offered bits against those that are defined, and their prerequisites",
)
async def fb1(bench: Bench) -> None:
    """No bit is offered that nothing defines, or without the bits that it requires."""
    known = known_type(bench.device_type)
    own = None
    if known is not None:
        own = frozenset(feature.value for feature in known.features) if known.features is not None else frozenset[int]()
    for bit in _bits(bench.offered):
        if is_device_type_bit(bit):
            note(own is None or bit in own, f"bit {bit} is offered, which this device type does not define")
        else:
            note(bit in _RESERVED, f"reserved bit {bit} is offered")
        required, all_required = (which.get(bit, ()) for which in _prerequisites(bench))
        met = not required or any(bench.offered >> other & 1 for other in required)
        note(met, f"bit {bit} is offered without bit {' or '.join(map(str, required))}, which it requires")
        lacking = [other for other in all_required if not bench.offered >> other & 1]
        note(not lacking, f"bit {bit} is offered without bit {' and '.join(map(str, lacking))}, which it requires")


@check(
    "virtio14/FB2",
    section="Feature Bits",
    keyword=SHOULD,
    observe="FEATURES_OK for the least set, all that is offered, all but one each, and for one that is not offered",
)
async def fb2(bench: Bench) -> None:
    """The device accepts any valid subset of what it offers, and refuses FEATURES_OK for anything else."""
    offered, least = bench.offered, bench.minimum
    subsets = [least, offered]
    needed = {bit for which in _prerequisites(bench) for required in which.values() for bit in required}
    subsets += [offered & ~(1 << bit) for bit in _bits(offered & ~least) if bit not in needed]
    for features in subsets:
        await bench.reset()
        note(await bench.try_features(features), f"FEATURES_OK is refused for {features:#x} of {offered:#x}")
    alien = next(bit for bit in range(64) if not offered >> bit & 1)
    await bench.reset()
    try:
        accepted = await bench.try_features(least | 1 << alien)
    except Failed:
        accepted = False  # an error reply is a refusal, too
    expect(not accepted, f"FEATURES_OK stays although bit {alien}, which is not offered, was accepted")


@check("virtio14/FB3", section="Feature Bits", keyword=SHOULD, observe="negotiate the same set three times")
async def fb3(bench: Bench) -> None:
    """A set of features that was negotiated once can be negotiated again after a reset."""
    for time in ("first", "second", "third"):
        await bench.reset()
        features = bench.offered if time != "second" else bench.minimum
        again = await bench.read_offered()
        note(again == bench.offered, f"{bench.offered:#x} was offered before the reset, {again:#x} after it")
        accepted = await bench.try_features(features)
        note(accepted, f"features {features:#x} are refused the {time} time")
        if accepted:
            await bench.set("device_status", DRIVER_OK)


@check("virtio14/RB1", section="Reserved Feature Bits", observe="bit 32 of the offered features")
async def rb1(bench: Bench) -> None:
    """The device offers VERSION_1."""
    expect(bool(bench.offered & Feature.VERSION_1.mask), f"offered are {bench.offered:#x}, without bit 32")


@check(
    "virtio14/RB1-accept",
    section="Reserved Feature Bits",
    keyword=ADVICE,  # 6.2: "A device MAY fail to operate further if VIRTIO_F_VERSION_1 is not accepted."
    observe="FEATURES_OK after all offered features but bit 32 were accepted",
)
async def rb1_accept(bench: Bench) -> None:
    """A device that only knows virtio 1 does not go on with a driver that has not accepted VERSION_1."""
    if bench.info.device in TRANSITIONAL:
        raise NotApplicable("a transitional device serves legacy drivers, too")
    accepted = await bench.try_features(bench.offered & ~Feature.VERSION_1.mask)
    note(not accepted, "FEATURES_OK stays although VERSION_1 was not accepted")


@check(
    "virtio14/RB2",
    section="Reserved Feature Bits",
    observe="make eight buffers available at once, compare the order of the used ring",
    needs=(EXERCISE, offers(Feature.IN_ORDER)),
)
async def rb2(bench: Bench) -> None:
    """With IN_ORDER buffers are used in the order in which they were made available."""
    ring = await bench.start(Feature.IN_ORDER)
    heads: list[int] = []
    first = 0
    while len(heads) < 8:
        placed = bench.request()
        if first + len(placed.segments) > ring.size:
            break
        heads.append(bench.chain(ring, placed, first))
        first += len(placed.segments)
    ring.offer(*heads)
    await bench.kick()
    await bench.wait_used(ring, len(heads))
    # A batch may be shown as its last buffer alone (2.7.9): then the other elements are not written.
    seen = [ring.used_element(index)[0] for index in range(len(heads))]
    written = [head for head in seen if head in heads]
    expect(written == sorted(written) and written[-1:] == heads[-1:], f"made available {heads}, used {seen}")


@check(
    "virtio14/RB3",
    section="Reserved Feature Bits",
    observe="the extended capabilities of config space",
    needs=(offers(Feature.SR_IOV),),
)
async def rb3(bench: Bench) -> None:
    """SR_IOV is only offered by a function that has the SR-IOV capability."""
    expect((await bench.client.region_info(7)).size > _EXTENDED_CONFIG, "SR_IOV without extended config space")
    at, seen = _EXTENDED_CONFIG, set[int]()
    while at and at not in seen:
        seen.add(at)
        header = await bench.client.config_read(at, 4)
        if header & 0xFFFF == _EXT_CAP_SRIOV:
            return
        at = header >> 20
    expect(False, "SR_IOV is offered, but there is no SR-IOV capability")


@check(
    "virtio14/RQ1",
    section="Device Operation",
    observe="one request as Linux's driver cuts it: what is written, and used.len",
    needs=(EXERCISE,),
)
async def rq1(bench: Bench) -> None:
    """A harmless request is answered as the device type demands; what needs one is not run where that fails."""
    try:
        await bench.serve(await bench.start())
    except ExerciseFailed as error:
        fail(str(error))


@check(
    "virtio14/RS1",
    section="Device Reset",
    observe="write 0 while a queue is live and a buffer is under way, poll until it reads 0",
    needs=(EXERCISE,),
)
async def rs1(bench: Bench) -> None:
    """A reset sets device_status to 0, whatever the device is doing."""
    ring = await bench.start()
    ring.offer(bench.chain(ring, bench.request()))
    await bench.kick()
    await bench.reset()
    for name in ("device_status", "queue_enable"):
        await bench.select(bench.queue)
        seen = await bench.get(name)
        note(seen == 0, f"{name} is {seen:#x} after the reset")


@check(
    "virtio14/RS2",
    section="Device Reset",
    observe="reset, make a buffer available in the old ring, notify; watch used.idx, the buffer and ISR status",
    needs=(EXERCISE,),
)
async def rs2(bench: Bench) -> None:
    """After the reset, and before it is initialised again, a device touches no queue and sends no notification."""
    ring = await bench.start()
    await bench.serve(ring)
    await bench.reset()
    await bench.isr()
    placed = bench.request()
    before = bytes(placed.writable)
    ring.offer(bench.chain(ring, placed))
    await bench.kick()
    await bench.quiet()
    note(ring.used_idx == 1, f"used.idx became {ring.used_idx:#x} after the reset")
    note(bytes(placed.writable) == before, "a buffer was written after the reset")
    seen = await bench.isr()
    note(seen == 0, f"ISR status is {seen:#x} after the reset")


@check(
    "virtio14/CF1",
    section="Device Configuration Space",
    observe="read it after the reset, with ACKNOWLEDGE and DRIVER, and after DRIVER_OK with all features",
    needs=(CONFIG,),
)
async def cf1(bench: Bench) -> None:
    """Configuration fields of offered features can be read before FEATURES_OK."""
    known = known_type(bench.device_type)
    size = known.config.sizeof() if known is not None and known.config is not None else 64
    fresh = await bench.config(size)
    await bench.set("device_status", int(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER))
    early = await bench.config(size)
    await bench.reset()
    if await bench.try_features(bench.offered):
        late = await bench.config(size)
        for when, data in (("after the reset", fresh), ("with DRIVER", early)):
            note(data == late, f"{when} it is {data.hex(' ')}, after FEATURES_OK {late.hex(' ')}")


@check(
    "virtio14/DC1",
    section="Device-specific configuration",
    observe="the capabilities of type DEVICE_CFG",
)
async def dc1(bench: Bench) -> None:
    """A device type that has configuration shows it, at an offset that is a multiple of 4."""
    known = known_type(bench.device_type)
    structure = bench.layout.device
    if structure is not None:
        expect(not structure.offset % 4, f"{structure}: the offset is no multiple of 4")
    elif known is not None and known.config is not None:
        expect(False, f"a {known.name} device has configuration, but no {CfgType.DEVICE.name} structure")
