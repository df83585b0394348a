"""Text form of a `Survey`, with config space in the format of ``lspci -x``, which ``lspci -F`` reads."""

from collections.abc import Iterator

from vfiouser_virtio.device_log import printable
from vfiouser_virtio.guest.pci import BarInfo
from vfiouser_virtio.protocols.virtio.device_types import known_type
from vfiouser_virtio.protocols.virtio.features import is_device_type_bit
from vfiouser_virtio.testing.survey import Survey, VirtioInfo

_LINE = 16  # bytes
_STATUS = (
    (1, "ACKNOWLEDGE"),
    (2, "DRIVER"),
    (8, "FEATURES_OK"),
    (4, "DRIVER_OK"),
    (64, "NEEDS_RESET"),
    (128, "FAILED"),
)


def as_text(survey: Survey) -> str:
    """Everything, with what is wrong marked by ``!``."""
    return "\n".join(map(printable, _lines(survey))) + "\n"  # a server chooses the names of its capabilities


def as_lspci(survey: Survey) -> str:
    """Config space as ``lspci -x`` (256 bytes) or ``lspci -xxxx`` prints it, of a function at 00:00.0."""
    rows = [
        f"{at:02x}: {survey.config_space[at : at + _LINE].hex(' ')}" for at in range(0, len(survey.config_space), _LINE)
    ]
    return "\n".join([f"00:00.0 {survey.server}", *rows]) + "\n\n"


def _lines(survey: Survey) -> Iterator[str]:
    yield survey.server
    if (version := survey.version) is not None:
        limits = ", ".join(f"{name} {value}" for name, value in sorted(version.capabilities.items()))
        yield f"vfio-user {version.major}.{version.minor}: {limits or 'no capabilities'}"
    yield f"device: {' '.join(survey.flags) or 'no flags'}"
    for region in survey.regions:
        if region.problem:
            yield f"  region {region.index} {region.name}: {region.problem}"
        elif region.size:
            extra = " ".join([*region.flags, *region.capabilities])
            yield f"  region {region.index} {region.name}: {_size_text(region.size)} {extra}"
    for irq in survey.irqs:
        if irq.problem:
            yield f"  irq {irq.index} {irq.name}: {irq.problem}"
        elif irq.count:
            yield f"  irq {irq.index} {irq.name}: {irq.count} {' '.join(irq.flags)}"
    yield from _function_lines(survey)
    if survey.virtio is not None:
        yield from _virtio_lines(survey.virtio)
    if survey.problem:
        yield f"! {survey.problem}"


def _function_lines(survey: Survey) -> Iterator[str]:
    function, names = survey.function, survey.names
    if function is None:
        return

    def named(key: str) -> str:
        return f" ({names[key]})" if key in names else ""

    pin = f"INT{'?ABCD'[function.interrupt_pin]}" if function.interrupt_pin < 5 else "pin ?"
    yield f"PCI function {function.vendor:04x}:{function.device:04x}{named('device') or named('vendor')}"
    subsystem = f"{function.subsystem_vendor:04x}:{function.subsystem:04x}{named('subsystem_vendor')}"
    yield f"  subsystem {subsystem}"
    yield f"  class {function.class_code:06x}{named('class_code')}, revision {function.revision}"
    yield f"  interrupt pin: {pin if function.interrupt_pin else 'none'}"
    for bar in function.bars:
        yield f"  {_bar_text(bar)}"
    for capability in survey.capabilities:
        yield f"  capability {capability.offset:02x} {capability.name}: {capability.detail}".rstrip(": ")


def _virtio_lines(virtio: VirtioInfo) -> Iterator[str]:
    yield f"virtio device type {virtio.type} ({virtio.name})"
    if virtio.problem:
        yield f"! {virtio.problem}"
        return
    set_bits = " ".join(name for bit, name in _STATUS if virtio.status & bit)
    yield f"  status as found: {virtio.status:#04x} {set_bits}".rstrip()
    for feature in virtio.features:
        mine = is_device_type_bit(feature.bit) and known_type(virtio.type) is None
        unnamed = "(of a device type that is not known here)" if mine else "! not defined"
        yield f"  feature {feature.bit} {feature.name or unnamed}"
    for name, value in virtio.config.items():
        yield f"  config {name} = {value}"
    if virtio.unread:
        yield f"  config not readable: {', '.join(virtio.unread)}"
    for queue in virtio.queues:
        yield f"  queue {queue.index} {queue.name}: up to {queue.max_size} entries, notify_off {queue.notify_off}"
    if virtio.num_queues > len(virtio.queues):
        yield f"  … and {virtio.num_queues - len(virtio.queues)} more queues"


def _bar_text(bar: BarInfo) -> str:
    """``BAR4: 64-bit memory, prefetchable, 16 KiB``."""
    kind = {"io": "I/O ports", "mem32": "32-bit memory", "mem64": "64-bit memory"}[bar.kind]
    return f"BAR{bar.index}: {kind}{', prefetchable' if bar.prefetchable else ''}, {_size_text(bar.size)}"


def _size_text(size: int) -> str:
    """In the largest unit that leaves no remainder."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and not size % unit:
            return f"{size // unit} {name}"
    return f"{size} bytes"
