"""``--sandbox``: a process that has opened its devices gives up all rights that serving them does not take.

::

    devices made, sockets bound ─▶ programs started (passt) ─▶ one thread
      ─▶ processes forked that will remove its sockets and connect again ─▶ no new privileges
      ─▶ Landlock: files, TCP, signals ─▶ another user (--run-as), no capabilities ─▶ seccomp: system calls
      ─▶ clients are served

A guest that takes over the process through a fault of ours, of Python or of a library then has the device's own files,
the sockets that are open, and nothing else of the host. A call that is not allowed fails with EPERM; it does not kill
the process, as Firecracker's filter does: it is refused either way, and here an author's mistake is a traceback with
its line, and one device that needs a reset, instead of all QEMUs of the process that abort without a word.
"""

import ctypes
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from vfiouser_virtio.connecting import end_connectors
from vfiouser_virtio.engines import Engine, Socket, VfioUserEngine
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess, confine_all
from vfiouser_virtio.libc import libc
from vfiouser_virtio.protocols.seccomp import PR_GET_SECCOMP, Arch
from vfiouser_virtio.protocols.system_calls import NR_SECCOMP
from vfiouser_virtio.removal import end_remover
from vfiouser_virtio.serving.own_thread import in_own_thread
from vfiouser_virtio.serving.privileges import (
    OtherUser,
    allow_no_new_privileges,
    bound_capabilities,
    drop_capabilities,
    hide_memory,
    leave_terminal,
    refuse_new_code,
)
from vfiouser_virtio.serving.sandbox_calls import allowed_calls
from vfiouser_virtio.serving.sandbox_connector import start_connector
from vfiouser_virtio.serving.sandbox_files import landlock_abi, restrict_files
from vfiouser_virtio.serving.sandbox_filter import assemble, install_filter
from vfiouser_virtio.serving.sandbox_remover import start_remover
from vfiouser_virtio.serving.terminal import rest_writers
from vfiouser_virtio.virtio.author_line import author_line
from vfiouser_virtio.watchdog import without_watchdog

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyDevice

logger = logging.getLogger(__name__)

SandboxMode = Literal["strict", "best-effort"]
"""What to do where the kernel has no Landlock or no seccomp: refuse to serve, or do with what there is."""
MODES: tuple[SandboxMode, ...] = get_args(SandboxMode)

# Seconds that threads which were told to end may take for it.
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Sandbox for the devices of a process, as `serving.serve` takes it; ``access`` is for what is not a device's."""

    mode: SandboxMode | None = "strict"
    """None: there is none but for the ``user``."""
    access: HostAccess = NO_ACCESS
    user: OtherUser | None = None
    """Which the process becomes, being root, before it enters the sandbox."""

    def with_access(self, access: HostAccess) -> "Sandbox":
        """The same with more rights."""
        return replace(self, access=self.access | access)

    def check(self, engine: Engine) -> None:
        """Raise ConfigError where the sandbox cannot be, before anything is made."""
        if not isinstance(engine, VfioUserEngine):
            raise ConfigError(
                "--sandbox: not with libvfio-user, whose system calls are not known; use --engine vfio-user"
                if self.mode is not None
                else "--run-as: not with libvfio-user, which makes its socket itself; use --engine vfio-user"
            )
        if self.user is not None:
            self.user.check()
        if self.mode is None:
            return
        check_kernel(self.mode)

    def own(self, sockets: Iterable[Socket], folders: Iterable[Path]) -> None:
        """Give the `user`, if there is one, what was made for clients: sockets with their locks, and folders."""
        if self.user is not None:
            self.user.own([*confine_all(sockets).removes, *folders])

    async def enter(self, devices: "Iterable[AnyDevice]", sockets: Iterable[Socket] = ()) -> None:
        """Give up all rights of this process but those that devices, which are made, and their sockets need.

        To be called once, by the task that makes the devices, before they are served. Raises as `enter_sandbox`, and
        DeviceError where a device cannot do with less.
        """
        asked = list(devices)
        if self.mode is None:
            if self.user is not None:
                self.user.become()
            return
        access = self.access | await in_own_thread(lambda: confine_devices(asked)) | confine_all(sockets)
        rest_writers()
        with without_watchdog():
            enter_sandbox(self.mode, access, self.user)

    def end(self) -> None:
        """End the processes beside this one, if it has entered: nothing is removed any more, and nothing connected."""
        end_connectors()
        end_remover()


def confine_devices(devices: "Iterable[AnyDevice]") -> HostAccess:
    """What they need together: `Device.confine`. Raises DeviceError."""
    access = NO_ACCESS
    for device in devices:
        try:
            access |= device.confine()
        except ConfigError as error:
            raise DeviceError(f"{device.log.device}: --sandbox: {error}") from error
        except Exception as error:
            where = author_line(error)
            what = f"confine() raised {type(error).__name__}: {error}"
            raise DeviceError(f"{device.log.device}: a bug in the device: {where and f'{where}: '}{what}") from error
    return access


