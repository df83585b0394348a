"""What was dropped, as the user reads it: by reason, at once and then once a minute, and all of it in the end."""

import logging

import pytest
import trio
import trio.testing

from vfiouser_virtio.backends.net.drops import GATHER, INTERVAL, Drop, DropReport, Drops
from vfiouser_virtio.device_log import DeviceLog

logger = logging.getLogger("vfiouser_virtio.test")


@pytest.fixture
def to_guest() -> Drops:
    return Drops()


@pytest.fixture
def from_guest() -> Drops:
    return Drops()


@pytest.fixture
def report(to_guest: Drops, from_guest: Drops, caplog: pytest.LogCaptureFixture) -> DropReport:
    caplog.set_level(logging.DEBUG, logger.name)
    return DropReport(
        DeviceLog(logger, "net0"), lambda: "hub lan", to_guest=[to_guest, Drops()], from_guest=[from_guest]
    )


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Levels and lines since the last look."""
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return lines


def test_each_reason_is_in_words_of_its_own() -> None:
    assert len({why.text for why in Drop}) == len(Drop)
    assert [int(why) for why in Drop] == list(range(len(Drop)))


async def test_a_loss_is_told_at_once_and_others_once_a_minute(
    report: DropReport,
    to_guest: Drops,
    from_guest: Drops,
    caplog: pytest.LogCaptureFixture,
    nursery: trio.Nursery,
    mock_clock: trio.testing.MockClock,
) -> None:
    nursery.start_soon(report.run)
    await trio.testing.wait_all_tasks_blocked()
    to_guest.add(Drop.NO_DRIVER)  # nothing that anybody has lost
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(10 * INTERVAL)
    await trio.testing.wait_all_tasks_blocked()
    assert said(caplog) == []

    for _ in range(12):
        to_guest.add(Drop.NO_BUFFERS)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(GATHER)
    await trio.testing.wait_all_tasks_blocked()
    assert said(caplog) == [
        (
            "INFO",
            "net0: hub lan: dropped 1 to the guest (no driver was there), 12 to the guest (it had no receive buffer)",
        )
    ]

    for _ in range(3):
        for _ in range(1000):
            from_guest.add(Drop.MALFORMED)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(INTERVAL / 4)
        await trio.testing.wait_all_tasks_blocked()
    assert said(caplog) == []
    mock_clock.jump(INTERVAL / 4)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(GATHER)
    await trio.testing.wait_all_tasks_blocked()
    assert said(caplog) == [("INFO", "net0: hub lan: dropped 3000 from the guest (malformed)")]


async def test_what_was_not_told_is_when_the_driver_leaves_and_all_in_the_end(
    report: DropReport, to_guest: Drops, from_guest: Drops, caplog: pytest.LogCaptureFixture
) -> None:
    to_guest.add(Drop.LINK_DOWN, 2)
    report.driver_left()
    assert said(caplog) == []
    to_guest.add(Drop.NO_BUFFERS, 5)
    report.driver_left()
    report.driver_left()
    first = "2 to the guest (the link was down), 5 to the guest (it had no receive buffer)"
    assert said(caplog) == [("INFO", f"net0: hub lan: dropped {first}")]
    from_guest.add(Drop.CHANCE, 7)
    report.end()
    assert said(caplog) == [("WARNING", f"net0: hub lan: dropped {first}, 7 from the guest (lost by loss=)")]


def test_nothing_is_said_where_nothing_was_dropped_and_no_warning_where_nothing_was_lost(
    report: DropReport, from_guest: Drops, caplog: pytest.LogCaptureFixture
) -> None:
    report.driver_left()
    report.end()
    assert said(caplog) == []
    from_guest.add(Drop.NO_NETWORK, 3)
    report.end()
    assert said(caplog) == [("INFO", "net0: hub lan: dropped 3 from the guest (there is no network behind it)")]


async def test_nobody_is_called_when_nobody_waits(report: DropReport, to_guest: Drops) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(report.run)
        await trio.testing.wait_all_tasks_blocked()
        assert to_guest.on_loss is not None
        nursery.cancel_scope.cancel()
    assert to_guest.on_loss is None
