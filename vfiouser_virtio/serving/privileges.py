"""Privileges of the calling thread, which are given up for good: capabilities(7), no_new_privs, memory that is code."""

import ctypes
import struct
from pathlib import Path

from vfiouser_virtio.libc import last_error, libc

# linux/prctl.h
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
# linux/capability.h: _LINUX_CAPABILITY_VERSION_3, with two structs of three masks: effective, permitted, inheritable.
_CAPABILITY_HEADER = struct.pack("<Ii", 0x2008_0522, 0)
_NO_CAPABILITIES = bytes(2 * 3 * 4)


def allow_no_new_privileges() -> None:
    """No program that is executed from now on gets more rights than this one has (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        raise last_error()


def drop_capabilities() -> None:
    """Give up all capabilities, and, where there were some, that a program could give us others. Raises OSError."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        if _prctl(_PR_CAPBSET_DROP, capability):  # EPERM: it takes CAP_SETPCAP, and so there are none to be given up
            break
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if libc.capset(ctypes.c_char_p(_CAPABILITY_HEADER), ctypes.c_char_p(_NO_CAPABILITIES)):
        raise last_error()


def refuse_new_code() -> bool:
    """No memory of this process that can be written becomes executable (PR_SET_MDWE); whether the kernel can (6.3).

    A file that can be written can be mapped as code even so.
    """
    return _prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN) == 0


def _prctl(option: int, value: int) -> int:
    result: int = libc.prctl(
        ctypes.c_int(option), ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    return result
