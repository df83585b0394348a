"""What the sandbox takes from a process of its own things: machine code, its terminal, its memory for others to see."""

import os
import re
import subprocess
import sys
import tty
from pathlib import Path

import pytest
from support.command import environment
from support.sandbox_attempts import attempts

from vfiouser_virtio.libc import libc

_PR_GET_MDWE = 66


def test_one_that_loads_code(tmp_path: Path) -> None:
    """Memory that it could write does not become code even so, where the kernel can see to it (6.3)."""
    found = attempts(tmp_path, "code")
    assert found["map a file as code"] == "done"
    assert found["make memory code"] == ("done" if libc.prctl(_PR_GET_MDWE, 0, 0, 0, 0) < 0 else "EACCES")


@pytest.mark.parametrize(("rights", "set_up"), [((), "EPERM"), (("terminal",), "EFAULT")])
def test_its_terminal(tmp_path: Path, rights: tuple[str, ...], set_up: str) -> None:
    """What a user types is not read. Its modes are set by a console on standard input and output, and by no other."""
    ours, theirs = os.openpty()
    try:
        tty.setraw(theirs)
        os.write(ours, b"a secret")
        found = attempts(tmp_path, *rights, terminal=theirs)
        assert found["standard input"] == "/dev/null"
        assert found["read of its terminal"] == "EBADF"
        assert found["set its terminal up"] == set_up
        assert found["type into a terminal"] == "EPERM"
        assert os.read(theirs, 100) == b"a secret"
    finally:
        os.close(ours)
        os.close(theirs)


def test_its_memory_is_not_for_others() -> None:
    """No other process of its user may trace it: what says so in /proc is that its files there are root's."""
    ended = subprocess.run([sys.executable, "-c", _OWNERS], env=environment(), capture_output=True, check=False)
    assert ended.stderr == b""
    before, after = map(int, ended.stdout.split())
    assert before != after == 0


_OWNERS = """
import ctypes, os
from vfiouser_virtio.host_access import NO_ACCESS
from vfiouser_virtio.libc import libc
from vfiouser_virtio.serving.sandbox import enter_sandbox
if os.geteuid() == 0:  # whose files are root's in any case: another user, who can still open what root can
    os.seteuid(54321)
    header, masks = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, masks) == 0
    masks[0], masks[3] = masks[1], masks[4]  # effective: what is permitted
    assert libc.capset(header, masks) == 0
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: who changes its user is not
before = os.stat("/proc/self/maps").st_uid
enter_sandbox("strict", NO_ACCESS)
print(before, os.stat("/proc/self/maps").st_uid)
"""


def test_a_thread_with_a_filter_of_its_own() -> None:
    """The kernel says which, and no number of an error."""
    ended = subprocess.run([sys.executable, "-c", _TWO_FILTERS], env=environment(), capture_output=True, check=False)
    assert ended.stderr == b""
    assert re.fullmatch(rb"thread \d+ has a filter of its own already\n", ended.stdout)


_TWO_FILTERS = """
import ctypes, platform, threading
from vfiouser_virtio.libc import libc
from vfiouser_virtio.protocols.seccomp import INSTRUCTION_CODEC, Action, Bpf
from vfiouser_virtio.serving.privileges import allow_no_new_privileges
from vfiouser_virtio.serving.sandbox_filter import install_filter

def filter_of_its_own():
    everything = ctypes.create_string_buffer(INSTRUCTION_CODEC.pack(Bpf.RET, 0, 0, Action.ALLOW))
    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))
    assert libc.prctl(22, 2, ctypes.byref(Program(1, ctypes.addressof(everything))), 0, 0) == 0
    has_one.set()
    ended.wait()

allow_no_new_privileges()
has_one, ended = threading.Event(), threading.Event()
thread = threading.Thread(target=filter_of_its_own)
thread.start()
has_one.wait()
try:
    install_filter(INSTRUCTION_CODEC.pack(Bpf.RET, 0, 0, Action.ALLOW))
except OSError as error:
    print(error.strerror)
ended.set()
"""
