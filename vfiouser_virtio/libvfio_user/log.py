"""Log of libvfio-user in the log of the package: its errors are mistakes of the client, which can repeat them."""

import logging
import re

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.libvfio_user.bindings import Context, LogLevel

_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
# What a driver that has not set up its interrupts yet causes by the thousand; the vector stays pending.
_EXPECTED = ("no fd for interrupt",)


def forward_log(context: Context, log: DeviceLog) -> None:
    """Log the context's warnings and errors, each kind once, and all that it says where DEBUG is wanted."""
    verbose = log.isEnabledFor(logging.DEBUG)

    def forward(level: int, text: str) -> None:
        if level > LogLevel.WARNING or text.startswith(_EXPECTED):
            log.debug("libvfio-user: %s", text)
        else:
            log.once(("libvfio-user", _NUMBERS.sub("#", text)), "libvfio-user: %s", text)

    context.setup_log(forward, LogLevel.DEBUG if verbose else LogLevel.WARNING)
