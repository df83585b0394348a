"""Errors of the driver side: the device is at fault, or gone, or its queue is full.

::

    Exception
    ├── DeviceBroken        the device broke virtio or PCI, or says NEEDS_RESET: .rule names the rule
    │   └── FeaturesRefused it would not set FEATURES_OK
    ├── DeviceGone          it was reset or removed while somebody waited for it
    └── QueueFull           no descriptors are free: take used buffers back first
"""


class DeviceBroken(Exception):
    """The device did what virtio or PCI forbids, or has given up; only a reset helps.

    ``rule`` names what it broke: a row of docs/conformance.md (``UR2``) or a section (``2.7.8``); it is empty where the
    device just says NEEDS_RESET.
    """

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(f"{message} [{rule}]" if rule else message)
        self.rule = rule


class FeaturesRefused(DeviceBroken):
    """The device did not accept what the driver wants of its features: FEATURES_OK did not stick (3.1.1)."""


class DeviceGone(Exception):
    """The device was reset, or removed from its bus; what was under way has no answer."""


class QueueFull(Exception):
    """`add_buf` needs more descriptors than are free now."""
