"""Child processes that end with their parent, however that ends (prctl(2), PR_SET_PDEATHSIG)."""

import os
import signal
import sys
from collections.abc import Sequence

from vfiouser_virtio.libc import libc

_PR_SET_PDEATHSIG = 1
# The same in a few words, for a Python that is there only to become another program.
_BECOME = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have this process get the signal when the *thread* that has forked it ends; at once if that has ended already.

    ``parent`` is the process id of that thread's process.
    """
    libc.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def ending_with_us(command: Sequence[str]) -> list[str]:
    """The command line of any program, as one that is killed when the thread that starts it ends.

    In front of it is a Python that becomes the program after some 20 ms: what subprocess would have us do between
    fork() and exec() (``preexec_fn``) is not safe in a process with threads.
    """
    return [sys.executable, "-ISc", _BECOME, str(os.getpid()), *command]
