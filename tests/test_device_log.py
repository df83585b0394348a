"""Log lines of one device: its id, each kind once, and text of a peer that stays text."""

import logging

import pytest

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
