"""System calls that a server makes once its devices are open, and what for: all that its seccomp filter lets through.

Found with strace over the devices with each of their back ends, and by reading what CPython, trio and glibc may call;
`tests/cli/test_sandbox.py` has the devices at work behind the filter.
"""

import mmap
import os
import socket
from collections.abc import Sequence

from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.protocols import tun
from vfiouser_virtio.protocols.system_calls import NUMBERS
from vfiouser_virtio.serving.sandbox_filter import ANY_ARGUMENTS, WHOLE, CallArgument, Rules

_ALWAYS = {
    "open files": "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range "
    "fstat fstatfs statx dup dup2 dup3 flock fadvise64 fsync fdatasync fallocate ftruncate getdents64",
    # Which files that may be, Landlock says. There is no call here that makes a name: mkdir, link, rename, chmod.
    "names": "open openat openat2 stat lstat newfstatat statfs access faccessat faccessat2 readlink readlinkat getcwd",
    "waiting": "poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2 pipe2 "
    "timerfd_create timerfd_settime nanosleep clock_nanosleep restart_syscall",
    "sockets that are there": "accept accept4 recvfrom recvmsg shutdown getsockname getpeername getsockopt setsockopt",
    "memory": "munmap mremap madvise msync brk memfd_create membarrier",
    "threads": "futex set_robust_list rseq arch_prctl exit exit_group sched_yield sched_getaffinity gettid",
    "signals of our own": "rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigreturn "
    "sigaltstack setitimer getitimer wait4 waitid",
    "asynchronous I/O of open files": "io_setup io_submit io_getevents io_uring_enter",
    "what it is": "umask clock_gettime clock_getres gettimeofday time getrandom getrusage sysinfo uname getpid getppid "
    "getuid geteuid getgid getegid getgroups getpgrp getpgid getsid",
}

# asm-generic/ioctls.h, the same on both machines: of terminals (what Python asks of any file that it opens) and of
# sockets. TIOCSTI, which types into a terminal, is not among them; nor are those that set its modes, but for a console.
_TCGETS, _TCSETS, _TCSETSW, _TCSETSF = 0x5401, 0x5402, 0x5403, 0x5404
_TCGETS2, _TCSETS2, _TCSETSW2, _TCSETSF2 = 0x802C542A, 0x402C542B, 0x402C542C, 0x402C542D
_TIOCGPGRP, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
_IOCTLS = (
    *(_TCGETS, _TCGETS2, _TIOCGPGRP, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX),
    *(tun.TUNSETOFFLOAD, tun.TUNSETVNETHDRSZ, tun.TUNSETQUEUE, tun.TUNGETIFF),
)
_TERMINAL_IOCTLS = (_TCSETS, _TCSETSW, _TCSETSF, _TCSETS2, _TCSETSW2, _TCSETSF2)
# linux/prctl.h
_PR_SET_NAME, _PR_GET_NAME = 15, 16
# sys/socket.h: what connects to an address that sendmsg() names (TCP Fast Open).
_MSG_FASTOPEN = 0x2000_0000
# fcntl.h, but F_SETOWN, F_SETSIG and F_SETOWN_EX: by these the kernel sends any signal to any process of the user.
_FCNTL = (
    *range(8),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW
    *(36, 37, 38),  # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW
    *(1030, 1031, 1032, 1033, 1034),  # F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ, F_ADD_SEALS, F_GET_SEALS
)
# Type and flags of socket() and socketpair(): SOCK_NONBLOCK and SOCK_CLOEXEC are not looked at.
_TYPE = 0xF
# linux/sched.h: CLONE_VM, CLONE_SIGHAND and CLONE_THREAD: a thread, and no process.
_THREAD = 0x100 | 0x800 | 0x10000


def allowed_calls(machine: str, access: HostAccess) -> Rules:
    """Rules for `sandbox_filter.assemble`, for this process. Raises KeyError for a machine that is not known."""
    numbers = NUMBERS[machine]
    names = " ".join(_ALWAYS.values()).split()
    if access.removes or access.removes_folders:
        names += ["unlink", "unlinkat", "rmdir"]
    conditions: dict[str, Sequence[Sequence[CallArgument]]] = {
        "clone": [(CallArgument(0, _THREAD, _THREAD),)],
        "ioctl": [(CallArgument(1, number),) for number in _IOCTLS + (_TERMINAL_IOCTLS if access.terminal else ())],
        # No machine code that is not there yet, from a file either.
        "mmap": [()] if access.loads_code else [(CallArgument(2, 0, mmap.PROT_EXEC),)],
        "mprotect": [()] if access.loads_code else [(CallArgument(2, 0, mmap.PROT_EXEC),)],
        "prctl": [(CallArgument(0, option),) for option in (_PR_SET_NAME, _PR_GET_NAME)],
        "kill": [(CallArgument(0, os.getpid()),)],
        "tgkill": [(CallArgument(0, os.getpid()),)],
        # Of send(2), which has no address.
        "sendto": [(CallArgument(4, 0, WHOLE),)],
        "sendmsg": [(CallArgument(2, 0, _MSG_FASTOPEN),)],
        "fcntl": [(CallArgument(1, command),) for command in _FCNTL],
        # Not of datagrams: one of them sends to any socket with a path.
        "socketpair": [
            (CallArgument(0, socket.AF_UNIX), CallArgument(1, kind, _TYPE))
            for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
        ],
        # To look at a limit, and of this process.
        "prlimit64": [(CallArgument(0, 0), CallArgument(2, 0, WHOLE))],
    }
    if families := sorted({family for family, _ in access.connects}):
        # TCP alone: Landlock's ports are not those of MPTCP, and there is none for UDP.
        conditions["socket"] = [
            (CallArgument(0, family), CallArgument(1, socket.SOCK_STREAM, _TYPE), CallArgument(2, protocol))
            for family in families
            for protocol in (0, *([socket.IPPROTO_TCP] if family != socket.AF_UNIX else []))
        ]
        names.append("connect")
    rules: dict[int, Sequence[Sequence[CallArgument]]] = {
        numbers[name]: ANY_ARGUMENTS for name in names if name in numbers
    }
    return rules | {numbers[name]: alternatives for name, alternatives in conditions.items()}
