"""What is inside an exception group."""

import pytest

from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.groups import leaves, only

one, two, bug = ConfigError("one"), DeviceError("two"), KeyError("bug")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (one, [one]),
        (ExceptionGroup("", [one]), [one]),
        (ExceptionGroup("", [ExceptionGroup("", [one, bug]), two]), [one, bug, two]),
        (BaseExceptionGroup("", [KeyboardInterrupt(), one]), [KeyboardInterrupt, one]),
    ],
)
def test_leaves(error: BaseException, found: list[object]) -> None:
    assert [leaf if leaf in found else type(leaf) for leaf in leaves(error)] == found


def test_only() -> None:
    assert only(one, ConfigError) is one
    assert only(bug, ConfigError) is None
    assert only(ExceptionGroup("", [ExceptionGroup("", [two]), one]), ConfigError) is two
    assert only(ExceptionGroup("", [one, bug]), ConfigError) is None
