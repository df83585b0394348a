"""Full memory barrier that event suppression needs (virtio 1.4, 2.7.7 and 2.7.10), from pure Python.

Publishing ``avail_event`` and then reading ``avail.idx`` again is a store followed by a load of another address: the
one order that x86 does not keep by itself. A C program would use a fence, and so do we where the compiler's support
library is installed. Elsewhere Python has a lock, here one that is always held. *Release, then acquire*: on x86-64 both
are LOCK-prefixed; on aarch64 a release-store followed by an acquire-load of the same word keeps everything before it
before everything after it. (Acquire, then release, would not.)
"""

import ctypes
import platform
import threading
from collections.abc import Callable

TSO = platform.machine() in ("x86_64", "AMD64", "i686")
"""Total store order: this machine keeps all other orders (load-load, store-store, load-store) by itself."""

_lock = threading.Lock()
_lock.acquire()
_release, _acquire = _lock.release, _lock.acquire


def lock_barrier() -> None:
    """`full_barrier` without a library. About 100 ns."""
    _release()
    _acquire()


def _find() -> Callable[[], object]:
    try:
        fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return lock_barrier
    # Its argument, a memory order, is not a constant there, so that it is compiled as the strongest one, whatever the
    # register holds: not to pass one, nor to let go of the GIL, makes it cost 50 ns.
    return ctypes.PYFUNCTYPE(None)(ctypes.cast(fence, ctypes.c_void_p).value or 0)


full_barrier: Callable[[], object] = _find()
"""Every load and store before this is done before any load or store after it."""
