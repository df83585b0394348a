"""Errors of the driver side: the device is at fault, or gone, or its queue is full.

::

    Exception
    ├── DeviceBroken        the device broke virtio or PCI, or says NEEDS_RESET: .rule names the rule
    │   └── FeaturesRefused it would not set FEATURES_OK
    ├── DeviceGone          it was reset or removed while a task waited for it
    └── QueueFull           no descriptors are free: take used buffers back first
"""


class DeviceBroken(Exception):
    """Error of the device: it did what virtio or PCI forbids, or has given up; only a reset helps.

    ``rule`` names what it broke: a row of docs/conformance.md (``UR2``) or a section (``2.7.8``); it is empty where the
    device just says NEEDS_RESET.
    """

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(f"{message} [{rule}]" if rule else message)
        self.rule = rule


class FeaturesRefused(DeviceBroken):
    """Features that the device did not accept: FEATURES_OK did not stay set (3.1.1)."""


class DeviceGone(Exception):
    """Reset of the device, or its removal from its bus; what was under way has no answer."""


class QueueFull(Exception):
    """Lack of descriptors: `add_buf` needs more than are free now."""
