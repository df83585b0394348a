"""Reasons for which a virtqueue is stopped, one bit each: it goes on when the last of them is gone."""

from enum import Flag, auto


class Stop(Flag):
    """Reasons, any number of them at once. While there is one, a device gets no buffer.

    With any but `DRAINING`, `REPLACING` and `THROTTLED` the ring is not touched either: not looked at, nor shown what
    was used.
    """

    NOT_DRIVER_OK = auto()
    """The driver has not set DRIVER_OK, or has reset the device (virtio 1.4, 3.1)."""
    NEEDS_RESET = auto()
    """The device has set DEVICE_NEEDS_RESET (2.1.2)."""
    DRAINING = auto()
    """Buffers that the device has are finished first, before a suspension."""
    SUSPENDED = auto()
    """SUSPEND is set ("Device Suspend")."""
    NO_BUS_MASTER = auto()
    """The function may not reach memory: Bus Master Enable of PCI is 0."""
    QUIESCED = auto()
    """The memory map is about to change."""
    UNTIL_KICK = auto()
    """The memory map may be another driver's: nothing is touched until that driver notifies, or resets the device."""
    REPLACING = auto()
    """Another device object is about to take over: buffers that the device has are finished first."""
    THROTTLED = auto()
    """The device has had all that its limits allow for now: see `Throttle`."""
    RUN_BEFORE = auto()
    """The run that a reset has cancelled has not ended yet: one of its tasks may be about to look for a buffer."""


UNTOUCHABLE = ~(Stop.DRAINING | Stop.REPLACING | Stop.THROTTLED)
"""Those with which the ring is not touched."""
