"""Rights on the host that a device still needs once it is made, so that all others can be taken from its process.

Files and sockets that are open already need nothing: only what is opened, removed or connected to later is said here.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vfiouser_virtio.connecting import StreamAddress


class HostAccess(NamedTuple):
    """Rights on the host that are needed while a device is served; without any it needs none."""

    removes: tuple[Path, ...] = ()
    """Files, which are there, to be removed in the end, by `removal.remove_file`."""
    removes_folders: tuple[Path, ...] = ()
    """Folders that are empty by then, to be removed in the end by `removal.remove_folder`."""
    reads: tuple[Path, ...] = ()
    """Files to be opened for reading, or folders of such files."""
    writes: tuple[Path, ...] = ()
    """Files, which are there, to be opened for writing; or folders of such files."""
    connects: "tuple[StreamAddress, ...]" = ()
    """Addresses to which stream sockets are connected, by `connecting.connect_stream`: UNIX, or TCP."""
    terminal: bool = False
    """Modes of terminals are set."""
    loads_code: bool = False
    """Modules in C and libraries that are not loaded yet are loaded later, or ctypes makes callbacks: any file that may
    be read, or that the process can write and has open, can be mapped as machine code."""

    def without_helpers(self) -> "HostAccess":
        """The same without the rights that other processes make use of: to remove anything, and to connect."""
        return self._replace(removes=(), removes_folders=(), connects=())

    def __or__(self, other: "HostAccess") -> "HostAccess":
        return HostAccess(
            removes=self.removes + other.removes,
            removes_folders=self.removes_folders + other.removes_folders,
            reads=self.reads + other.reads,
            writes=self.writes + other.writes,
            connects=self.connects + other.connects,
            terminal=self.terminal or other.terminal,
            loads_code=self.loads_code or other.loads_code,
        )


NO_ACCESS = HostAccess()


@runtime_checkable
class Confinable(Protocol):
    """Part of a device that has something to do, or to ask for, before its process gives up its rights."""

    def confine(self) -> HostAccess:
        """Do what takes those rights, such as starting a program, and say which are needed from then on.

        Called once the device is made, before it is served, in a thread. Raises DeviceError where that cannot be.
        """
        ...


def confine_all(parts: Iterable[object]) -> HostAccess:
    """`Confinable.confine` of those that have it; what they need together."""
    access = NO_ACCESS
    for part in parts:
        if isinstance(part, Confinable):
            access |= part.confine()
    return access
