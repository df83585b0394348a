"""Surroundings of a server under attack: files, file systems that hang or are full, and what the host does."""

import ctypes
import os
import signal
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vfiouser_virtio.testing.fuzz.process.case import HostileStep
from vfiouser_virtio.testing.fuzz.process.lane import ATTACKERS
from vfiouser_virtio.testing.fuzz.process.memories import SMALL_DISK
from vfiouser_virtio.testing.fuzz.process.server import ServerUnderAttack
from vfiouser_virtio.testing.hanging_files import FuseOp, HangingFiles

_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Scenery:
    """Surroundings of the server, in the case's folder."""

    folder: Path
    stack: ExitStack
    """Its end takes away what was mounted."""
    hanging: HangingFiles | None = None
    complaints: list[Callable[[], str | None]] = field(default_factory=list)
    """Asked in the end: what is wrong with a file."""

    def prepare(self, steps: list[HostileStep]) -> None:
        """Make what there is before the server is started."""
        (self.folder / ATTACKERS).mkdir()
        (self.folder / ATTACKERS).chmod(0o777)
        for step in steps:
            parameters = dict(step)
            FILES[parameters.pop("do")](self, **parameters)

    def complaint(self) -> str | None:
        """The first of the complaints, if there is one."""
        return next((said for ask in self.complaints if (said := ask())), None)


def file(scene: Scenery, name: str, text: str = "", size: int = 0, mode: int = 0o600) -> None:
    path = scene.folder / name
    path.write_text(text)
    if size:
        os.truncate(path, size)
    path.chmod(mode)


def link(scene: Scenery, name: str, target: str) -> None:
    (scene.folder / name).symlink_to(target)


def fifo(scene: Scenery, name: str) -> None:
    os.mkfifo(scene.folder / name)


def nested(scene: Scenery, name: str, depth: int, opening: str, closing: str, head: str = "", tail: str = "") -> None:
    """A file with ``depth`` brackets in each other."""
    (scene.folder / name).write_text(head + opening * depth + closing * depth + tail)


def guarded(scene: Scenery, name: str, text: str) -> None:
    """A file that nothing of this is to write to."""
    path = scene.folder / name
    path.write_text(text)
    scene.complaints.append(
        lambda: None if path.read_text(errors="replace") == text else f"{name}, which is not the server's, has changed"
    )


def private(scene: Scenery, name: str, most: int) -> None:
    """A file that the server makes: for its user only, and of no more than ``most`` bytes."""

    def ask() -> str | None:
        try:
            status = os.lstat(scene.folder / name)
        except FileNotFoundError:
            return None
        if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
            return f"{name} is for other users as well: mode {status.st_mode & 0o777:o}"
        return f"{name} has {status.st_size} bytes" if status.st_size > most else None

    scene.complaints.append(ask)


def small_disk(scene: Scenery, megabytes: int) -> None:
    """A file system in memory that is soon full, in which attackers make files."""
    folder = scene.folder / ATTACKERS / SMALL_DISK
    folder.mkdir()
    if _libc.mount(b"small", os.fsencode(folder), b"tmpfs", 0, f"size={megabytes}m,mode=777".encode()):
        raise OSError(ctypes.get_errno(), "mount of a tmpfs")
    scene.stack.callback(_libc.umount2, os.fsencode(folder), _MNT_DETACH)


def hanging_files(scene: Scenery, name: str, size: int, direct: bool = True, interruptible: bool = True) -> None:
    """A file ``disk`` in a folder whose file system hangs when it is told to."""
    files = HangingFiles(scene.folder / name, {"disk": bytes(size)}, direct=direct, interruptible=interruptible)
    scene.hanging = scene.stack.enter_context(files)


FILES: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (file, link, fifo, nested, guarded, private, small_disk, hanging_files)
}
"""By the name that a step has."""


def hang(scene: Scenery, _server: ServerUnderAttack, op: str) -> None:
    assert scene.hanging is not None
    scene.hanging.hanging.add(FuseOp[op])


def kill_process(_scene: Scenery, server: ServerUnderAttack, index: int, signal_name: str = "SIGKILL") -> None:
    """The process of a device dies (``--processes``)."""
    os.kill(server.device_pid(index), signal.Signals[signal_name])


HOST: dict[str, Callable[..., None]] = {function.__name__: function for function in (hang, kill_process)}
"""What the host does, by the name that a step has; ``after`` seconds of the attack."""
