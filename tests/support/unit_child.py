"""``python unit_child.py FILTER COUNT COMMAND…``: a command as a service manager starts it.

It has the seccomp filter in the file FILTER, and file descriptors 3 to 2 + COUNT, which are open, as LISTEN_FDS.
"""

import ctypes
import os
import sys
from pathlib import Path

from vfiouser_virtio.libc import last_error, libc
from vfiouser_virtio.protocols.seccomp import INSTRUCTION_CODEC, SET_MODE_FILTER
from vfiouser_virtio.protocols.system_calls import NR_SECCOMP
from vfiouser_virtio.serving.privileges import allow_no_new_privileges


class SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main() -> None:
    program = Path(sys.argv[1]).read_bytes()
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": sys.argv[2]}
    buffer = ctypes.create_string_buffer(program, len(program))
    argument = SockFprog(len(program) // INSTRUCTION_CODEC.size, ctypes.addressof(buffer))
    allow_no_new_privileges()
    number = ctypes.c_long(NR_SECCOMP[os.uname().machine])
    if libc.syscall(number, ctypes.c_ulong(SET_MODE_FILTER), ctypes.c_ulong(0), ctypes.byref(argument)):
        raise last_error()
    os.execv(sys.argv[3], sys.argv[3:])


main()