def missing_in_kernel() -> str:
    """What this machine lacks for a whole sandbox; empty where it has everything."""
    lacks = []
    abi = landlock_abi()
    if not abi:
        lacks.append(
            "Landlock (Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and landlock in lsm=): files, and by /proc other "
            "processes of the same user, stay open to it"
        )
    elif abi < 3:
        lacks.append("rule of Landlock about O_TRUNC (Linux 6.2): what may be read may be emptied")
    elif abi < 6:
        lacks.append("rules of Landlock about signals and abstract UNIX sockets (Linux 6.12)")
    if sys.maxsize < 1 << 32:
        lacks.append("Python of 64 bits, whose system calls are known")
    elif platform.machine() not in NR_SECCOMP:
        lacks.append(f"a table of the system calls of {platform.machine()}")
    elif libc.prctl(ctypes.c_int(PR_GET_SECCOMP), 0, 0, 0, 0) < 0:
        lacks.append("seccomp (CONFIG_SECCOMP_FILTER)")
    return " and ".join(lacks)


def check_kernel(mode: SandboxMode) -> None:
    """Raise ConfigError where the sandbox cannot be whole, unless ``mode`` is best-effort, which logs it."""
    lacks = missing_in_kernel()
    if lacks and mode == "strict":
        raise ConfigError(f"--sandbox: this machine has no {lacks}; --sandbox=best-effort does with what there is")
    if lacks:
        logger.warning("the sandbox is not whole: this machine has no %s", lacks)


def enter_sandbox(mode: SandboxMode, access: HostAccess, user: OtherUser | None = None) -> None:
    """Give up, in this process and for good, all rights but ``access``, and those on what is open already.

    What it names to be removed is removed by another process (`sandbox_remover`), and connections to what it names come
    from others (`sandbox_connector`), until `Sandbox.end`.
    The process must have no other thread: capabilities and Landlock are a thread's own, and what starts later has
    what starts it had. Waits for threads that are about to end. Raises ConfigError as `check_kernel`, where another
    thread stays, for files of ``access`` that are not there, and where the kernel refuses.
    """
    check_kernel(mode)
    _wait_alone()
    try:
        # glibc loads it when a thread is ended by pthread_exit(), and aborts the process where it cannot.
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        pass  # musl has none
    give_up = partial(give_up_rights, mode, user=user)
    try:
        if access.removes or access.removes_folders:
            start_remover(access, give_up)
        for address in dict.fromkeys(access.connects):
            start_connector(address, give_up)
    except OSError as error:
        _not_whole(mode, "processes beside it", error)
    give_up(access.without_helpers())


def give_up_rights(mode: SandboxMode, access: HostAccess, *, user: OtherUser | None = None) -> None:
    """Last part of `enter_sandbox`, and all of it for the processes beside, which use what ``access`` names."""
    steps: list[tuple[str, Callable[[], object]]] = [
        ("standard input and output", leave_terminal),
        ("no_new_privs", allow_no_new_privileges),
        ("executable memory", refuse_new_code),
        ("Landlock", lambda: _restrict_files(access)),  # its files may be root's, as Python's own
        ("bounding set", bound_capabilities),
        ("another user", user.become if user is not None else lambda: None),
        ("capabilities", drop_capabilities),
        ("core dumps", hide_memory),
        ("seccomp", lambda: _filter_calls(access)),
    ]
    for step, give_up in steps:
        try:
            give_up()
        except OSError as error:
            _not_whole(mode, step, error)


def _not_whole(mode: SandboxMode, what: str, error: OSError) -> None:
    if mode == "strict":
        raise ConfigError(f"--sandbox: {what}: {error.strerror}") from error
    logger.warning("the sandbox is not whole: %s: %s", what, error.strerror)


def _restrict_files(access: HostAccess) -> None:
    if abi := landlock_abi():
        restrict_files(abi, access)


def _filter_calls(access: HostAccess) -> None:
    machine = platform.machine()
    if machine in NR_SECCOMP and sys.maxsize > 1 << 32:  # else its numbers are those of another table
        install_filter(assemble(Arch[machine], allowed_calls(machine, access)))


def _wait_alone() -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while (count := len(os.listdir("/proc/self/task"))) > 1:
        if time.monotonic() > deadline:
            names = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
            raise ConfigError(
                f"--sandbox: {count - 1} other threads run in this process already "
                f"({', '.join(names) or 'of a library'}), and would keep their rights; a device may start them in "
                "run(), or --sandbox=off"
            )
        time.sleep(0.001)
