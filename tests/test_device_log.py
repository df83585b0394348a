"""Log lines of one device: its id, each kind once, and text of a peer that stays text."""

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import vfiouser_virtio
from vfiouser_virtio.device_log import MAX_QUOTED, DeviceLog, printable, quoted


@pytest.fixture
def log() -> DeviceLog:
    return DeviceLog(logging.getLogger("vfiouser_virtio.test"), "blk0")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_every_line_begins_with_the_device(log: DeviceLog, caplog: pytest.LogCaptureFixture) -> None:
    log.warning("queue %d", 3)
    log.warning("100%")
    log.device = "100%d"
    log.error("later")
    assert lines(caplog) == ["blk0: queue 3", "blk0: 100%", "100%d: later"]
    assert [record.device for record in caplog.records] == ["blk0", "blk0", "100%d"]  # type: ignore[attr-defined]
    assert {record.filename for record in caplog.records} == {"test_device_log.py"}


def test_a_kind_is_logged_once_and_counted(log: DeviceLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        log.once("kind", "number %d", number)
    log.once("kind", "an error is another kind", level=logging.ERROR, error=ValueError("why"))
    log.summarize()
    assert lines(caplog) == ["blk0: number 0", "blk0: an error is another kind", "blk0: 4 more complaints like these"]
    assert caplog.records[1].exc_info is not None
    log.forget()
    log.summarize()
    log.once("kind", "news again")
    assert lines(caplog)[3:] == ["blk0: news again"]


def test_a_peer_cannot_make_up_kinds_for_ever(log: DeviceLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1000):
        log.once(number, "kind %d", number)
    assert len(caplog.records) < 100
    log.summarize()
    assert f"{1000 - len(caplog.records) + 1} more complaints" in lines(caplog)[-1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – text…", "plain – text…"),
        ("\x1b]0;title\x07\n12:00:00 forged", "\\x1b]0;title\\x07\\n12:00:00 forged"),
        ("\x9b31m\u202eright to left\r", "\\x9b31m\\u202eright to left\\r"),
        ("half a surrogate \ud800", "half a surrogate \\ud800"),
    ],
)
def test_nothing_but_text_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert quoted(text) == f"'{shown}'"


def test_what_is_quoted_is_short() -> None:
    assert quoted("x" * 10_000) == f"'{'x' * MAX_QUOTED}…'"
    assert quoted(10**5000) == "'a int'"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert quoted(nested) == "'a list'"
    while nested:  # no deeper recursion at its end than Python stands
        nested = nested.pop()  # type: ignore[assignment]


# Of the host, when a device is made or once in its life; or of our own clients and drivers, which serve nobody.
NOT_OF_A_SERVED_DEVICE = {
    "vfio_user/client/irqs.py",
    "libvfio_user/bindings/callbacks.py",  # each kind once, and marked by hand: the bindings stand alone
}


def bare_lines(source: str) -> Iterator[int]:
    """Where something is logged by a module's own logger."""
    tree = ast.parse(source)
    loggers = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and "getLogger" in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if name in loggers:
                if method not in ("isEnabledFor", "getChild"):
                    yield node.lineno


def test_what_a_peer_can_cause_is_marked_with_its_device() -> None:
    """Or else nothing limits how many such lines there are."""
    assert list(bare_lines("import logging\nlog = logging.getLogger()\ndef f():\n    log.error('x')")) == [4]
    top = Path(vfiouser_virtio.__file__).parent
    found = []
    for folder in ("", "backends", "devices", "libvfio_user", "pci", "transports", "vfio_user", "virtio", "vring"):
        for file in (top / folder).glob("**/*.py" if folder else "*.py"):
            name = str(file.relative_to(top))
            if name not in NOT_OF_A_SERVED_DEVICE:
                found += [f"{name}:{line}" for line in bare_lines(file.read_text())]
    assert found == []
