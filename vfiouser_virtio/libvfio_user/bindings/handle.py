"""Handle of a vfu_ctx_t: the errors of calls on it, and checks of the calls that C itself would not survive."""

import ctypes
import errno as _errno
import os
from typing import Protocol

from vfiouser_virtio.libvfio_user.bindings.callbacks import Callbacks
from vfiouser_virtio.libvfio_user.bindings.prototypes import Functions


class HasFunctions(Protocol):
    """Requirement of a context on a library; an in-process double of the C API will do."""

    @property
    def functions(self) -> Functions: ...


class ContextHandle:
    """Base of all parts of `Context`."""

    def __init__(self, library: HasFunctions, name: str) -> None:
        self._functions = library.functions
        self._callbacks = Callbacks(name)
        self._live_handle: int | None = None
        self.name = name

    @property
    def _handle(self) -> int:
        """The pointer; ValueError when the context has been destroyed (C would follow it all the same)."""
        if self._live_handle is None:
            raise ValueError(f"{self.name}: the libvfio-user context has been destroyed")
        return self._live_handle

    def _checked(self, result: int, function: str) -> int:
        """``result`` of a call that says -1 for failure; raises OSError with errno."""
        if result < 0:
            raise self._error(function)
        self._callbacks.reraise()
        return result

    def _error(self, function: str, number: int | None = None) -> OSError:
        """The OSError of the call that has just failed; what a callback could not let through goes first."""
        code = ctypes.get_errno() or _errno.EIO if number is None else number
        self._callbacks.reraise()
        return OSError(code, f"{os.strerror(code)} ({function}, {self.name})")

    def _require(self, condition: bool, function: str, reason: str) -> None:
        """The library asserts this, or follows a null pointer: OSError EINVAL instead."""
        if not condition:
            raise OSError(_errno.EINVAL, f"{os.strerror(_errno.EINVAL)} ({function}, {self.name}: {reason})")
