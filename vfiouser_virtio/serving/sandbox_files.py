"""Landlock rules of a server: the few files that are still opened once its devices are made, and nothing else.

What was opened before keeps all of its rights, also ftruncate(2) and ioctl(2).
"""

import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.libc import last_error, libc
from vfiouser_virtio.protocols import landlock
from vfiouser_virtio.protocols.landlock import AccessFs, AccessNet
from vfiouser_virtio.serving.sandbox_code import READ, code

_WRITE = AccessFs.WRITE_FILE | AccessFs.TRUNCATE
_syscall = libc["syscall"]
_syscall.restype = ctypes.c_long

# A rule is about an inode. Those of /proc may be forgotten by the kernel while no process has them open.
_KEPT_OPEN: list[int] = []


def landlock_abi() -> int:
    """The ABI version of this kernel's Landlock; 0 where it has none, or where it is turned off."""
    version = _syscall(
        ctypes.c_long(landlock.NR_CREATE_RULESET),
        None,
        ctypes.c_size_t(0),
        ctypes.c_long(landlock.CREATE_RULESET_VERSION),
    )
    return max(int(version), 0)


def restrict_files(abi: int, access: HostAccess) -> None:
    """Take all other rights on files, TCP ports, abstract UNIX sockets and signals from the *calling thread*.

    no_new_privs must be set. Raises ConfigError for a file that is to be accessible and is not there, OSError where the
    kernel refuses.
    """
    files, net, scoped = landlock.known_rights(abi)
    attributes = landlock.RULESET_CODEC.pack(files, net, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _checked(
        _syscall(
            ctypes.c_long(landlock.NR_CREATE_RULESET),
            ctypes.c_char_p(attributes),
            ctypes.c_size_t(len(attributes)),
            ctypes.c_long(0),
        )
    )
    try:
        for path, rights in rules(access):
            _allow(ruleset, path, rights & files)
        ports = {where[1] for family, where in access.connects if family != socket.AF_UNIX}
        for port in ports if net else ():
            rule = landlock.NET_PORT_CODEC.pack(AccessNet.CONNECT_TCP, port)
            _add_rule(ruleset, landlock.RULE_NET_PORT, rule)
        _checked(_syscall(ctypes.c_long(landlock.NR_RESTRICT_SELF), ctypes.c_long(ruleset), ctypes.c_long(0)))
    finally:
        os.close(ruleset)


def rules(access: HostAccess) -> Iterator[tuple[Path, AccessFs]]:
    """Files and folders, and the rights on each: what ``access`` says, and what Python takes."""
    # Which file system a client's memory is on, whether a descriptor is an eventfd; and tracebacks.
    yield Path("/proc/self"), READ
    # Of another mount; it is what says so.
    yield Path(os.devnull), AccessFs.READ_FILE | AccessFs.WRITE_FILE
    for path, rights in code():
        if path.exists():  # a module may say that it is from a file that never was, or that has gone meanwhile
            yield path, rights
    for path in access.reads:
        yield path, READ
    for path in access.writes:
        yield path, _WRITE
    for path in access.removes:
        yield path.absolute().parent, AccessFs.REMOVE_FILE
    for path in access.removes_folders:
        yield path.absolute().parent, AccessFs.REMOVE_DIR


def _allow(ruleset: int, path: Path, rights: AccessFs) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"--sandbox: {path}: {error.strerror}") from None
    keep = False
    try:
        if not os.path.isdir(f"/proc/self/fd/{fd}"):
            rights &= landlock.OF_FILES
        if rights:
            _add_rule(ruleset, landlock.RULE_PATH_BENEATH, landlock.PATH_BENEATH_CODEC.pack(rights, fd))
        keep = path == Path("/proc/self")
    finally:
        if keep:
            _KEPT_OPEN.append(fd)
        else:
            os.close(fd)


def _add_rule(ruleset: int, kind: int, rule: bytes) -> None:
    _checked(
        _syscall(
            ctypes.c_long(landlock.NR_ADD_RULE),
            ctypes.c_long(ruleset),
            ctypes.c_long(kind),
            ctypes.c_char_p(rule),
            ctypes.c_long(0),
        )
    )


def _checked(result: int) -> int:
    if result < 0:
        raise last_error()
    return int(result)
