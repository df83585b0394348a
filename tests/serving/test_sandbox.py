"""The sandbox itself: what a process that has entered it cannot do any more, and its filter on both machines."""

import errno
import os
import platform
import socket
import struct
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from support.sandbox_attempts import attempts

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.protocols.seccomp import INSTRUCTION_CODEC, Action, Arch, Bpf
from vfiouser_virtio.protocols.system_calls import NUMBERS
from vfiouser_virtio.serving import sandbox, sandbox_files
from vfiouser_virtio.serving.sandbox import check_kernel, enter_sandbox
from vfiouser_virtio.serving.sandbox_calls import allowed_calls
from vfiouser_virtio.serving.sandbox_files import landlock_abi
from vfiouser_virtio.serving.sandbox_filter import CallArgument, assemble

DENIED = {
    "read a foreign file": "EACCES",
    "read a foreign file in a thread": "EACCES",
    "read the memory of another process": "EACCES",
    "list a foreign folder": "EACCES",
    "make a file": "EACCES",
    "make a folder": "EPERM",
    "rename a file": "EPERM",
    "change a file's mode": "EPERM",
    "write to a program": "EACCES",
    "open a file again": "EACCES",
    "open a file again by its descriptor": "EACCES",
    "remove a foreign file": "EPERM",
    "remove another file of its folder": "EPERM",
    "remove its own file itself": "EPERM",
    "remove another file of its folder itself": "EPERM",
    "execute a program": "EPERM",
    "fork": "EPERM",
    "clone3": "ENOSYS",
    "make a UNIX socket": "EPERM",
    "make a TCP socket": "EPERM",
    "connect": "EPERM",
    "send a datagram to a foreign socket": "EPERM",
    "use TCP Fast Open": "EPERM",
    "have the kernel signal its parent": "EPERM",
    "trace its parent": "EPERM",
    "read its parent's memory": "EPERM",
    "kill its parent": "EPERM",
    "become another user": "EPERM",
    "mount": "EPERM",
    "make a namespace": "EPERM",
    "make an io_uring": "ENOSYS",
    "type into a terminal": "EPERM",
    "raise a limit": "EPERM",
    "make memory code": "EPERM",
    "map a file as code": "EPERM",
    "read of its terminal": "EBADF",
    "set its terminal up": "EPERM",
}
ALLOWED = (
    "look at a foreign file",
    "read /proc/self",
    "import",
    "send to a socket of its own",
    "flush a mapping",
    "write to what is open",
    "make longer what is open",
    "start a thread",
    "signal itself",
    "remove its own file",
)


def test_what_is_left_of_its_rights(tmp_path: Path) -> None:
    assert attempts(tmp_path) == DENIED | dict.fromkeys(ALLOWED, "done") | {
        "standard input": "/dev/null",
        "capabilities": "0" * 16,
    }


def test_connections_come_from_another_process(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        found = attempts(tmp_path, f"port={listener.getsockname()[1]}")
    assert found["have another process connect"] == "done"
    for attempt in ("have another process connect elsewhere", "make a TCP socket", "connect"):
        assert found[attempt] == "EPERM"


def test_that_process_has_its_own_tcp_port_only(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        found = attempts(tmp_path, f"port={listener.getsockname()[1]}", "connector")
    changed = {name: came for name, came in found.items() if DENIED.get(name, came) != came or "connect" in name}
    elsewhere = "EACCES" if landlock_abi() >= 4 else "ECONNREFUSED"  # Linux 6.7
    assert changed == {
        "make a TCP socket": "done",
        "connect": "done",
        "connect to another port": elsewhere,
    }
    assert found["make a UDP socket"] == found["make an MPTCP socket"] == found["make a UNIX socket"] == "EPERM"
    assert found["make a netlink socket"] == found["bind"] == found["execute a program"] == "EPERM"


def test_a_thread_that_is_there_would_keep_its_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_PATIENCE_S", 0.0)
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="an author's")
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"other threads .*an author's\).* in run\(\)"):
            enter_sandbox("strict", NO_ACCESS)
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("abi", "lacks"), [(0, "Landlock "), (2, "rule of Landlock about O_TRUNC"), (5, "rules of Landlock about signals")]
)
def test_a_kernel_without_all_of_landlock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, abi: int, lacks: str
) -> None:
    monkeypatch.setattr(sandbox, "landlock_abi", lambda: abi)
    with pytest.raises(ConfigError, match=rf"no {lacks}.*; --sandbox=best-effort does with what there is"):
        check_kernel("strict")
    check_kernel("best-effort")
    assert f"the sandbox is not whole: this machine has no {lacks}" in caplog.text


def test_a_kernel_with_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "landlock_abi", lambda: 6)
    check_kernel("strict")


def test_a_module_whose_file_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("gone")
    module.__file__ = "/nowhere/gone.py"
    monkeypatch.setitem(sys.modules, "gone", module)
    assert not [path for path, _ in sandbox_files.rules(NO_ACCESS) if "nowhere" in str(path)]


