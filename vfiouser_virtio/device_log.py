"""Log of one served device: its id in front of each line, each kind once where a peer could repeat it.

Every line that a client, a guest or the host's files can cause goes through here. It is marked with the device's id
(``record.device``), by which a handler may limit how many there are.
"""

import logging
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

MAX_QUOTED = 80
"""Characters of a peer's text that are worth reading."""
# Kinds that are remembered: a peer that can make up new ones gets no more of our memory, and no more lines.
_MAX_KINDS = 64


_in_making: ContextVar[str] = ContextVar("_in_making", default="")


@contextmanager
def being_made(device: str) -> Iterator[None]:
    """In the block a device is made that will have this id: what its ``__init__`` logs has it already."""
    before = _in_making.set(device)
    try:
        yield
    finally:
        _in_making.reset(before)


def id_in_making() -> str:
    """The id that `being_made` has said; empty outside of its block."""
    return _in_making.get()


class DeviceLog(_Adapter):
    """Logger of one served device; ``device`` is its id, which may be set later: it is made before it is served."""

    def __init__(self, logger: logging.Logger, device: str) -> None:
        super().__init__(logger)
        self.device = device
        self._counts: Counter[tuple[int, Hashable]] = Counter()

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """With the device's id in front, and on the record. All other methods come through here."""
        if self.logger.isEnabledFor(level):
            text = str(msg) % args if args else str(msg)
            kwargs.setdefault("stacklevel", 2)
            self.logger.log(level, "%s: %s", self.device, text, extra={"device": self.device}, **kwargs)

    def once(
        self,
        kind: Hashable,
        message: str,
        *args: object,
        level: int = logging.WARNING,
        error: BaseException | None = None,
    ) -> None:
        """Log if this is the first of its kind since `forget`, with the traceback of ``error`` if there is one."""
        key = (level, kind)
        if key not in self._counts and len(self._counts) >= _MAX_KINDS:
            key = (level, "too many kinds")
        self._counts[key] += 1
        if self._counts[key] == 1:
            self.log(level, message, *args, exc_info=error, stacklevel=3)

    def forget(self) -> None:
        """Another client, or another driver: what it does wrong is news again."""
        self._counts.clear()

    def summarize(self) -> None:
        """Say how many warnings and errors were not written because they were not the first of their kind."""
        silent = sum(count - 1 for (level, _kind), count in self._counts.items() if level >= logging.WARNING)
        if silent:
            self.warning("%d more complaints like these", silent)


def printable(text: str) -> str:
    """``text`` as one line that no terminal takes for more than text: control and formatting characters escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def quoted(text: object) -> str:
    """What a peer sent, for a message: quoted, escaped, and not longer than is worth reading."""
    try:
        shown = str(text)
    except (RecursionError, ValueError):  # JSON that is nested deeply, a number of 5000 digits
        shown = f"a {type(text).__name__}"
    cut = "…" if len(shown) > MAX_QUOTED else ""
    return f"'{printable(shown[:MAX_QUOTED])}{cut}'"
