"""SET_IRQS of a PCI device ("VFIO_USER_DEVICE_SET_IRQS"); what its text leaves open is as in Linux' vfio-pci."""

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from vfiouser_virtio import eventfds
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.pci.intx import Intx
from vfiouser_virtio.vfio_device import Buffer, IrqSetFlags, PciIrq


class IrqIndex(Protocol):
    """Base of `Msix`, `Msi` and `Intx`: numbered interrupts, each with an eventfd or without."""

    count: int

    def assign(self, start: int, fds: Sequence[int]) -> None: ...
    def deassign(self, start: int, count: int) -> None: ...
    def disable(self) -> None: ...
    def trigger(self, vectors: Iterable[int]) -> None: ...


def set_irqs(
    irqs: Mapping[int, IrqIndex],
    index: int,
    flags: IrqSetFlags,
    start: int,
    count: int,
    data: Buffer,
    fds: Sequence[int],
) -> None:
    """Apply one SET_IRQS to the interrupts of ``index``, of which there are none when it is not in ``irqs``.

    Every message stands for itself: a client with many vectors sends them in chunks. Its form has been checked
    (`irq_set.check_irq_set`). Raises PeerError (ENOTTY for an action that the index does not have) with all ``fds``
    closed, before anything changes.
    """
    target = irqs.get(index)
    try:
        _check(index, flags, fds)
    except PeerError:
        close_all(fds)
        raise
    if target is None:
        return
    if flags & IrqSetFlags.ACTION_TRIGGER:
        if flags & IrqSetFlags.DATA_EVENTFD:
            if fds:
                target.assign(start, fds)
            else:
                target.deassign(start, count)
        elif flags & IrqSetFlags.DATA_NONE and count == 0:
            target.disable()
        else:
            target.trigger(_chosen(flags, start, count, data))
    else:
        assert isinstance(target, Intx)
        if flags & IrqSetFlags.DATA_EVENTFD:
            if count:
                target.set_resample_fd(fds[0] if fds else None)
        elif _chosen(flags, start, count, data):
            if flags & IrqSetFlags.ACTION_MASK:
                target.mask()
            else:
                target.unmask()


def _check(index: int, flags: IrqSetFlags, fds: Sequence[int]) -> None:
    what = f"SET_IRQS index {index:#x} flags {flags:#x}"
    if not flags & IrqSetFlags.ACTION_TRIGGER:
        if index != PciIrq.INTX:
            raise PeerError(
                f"{what}: only INTx can be masked here; MSI-X and MSI are masked in their registers", errno.ENOTTY
            )
        if flags & IrqSetFlags.ACTION_MASK and flags & IrqSetFlags.DATA_EVENTFD:
            raise PeerError(f"{what}: masking through an eventfd is not supported, as in Linux", errno.ENOTTY)
        if flags & IrqSetFlags.DATA_EVENTFD and fds and not eventfds.CAN_TAKE:
            # Not known to be safe before Linux 5.8. QEMU then goes on with SET_IRQS.
            raise PeerError(f"{what}: this kernel cannot read an eventfd without waiting", errno.ENOTTY)


def _chosen(flags: IrqSetFlags, start: int, count: int, data: Buffer) -> list[int]:
    if flags & IrqSetFlags.DATA_BOOL:
        return [start + n for n in range(count) if data[n]]
    return list(range(start, start + count))
