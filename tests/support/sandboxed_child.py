"""Program that enters the sandbox and then tries what who has taken it over would: what came of each, as JSON.

Its arguments: a folder that it may remove files of, a file that it has open when it enters, and rights that it asks
for: ``port=`` and a TCP port, ``code``, ``terminal``; ``connector``: those of the process that connects.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from vfiouser_virtio import briefly

# Before the others read it: a busy machine, on which another process is late, is no file system that hangs.
briefly.TIMEOUT_S = 60.0

from vfiouser_virtio.connecting import connect_stream  # noqa: E402
from vfiouser_virtio.host_access import HostAccess  # noqa: E402
from vfiouser_virtio.libc import last_error, libc  # noqa: E402
from vfiouser_virtio.removal import remove_file  # noqa: E402
from vfiouser_virtio.serving.sandbox import enter_sandbox, give_up_rights  # noqa: E402

folder, opened = Path(sys.argv[1]), os.open(sys.argv[2], os.O_RDWR)
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(folder / "listening"))
listener.listen()
stream, pair = socket.socket(), socket.socketpair()
parent = os.getppid()
# Python 3.12 counts a thread that was joined until the kernel has ended it, and warns of fork() then.
warnings.simplefilter("ignore", DeprecationWarning)
signal.signal(signal.SIGUSR1, lambda *_: None)


def in_c(name: str, *arguments: int) -> None:
    if getattr(libc, name)(*(ctypes.c_long(argument) for argument in arguments)) < 0:
        raise last_error()


def code() -> None:
    """Memory of our own that becomes code: refused by kernels that know PR_SET_MDWE, and no system call."""
    with mmap.mmap(-1, 4096) as page:
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        in_c("mprotect", address, 4096, mmap.PROT_READ | mmap.PROT_EXEC)


def map_code(fd: int) -> None:
    """A file as code, which is what loading a library does."""
    mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()


def in_thread(work: Callable[[], object]) -> None:
    """A thread that is started later has no more rights."""
    failed: list[OSError] = []

    def run() -> None:
        try:
            work()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in failed:
        raise error


def limit() -> None:
    if libc.setrlimit(7, (ctypes.c_ulong * 2)(64, 64)) < 0:  # RLIMIT_NOFILE
        raise last_error()


def clone3() -> None:
    in_c("syscall", 435, 0, 0)


TRIED: dict[str, Callable[[], object]] = {
    "read a foreign file": lambda: Path("/etc/passwd").read_text(),
    "read a foreign file in a thread": lambda: in_thread(lambda: Path("/etc/passwd").read_text()),
    "read the memory of another process": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
    "list a foreign folder": lambda: os.listdir("/etc"),
    "make a file": lambda: (folder / "made").touch(),
    "make a folder": lambda: (folder / "made").mkdir(),
    "rename a file": lambda: (folder / "mine").rename(folder / "other"),
    "change a file's mode": lambda: (folder / "mine").chmod(0o777),
    "write to a program": lambda: os.open(os.__file__, os.O_WRONLY),
    "open a file again": lambda: os.open(sys.argv[2], os.O_RDWR),
    "open a file again by its descriptor": lambda: os.open(f"/proc/self/fd/{opened}", os.O_RDWR),
    "remove a foreign file": lambda: remove_file(sys.argv[2]),
    "remove another file of its folder": lambda: remove_file(folder / "theirs"),
    "remove its own file itself": lambda: os.unlink(folder / "mine"),
    "remove another file of its folder itself": lambda: os.unlink(folder / "theirs"),
    "execute a program": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
    "fork": os.fork,
    "clone3": clone3,
    "make a UNIX socket": lambda: socket.socket(socket.AF_UNIX),
    "make a TCP socket": lambda: socket.socket(socket.AF_INET),
    "connect": lambda: in_c("connect", listener.fileno(), 0, 0),
    "send a datagram to a foreign socket": lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].sendmsg(
        [b"x"], [], 0, sys.argv[2]
    ),
    "use TCP Fast Open": lambda: stream.sendmsg([b"x"], [], 0x20000000, ("127.0.0.1", 9)),
    "have the kernel signal its parent": lambda: fcntl.fcntl(stream, 8, parent),
    "trace its parent": lambda: in_c("ptrace", 16, parent, 0, 0),
    "read its parent's memory": lambda: in_c("process_vm_readv", parent, 0, 0, 0, 0, 0),
    "kill its parent": lambda: os.kill(parent, 0),
    "become another user": lambda: os.setuid(1),
    "mount": lambda: in_c("mount", 0, 0, 0, 0, 0),
    "make a namespace": lambda: in_c("unshare", 0x10000000),
    "make an io_uring": lambda: in_c("syscall", 425, 1, 0),
    "type into a terminal": lambda: in_c("ioctl", 0, 0x5412, 0),
    "raise a limit": limit,
    "make memory code": code,
    "map a file as code": lambda: map_code(opened),
    "read of its terminal": lambda: os.read(2, 1),
    "set its terminal up": lambda: in_c("ioctl", 2, 0x5402, 0),
    # What no rule is for:
    "look at a foreign file": lambda: os.stat("/etc/passwd"),
    # What a device does:
    "send to a socket of its own": lambda: pair[0].sendmsg([b"x"]),
    "flush a mapping": lambda: mmap.mmap(-1, 4096).flush(),
    "read /proc/self": lambda: Path("/proc/self/maps").read_text(),
    "import": lambda: __import__("wave"),
    "write to what is open": lambda: os.pwrite(opened, b"x", 0),
    "make longer what is open": lambda: os.ftruncate(opened, 8192),
    "start a thread": lambda: in_thread(lambda: None),
    "signal itself": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "remove its own file": lambda: remove_file(folder / "mine"),
}


def came_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def tcp(port: int) -> None:
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))


def by_another(port: int) -> None:
    with connect_stream((socket.AF_INET, ("127.0.0.1", port))) as sock:
        assert sock.getpeername() == ("127.0.0.1", port)


access = HostAccess(removes=(folder / "mine",))
asked: dict[str, str] = {}
for word in sys.argv[3:]:
    right, _, value = word.partition("=")
    asked[right] = value
access |= HostAccess(loads_code="code" in asked, terminal="terminal" in asked)
if "port" in asked:
    port = int(asked["port"])
    access |= HostAccess(connects=((socket.AF_INET, ("127.0.0.1", port)),))
    TRIED |= {
        "make a UDP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "make an MPTCP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262),
        "make a TCP socket": lambda: socket.socket(socket.AF_INET).close(),
        "make a netlink socket": lambda: socket.socket(socket.AF_NETLINK),
        "connect": lambda: tcp(port),
        "connect to another port": lambda: tcp(port + 1),
        "bind": lambda: socket.socket().bind(("127.0.0.1", port + 1)),
    }
    if "connector" not in asked:
        TRIED |= {
            "have another process connect": lambda: by_another(port),
            "have another process connect elsewhere": lambda: by_another(port + 1),
        }
if "connector" in asked:
    give_up_rights("strict", HostAccess(connects=access.connects))
else:
    enter_sandbox("strict", access)
results = {name: came_of(attempt) for name, attempt in TRIED.items()}
results["standard input"] = "/dev/null" if os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev else "as it was"
results["capabilities"] = next(
    line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
)
print(json.dumps(results))
