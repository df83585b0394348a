"""Callbacks from C: Python functions behind C function pointers, out of which no exception ever falls into C."""

import ctypes
import errno
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vfiouser_virtio.libvfio_user")


class Callbacks:
    """C function pointers of one context, kept as long as C may call them (until `Context.destroy_ctx`)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.depth = 0  # callbacks under way
        self._kept: list[Any] = []
        self._reported: set[tuple[str, type[BaseException]]] = set()
        self._interrupt: BaseException | None = None

    def make(self, prototype: Any, kind: str, function: Callable[..., Any], failure: int | None = -1) -> Any:
        """A C function pointer to ``function``, which gets the C arguments.

        When it raises, the caller gets ``failure`` (None for a void function) and finds in errno an OSError's own, or
        EIO. But for an OSError that can be told so, the first of each type is logged with its traceback.
        KeyboardInterrupt and its like also go on, out of the call that made C call back (`reraise`).
        """

        def call(*arguments: Any) -> Any:
            self.depth += 1
            try:
                return function(*arguments)
            except BaseException as error:
                if failure is None or not isinstance(error, OSError):
                    self._report(kind, error)
                if not isinstance(error, Exception):
                    self._interrupt = error
                ctypes.set_errno((error.errno if isinstance(error, OSError) else 0) or errno.EIO)
                return failure
            finally:
                self.depth -= 1

        return self.keep(prototype(call))

    def keep(self, reference: Any) -> Any:
        """Hold on to something that C has a pointer to. Nothing is let go early: C may still use what was replaced."""
        self._kept.append(reference)
        return reference

    @property
    def interrupted(self) -> bool:
        """Whether `reraise` would raise."""
        return self._interrupt is not None

    def reraise(self) -> None:
        """Raise what no callback could let through C and must not be lost: KeyboardInterrupt, SystemExit, …"""
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt

    def release(self) -> None:
        """C will not call any more."""
        self._kept.clear()

    def _report(self, kind: str, error: BaseException) -> None:
        if (kind, type(error)) not in self._reported:
            self._reported.add((kind, type(error)))
            logger.error("%s: the %s callback raised", self.name, kind, exc_info=error, extra={"device": self.name})


def null(prototype: Any) -> Any:
    """The null pointer of a callback type."""
    return prototype()
