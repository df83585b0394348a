"""Which engine serves the devices of a test that does not say so itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from vfiouser_virtio.engines import EngineName

_current: EngineName = "vfio-user"


def current_engine() -> EngineName:
    """What `use_engine` has said last."""
    return _current


@contextmanager
def use_engine(name: EngineName) -> Iterator[None]:
    """Have devices served by this engine until the end of the block."""
    global _current
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before