def test_a_python_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine is that of the kernel, and the numbers of its calls are not."""
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    with pytest.raises(ConfigError, match="this machine has no Python of 64 bits"):
        check_kernel("strict")


def test_an_unknown_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="no a table of the system calls of riscv64"):
        check_kernel("strict")


# ---- the filter, interpreted -----------------------------------------------------------------------------------------


def verdict(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel does with a call: the part of classic BPF that the filters use."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*arguments, *(6 * [0]))[:6])
    instructions = list(INSTRUCTION_CODEC.iter_unpack(program))
    at = accumulator = 0
    while True:
        code, true, false, k = instructions[at]
        at += 1
        match code:
            case Bpf.LD:
                (accumulator,) = struct.unpack_from("<I", data, k)
            case Bpf.AND:
                accumulator &= k
            case Bpf.JA:
                at += k
            case Bpf.JEQ:
                at += true if accumulator == k else false
            case Bpf.JGT:
                at += true if accumulator > k else false
            case Bpf.JGE:
                at += true if accumulator >= k else false
            case Bpf.RET:
                return int(k)
            case _:
                raise AssertionError(f"instruction {code:#x}")


DENY, MISSING = Action.ERRNO | errno.EPERM, Action.ERRNO | errno.ENOSYS


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of(machine: str) -> None:
    arch, numbers = Arch[machine], NUMBERS[machine]
    rules = allowed_calls(machine, NO_ACCESS)
    program = assemble(arch, rules)
    for number in range(600):
        plain = number in rules and any(not each for each in rules[number])
        expected = Action.ALLOW if plain else DENY if number < 424 or number in rules else MISSING
        if number not in rules or plain:
            assert verdict(program, arch, number, 1, 2, 3, 4, 5, 6) == expected, number
    other = Arch.aarch64 if arch is Arch.x86_64 else Arch.x86_64
    assert verdict(program, other, numbers["read"]) == Action.KILL_PROCESS
    if machine == "x86_64":
        assert verdict(program, arch, numbers["read"] | 0x4000_0000) == Action.KILL_PROCESS
    thread, process = 0x3D0F00, 0x1200011
    pid, high = os.getpid(), 1 << 32
    for name, arguments, allowed in (
        ("clone", (thread,), True),
        ("clone", (process,), False),
        ("clone", (0x100 | 0x800,), False),
        ("ioctl", (5, 0x5421), True),
        ("ioctl", (5, 0x5412), False),
        ("tgkill", (pid, 5, 9), True),
        ("tgkill", (pid + 1, 5, 9), False),
        ("sendto", (3, 4, 5, 0, 0, 0), True),
        ("sendto", (3, 4, 5, 0, 0x1000, 16), False),
        ("sendto", (3, 4, 5, 0, high, 16), False),
        ("prlimit64", (0, 7, 0, 0x1000), True),
        ("prlimit64", (0, 7, 0x1000), False),
        ("prlimit64", (0, 7, high), False),
        ("prlimit64", (1, 7, 0), False),
        ("sendmsg", (3, 4, 0x4000), True),
        ("sendmsg", (3, 4, 0x2000_4000), False),
        ("socketpair", (1, 0x80001), True),
        ("socketpair", (1, 0x80005), True),
        ("socketpair", (1, 2), False),
        ("fcntl", (3, 1034), True),
        ("fcntl", (3, 8, pid), False),
        ("mmap", (0, 4096, 3), True),
        ("mmap", (0, 4096, 5), False),
        ("mprotect", (0, 4096, 4), False),
        ("ioctl", (0, 0x5402), False),
        ("prctl", (15,), True),
        ("prctl", (22,), False),
    ):
        assert (verdict(program, arch, numbers[name], *arguments) == Action.ALLOW) is allowed, (name, arguments)
    assert verdict(program, arch, numbers["socket"], 1) == DENY
    connecting = assemble(arch, allowed_calls(machine, HostAccess(connects=((socket.AF_UNIX, "path"),))))
    assert verdict(connecting, arch, numbers["socket"], 1, 0x80801) == Action.ALLOW
    assert verdict(connecting, arch, numbers["socket"], 1, 2) == DENY  # SOCK_DGRAM
    assert verdict(connecting, arch, numbers["socket"], 2, 1) == DENY  # AF_INET
    assert verdict(connecting, arch, numbers["socket"], 16) == DENY  # AF_NETLINK
    assert verdict(connecting, arch, numbers["connect"]) == Action.ALLOW
    more = assemble(arch, allowed_calls(machine, HostAccess(loads_code=True, terminal=True)))
    assert verdict(more, arch, numbers["mmap"], 0, 4096, 5) == Action.ALLOW
    assert verdict(more, arch, numbers["ioctl"], 0, 0x5402) == Action.ALLOW
    assert verdict(more, arch, numbers["ioctl"], 0, 0x5412) == DENY  # TIOCSTI


def test_alternatives_and_whole_words() -> None:
    first, second = (CallArgument(0, 1), CallArgument(1, 2)), (CallArgument(2, 5 << 32, (1 << 64) - 1),)
    program = assemble(Arch.x86_64, {7: [first, second]})
    for arguments, allowed in (
        ((1, 2, 0), True),
        ((1, 3, 0), False),
        ((0, 0, 5 << 32), True),
        ((0, 0, (5 << 32) + 1), False),
        ((1 | 9 << 32, 2, 0), True),  # an int has 32 bits
    ):
        assert (verdict(program, Arch.x86_64, 7, *arguments) == Action.ALLOW) is allowed
    assert verdict(program, Arch.x86_64, 8) == DENY
