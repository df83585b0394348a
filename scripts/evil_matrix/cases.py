"""Cases of the matrix: which fault, how often, on which device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evil_matrix.exercises import EXERCISES
from vfiouser_virtio.faults import parse_fault

SUITES = ("trixie", "trixie-backports")
"""Debian's suites that the kernels are from: Linux 6.12 and 7.3."""


@dataclass(frozen=True, slots=True)
class EvilCase:
    """Fault, or several, of a device that a guest exercises."""

    device: str
    """Its type: see `exercises`."""
    faults: tuple[str, ...]
    """As `parse_fault` takes them; the first is what the case is about. None: an honest device."""
    options: str = ""
    """More options of the device: ``packed=on``."""
    never: str = ""
    """Why the fault does not happen with Linux, if so."""

    @property
    def id(self) -> str:
        """What tells it from others."""
        return " ".join([self.device, *self.faults, *([self.options] if self.options else [])])

    @property
    def fault(self) -> str:
        """Name of the fault that it is about; empty for an honest device."""
        return parse_fault(self.faults[0]).name if self.faults else ""


_HONEST = ("blk", "blk packed=on", "rng", "console", "net", "balloon", "input")

# Once is in the middle of a long read (the disk has been found, and its partition table read), so that what comes after
# the fault is seen too. "queue=0" where others of the device's queues would be hit as well.
_BLK = """
used-id-out-of-range:at=20
used-id-not-in-flight:at=20
used-id-of-another:after=10:count=1 disk-slow:every=2:time=50ms
used-twice:at=20
used-never:at=20
used-len-long
used-len-short
used-late:every=5
used-out-of-order:every=3
used-storm:size=4
used-rewritten:at=20
used-idx-jump:at=20
used-idx-jump:at=20:by=-1
used-idx-early:at=20
used-flags-set
packed-wrap-flipped:at=20 packed=on
packed-gap:at=20 packed=on
used-id-out-of-range:at=20 packed=on
used-twice:at=20 packed=on
used-rewritten:at=20 packed=on
notify-not-asked:after=5
interrupt-lost:at=8
interrupt-late:every=5
interrupt-storm:every=10
interrupt-wrong-vector:at=8
interrupt-unwanted
interrupt-spurious
interrupt-early
config-interrupt-spurious
config-value:field=capacity
config-value:field=capacity:value=0x7fffffffffffffff
config-value:field=blk_size
config-value:field=blk_size:value=3
config-value:field=seg_max
config-changes
generation-moves
generation-stuck
num-queues
num-queues:value=0
queue-size
queue-size:value=3
queue-size:value=32768
queue-notify-off
vector-refused
features-flap
features-extra
features-missing
features-refused
reset-stuck
reset-stuck:time=1s
needs-reset:at=8
capability-loop
capability-outside
capability-overlap
capability-missing
registers-all-ones
registers-all-ones:after=5
registers-all-ones:after=60
registers-all-ones:after=250
registers-all-ones:after=250:time=1s
register-read-late:after=60:every=10
register-read-late:at=150:time=6s
register-write-late:after=20:every=10
io-error:at=20
io-error:sector=4608
read-short:at=8
read-flipped:at=8
write-torn:at=5
write-dropped
write-dropped flush-ignored
flush-ignored write-dropped
disk-slow:every=10:time=200ms
used-idx-stuck:at=20
used-after-reset
desc-rewritten:at=20
packed-event-reserved packed=on
event-far:after=5
notify-lost:at=20
data-zeros:at=20
data-random:at=20
readable-overwritten:at=20
config-all-ones
register-write-lost:register=queue_enable
register-write-lost:register=device_status
isr-value vectors=0
isr-stuck vectors=0
intx-stuck vectors=0
intx-spurious vectors=0
suspend-stuck suspend=on  # Linux does not use SUSPEND
suspend-refused suspend=on  # Linux does not use SUSPEND
"""

# Drivers that use what a disk's does not: the used length, the configuration's changes, other queues.
_OTHERS = """
rng used-len-long
rng used-len-long:len=0xffffffff
rng used-len-short
rng used-id-out-of-range:at=20
rng used-twice:at=20
rng used-never:at=20
rng used-rewritten
rng interrupt-lost:at=20
rng needs-reset:at=20
rng num-queues:value=0
rng reset-stuck
console used-len-long
console used-len-long:len=0xffffffff
console used-len-short
console used-id-out-of-range:queue=0:at=5
console used-twice:queue=0:at=5
console used-never:queue=1:at=2
console used-never:queue=2:at=1
console used-rewritten
console interrupt-lost:queue=0:at=1
console config-value:field=max_nr_ports
console config-value:field=max_nr_ports:value=0xffffffff
console config-interrupt-spurious
console needs-reset:queue=1:at=2
net used-len-long:queue=0
net used-len-long:queue=0:len=0xffffffff
net used-len-short:queue=0:every=5
net used-id-out-of-range:queue=0:at=20
net used-id-out-of-range:queue=1:at=20
net used-twice:queue=0:at=20
net used-twice:queue=1:at=20
net used-never:queue=0:at=20
net used-never:queue=1
net used-never:queue=2
net used-len-long:queue=2
net used-rewritten:queue=0
net interrupt-lost:queue=0:at=20
net config-value:field=status
net config-changes
net config-interrupt-spurious
net needs-reset:at=20
net registers-all-ones:after=250
balloon used-len-long
balloon used-id-out-of-range:queue=0:at=2
balloon used-never:queue=0:at=2
balloon used-twice:queue=0:at=2
balloon config-interrupt-lost
balloon config-value:field=num_pages:value=0xffffffff
balloon config-changes
input used-len-long
input used-id-out-of-range:queue=0:at=20
input used-twice:queue=0:at=20
input used-never:queue=0:at=20
input used-rewritten:queue=0
input interrupt-lost:queue=0:at=20
input config-value:field=size:value=255
input config-value:field=size
net queue-reset-stuck
net used-after-reset
net data-random:queue=0:every=5
net data-zeros:queue=0:every=5
net config-all-ones
net net-num-buffers:every=5
net net-num-buffers:every=5:value=65535
net net-gso:every=5
net net-csum:every=5
net net-flags:every=5
net net-hash:every=5 hash=on
net net-frame-short:every=5
net net-frame-short:every=5:len=-1
net net-frame-long:every=5
net net-ack
net net-ack:value=255
net net-link-flap:every=5
net net-announce
console console-port-add
console console-port-add:id=1000000
console console-port-remove:after=3:count=1
console console-message
console console-message:id=1000000
console console-message-short
console console-message-long
console console-resize
console console-name
console data-random:queue=2
input input-event
input input-no-syn
input input-absinfo kind=tablet
input data-random:queue=0:every=5
rng data-zeros
input config-write-lost
balloon config-write-lost
"""


def parse_case(text: str) -> EvilCase:
    """The case of `EvilCase.id`. Raises ValueError where its first word is no device type."""
    device, *words = text.split()
    if device not in EXERCISES:
        raise ValueError(f"{device}: no device type that is exercised; there are {', '.join(EXERCISES)}")
    faults = tuple(word for word in words if "=" not in word.partition(":")[0])
    return EvilCase(device, faults, ",".join(word for word in words if word not in faults))


def _cases() -> Iterator[EvilCase]:
    for text in (*_HONEST, *(f"blk {line}" for line in _BLK.split("\n") if line), *_OTHERS.strip().split("\n")):
        text, _, never = text.partition("  # ")
        yield replace(parse_case(text), never=never)


CASES = tuple(_cases())
"""All, honest devices first: what they cannot do, says nothing about faults."""
