"""Exceptions of the package, one per party at fault.

::

    Exception
    ├── PeerError       the vfio-user client broke the protocol     -> an error reply with .errno, or end of connection
    │   └── ClientGone  it left in the middle of something          -> no fault: wait for the next one
    ├── GuestError      the guest's driver broke virtio or PCI      -> DEVICE_NEEDS_RESET, logged once
    │   └── Unmapped    it named an address that is not its memory
    ├── AuthorError     a device's own code broke our rules        -> DEVICE_NEEDS_RESET, logged with the author's line
    └── ConfigError     the user asked for what cannot be           -> one line on stderr and a non-zero exit
        └── DeviceError a device cannot start with what it was given   -> likewise, another exit status

Whatever else is raised is a bug, of ours or of the author of a device, and is logged with its traceback.
Every message names the command, queue or option, the offending value in hex, and what was expected.
"""

import errno as _errno


class PeerError(Exception):
    """Error of the vfio-user client: it sent something that the specification does not allow.

    ``errno`` goes into the error reply. ``fatal`` says that the stream itself can no longer be trusted, so that the
    connection must be closed.
    """

    def __init__(self, message: str, errno: int = _errno.EINVAL, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.errno = errno
        self.fatal = fatal


class ClientGone(PeerError):
    """Departure of the vfio-user client: what was asked of it will not be answered."""

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.ENOTCONN)


class GuestError(Exception):
    """Error of the guest's driver: it did what virtio or PCI forbids. Its device needs a reset, no other is touched."""


class Unmapped(GuestError):
    """Guest address range that is not, or no longer, memory which the device may use in this way."""


class AuthorError(RuntimeError):
    """Error of a device's author: its code broke the rules of `vfiouser_virtio.virtio`.

    More written than a buffer has room for, a chain completed twice, a class that cannot be a device.
    """


class ConfigError(Exception):
    """Error of the user: an option, a file, a program. Shown as one line, never as a traceback."""


class DeviceError(ConfigError):
    """Error in what a device is made from: no such file, a size that is no multiple of a sector, …"""
