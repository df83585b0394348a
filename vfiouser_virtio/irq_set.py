"""Validation of "VFIO_USER_DEVICE_SET_IRQS" for any device: an engine checks it, a device relies on that."""

from collections.abc import Sequence

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.eventfds import is_eventfd
from vfiouser_virtio.vfio_device import Buffer, IrqSetFlags

_DATA = (IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD)
_ACTIONS = (IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, IrqSetFlags.ACTION_TRIGGER)
_ALLOWED = frozenset(data | action for data in _DATA for action in _ACTIONS)
_DISABLE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER


def check_irq_set(
    available: int, index: int, flags: int, start: int, count: int, data: Buffer, fds: Sequence[int]
) -> None:
    """Raise PeerError (EINVAL) for what no device has to take; ``available`` is the number of interrupts of ``index``.

    One DATA and one ACTION bit; interrupts that exist, none only to disable the index; a byte of ``data`` for each with
    DATA_BOOL; with DATA_EVENTFD an eventfd for each, or none at all.
    """
    what = f"DEVICE_SET_IRQS index {index:#x} flags {flags:#x} start {start:#x} count {count:#x}"
    if flags not in _ALLOWED:
        raise PeerError(f"{what}: needs exactly one DATA and one ACTION bit")
    if count == 0 and (flags != _DISABLE or start):
        raise PeerError(f"{what}: no interrupt at all, which only flags {int(_DISABLE):#x} from 0 may have")
    if start < 0 or count < 0 or start + count > available:
        raise PeerError(f"{what}: the index has {available:#x} interrupts")
    if flags & IrqSetFlags.DATA_BOOL and len(data) < count:
        raise PeerError(f"{what}: {len(data):#x} bytes of data")
    if fds and (not flags & IrqSetFlags.DATA_EVENTFD or len(fds) != count):
        raise PeerError(f"{what}: came with {len(fds):#x} file descriptors")
    if not all(map(is_eventfd, fds)):  # a write to anything else could block
        raise PeerError(f"{what}: a file descriptor is not an eventfd")
