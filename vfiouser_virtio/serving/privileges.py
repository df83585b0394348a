"""Privileges that are given up for good: those of root, capabilities(7), no_new_privs, memory that is code."""

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import signal
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libc import last_error, libc
from vfiouser_virtio.parent_death import end_with_parent

# linux/prctl.h
_PR_GET_PDEATHSIG, _PR_SET_DUMPABLE = 2, 4
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
# linux/capability.h: _LINUX_CAPABILITY_VERSION_3, with two structs of three masks: effective, permitted, inheritable.
_CAPABILITY_HEADER = struct.pack("<Ii", 0x2008_0522, 0)
_NO_CAPABILITIES = bytes(2 * 3 * 4)
_MOST_CAPABILITIES = 64
# What system calls take for "as it is".
_NO_ID = 0xFFFF_FFFF


def allow_no_new_privileges() -> None:
    """No program that is executed from now on gets more rights than this one has (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        raise last_error()


def bound_capabilities() -> None:
    """Give up, where there are some, that a program could give us capabilities: the bounding set."""
    for capability in range(_MOST_CAPABILITIES):
        # EINVAL: there are no more; EPERM: it takes CAP_SETPCAP, and so there are none to be given up.
        if _prctl(_PR_CAPBSET_DROP, capability):
            break


def drop_capabilities() -> None:
    """Give up all capabilities. Raises OSError."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if libc.capset(ctypes.c_char_p(_CAPABILITY_HEADER), ctypes.c_char_p(_NO_CAPABILITIES)):
        raise last_error()


def refuse_new_code() -> bool:
    """No memory of this process that can be written becomes executable (PR_SET_MDWE); whether the kernel can (6.3).

    A file that can be written can be mapped as code even so.
    """
    return _prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN) == 0


def hide_memory() -> None:
    """No other process of the user can trace this one, read its memory or take its descriptors; it leaves no core dump.

    Its files in /proc are root's from now on (PR_SET_DUMPABLE); that of its own threads they stay.
    """
    if _prctl(_PR_SET_DUMPABLE, 0):
        raise last_error()


def leave_terminal() -> None:
    """Nothing is read of standard input any more, nor of the terminal that standard output and error may be.

    Where a terminal is another user's, and cannot be opened again, it stays as it is. Descriptors that a device has
    made of them are the device's.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for fd in (0, 1, 2):
            try:
                kind = os.fstat(fd).st_mode
            except OSError:  # closed: nothing else is to be taken for it
                os.dup2(null, fd)
                continue
            if fd == 0 and (os.isatty(fd) or stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
                os.dup2(null, fd)
            elif os.isatty(fd):
                with contextlib.suppress(OSError):
                    written = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
                    os.dup2(written, fd)
                    os.close(written)
    finally:
        os.close(null)


def _prctl(option: int, value: int) -> int:
    result: int = libc.prctl(
        ctypes.c_int(option), ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    return result


@dataclass(frozen=True, slots=True)
class OtherUser:
    """User and group that a process of root becomes for good (``--run-as``)."""

    name: str
    """As it was asked for."""
    uid: int
    gid: int

    def check(self) -> None:
        """Raises ConfigError where this process cannot become that user."""
        if os.geteuid() != 0:
            raise ConfigError(f"--run-as {self.name}: only root can become another user; start the server as that user")

    def own(self, paths: Iterable[Path]) -> None:
        """Give sockets, files and folders to the user. Raises ConfigError where the file system does not know owners.

        The folder may be one in which somebody else has put another file there meanwhile: a second name of a file that
        is not ours to give is refused, and links are not followed.
        """
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    status = os.fstat(fd)
                    if status.st_uid != os.geteuid() or (status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)):
                        raise OSError(errno.EEXIST, "another file has taken its name")
                    os.chown(f"/proc/self/fd/{fd}", self.uid, self.gid)
                finally:
                    os.close(fd)
            except OSError as error:
                raise ConfigError(f"--run-as {self.name}: {path}: {error.strerror}") from None

    def become(self) -> None:
        """All threads of this process are the user's from now on, without supplementary groups.

        The signal that it gets when its parent has died stays as it is. Raises ConfigError where the kernel refuses.
        """
        parent = os.getppid()
        number = ctypes.c_int()
        libc.prctl(ctypes.c_int(_PR_GET_PDEATHSIG), ctypes.byref(number))
        try:
            os.setgroups([])
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
        except OSError as error:
            raise ConfigError(f"--run-as {self.name}: {error.strerror}") from None
        if number.value:
            end_with_parent(parent, signal.Signals(number.value))  # prctl(2): another user clears it


def other_user(text: str) -> OtherUser:
    """The user that ``USER[:GROUP]`` means, by names or numbers; the group is by default the user's own.

    Raises ConfigError: there is no such user or group, a number without an account has no group, or it is root.
    """
    user, colon, group = text.partition(":")
    try:
        account = pwd.getpwuid(int(user)) if _is_number(user) else pwd.getpwnam(user)
    except (KeyError, ValueError, OverflowError):
        account = None
    if account is None and not (_is_number(user) and colon):
        raise ConfigError(f"--run-as {text}: there is no user {user!r}{' to have a group' if _is_number(user) else ''}")
    uid = int(user) if account is None else account.pw_uid
    if colon:
        try:
            gid = int(group) if _is_number(group) else grp.getgrnam(group).gr_gid
        except (KeyError, ValueError):
            raise ConfigError(f"--run-as {text}: there is no group {group!r}") from None
    else:
        assert account is not None
        gid = account.pw_gid
    if not 0 < uid < _NO_ID or not 0 <= gid < _NO_ID:
        raise ConfigError(f"--run-as {text}: it has to be a user other than root, and a number below {_NO_ID:#x}")
    return OtherUser(text, uid, gid)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10
