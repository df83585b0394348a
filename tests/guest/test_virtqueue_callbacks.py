"""Notifications and callbacks of the 2007 interface, over rings of both kinds."""

import pytest
from support.driver_queue import Make, a_buffer, keep_on

from vfiouser_virtio.guest import DeviceBroken, DriverVirtqueue, packed_virtqueue, split_virtqueue

# ---- callbacks -----------------------------------------------------------------------------------------------------

both = pytest.mark.parametrize("event_idx", [False, True])


def in_flight(vq: DriverVirtqueue, count: int) -> None:
    for token in range(count):
        vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()


@both
def test_a_callback_that_returns_true_stays_on(make: Make, event_idx: bool) -> None:
    seen = []

    def callback(vq: DriverVirtqueue) -> bool:
        while used := vq.get_buf():
            seen.append(used[0])
        return True

    vq, hand = make(callback=callback, event_idx=event_idx)
    in_flight(vq, 4)
    assert hand.asks()
    for count in (1, 2, 1):
        for _ in range(count):
            hand.use_next()
        vq.interrupt()
        assert hand.asks()
    assert seen == [0, 1, 2, 3]


@both
def test_a_callback_that_returns_false_stays_off_until_restart(make: Make, event_idx: bool) -> None:
    calls = []

    def callback(vq: DriverVirtqueue) -> bool:
        calls.append(vq.get_buf())
        return False

    vq, hand = make(callback=callback, event_idx=event_idx)
    in_flight(vq, 4)
    hand.use_next()
    vq.interrupt()
    assert calls == [(0, 0)]
    assert not hand.asks()
    assert not vq.callbacks_on
    hand.use_next()
    vq.interrupt()  # a device may interrupt although it was not asked (2.7.7.1)
    assert len(calls) == 1
    assert vq.get_buf() == (1, 0)
    assert vq.restart()
    assert hand.asks()
    hand.use_next()
    vq.interrupt()
    assert calls == [(0, 0), (2, 0)]


@both
def test_restart_with_buffers_pending_is_false_and_callbacks_stay_off(make: Make, event_idx: bool) -> None:
    calls = []
    vq, hand = make(callback=lambda vq: calls.append(1), event_idx=event_idx)
    in_flight(vq, 3)
    hand.use_next()
    vq.interrupt()
    assert calls == [1]
    assert not vq.restart()
    assert not vq.callbacks_on
    assert not hand.asks()
    vq.interrupt()
    assert calls == [1]
    assert vq.get_buf() == (0, 0)
    assert vq.restart()
    assert hand.asks()


@both
def test_no_wake_up_is_lost_between_the_last_look_and_restart(make: Make, event_idx: bool) -> None:
    """The race that restart's answer is for: the device uses a buffer while callbacks are being turned on."""
    vq, hand = make(callback=lambda vq: False, event_idx=event_idx)
    in_flight(vq, 2)
    hand.use_next()
    vq.interrupt()
    got = [vq.get_buf()]
    assert vq.get_buf() is None  # and now, before restart:
    interrupt_due = hand.asks()
    hand.use_next()
    assert not interrupt_due  # the device had no reason to interrupt, so restart must tell
    assert not vq.restart()
    got.append(vq.get_buf())
    assert [used[0] for used in got if used] == [0, 1]
    assert vq.restart()


@both
def test_used_while_the_callback_runs(make: Make, event_idx: bool) -> None:
    """The driver has asked for the next buffer before the callback runs, so that one has an interrupt of its own."""
    seen: list[int] = []
    asked: list[bool] = []

    def callback(vq: DriverVirtqueue) -> bool:
        used = vq.get_buf()  # only one, although there will be more
        assert used is not None
        seen.append(used[0])
        asked.append(hand.asks())
        if len(seen) == 1:
            hand.use_next()
        return True

    vq, hand = make(callback=callback, event_idx=event_idx)
    in_flight(vq, 4)
    hand.use_next()
    vq.interrupt()
    assert (seen, asked) == ([0], [True])
    vq.interrupt()
    assert (seen, asked) == ([0, 1], [True, True])
    assert hand.asks()


@both
def test_used_while_the_interrupt_is_asked_for(make: Make, event_idx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race of every look: a buffer is used before the device can see that it should interrupt for it.

    Until the driver's barrier, which is where the device acts here, its wish may be seen by nobody.
    """
    seen: list[int] = []

    def callback(vq: DriverVirtqueue) -> bool:
        while used := vq.get_buf():
            seen.append(used[0])
        return True

    vq, hand = make(callback=callback, event_idx=event_idx)
    in_flight(vq, 4)

    def meanwhile() -> None:
        if len(hand.taken) == 1:
            hand.use_next()

    for module in (split_virtqueue, packed_virtqueue):
        monkeypatch.setattr(module, "full_barrier", meanwhile)
    hand.use_next()
    vq.interrupt()
    assert seen == ([0, 1] if event_idx else [0])
    assert hand.asks()


def test_a_callback_that_leaves_everything_is_called_for_the_next(make: Make) -> None:
    calls: list[int] = []

    def call(_vq: DriverVirtqueue) -> bool:
        calls.append(1)
        return True

    vq, hand = make(callback=call, event_idx=True)
    in_flight(vq, 4)
    hand.use_next()
    vq.interrupt()
    assert calls == [1]
    assert hand.asks()
    hand.use_next()
    vq.interrupt()
    assert calls == [1, 1]


def test_polling_overtakes_the_interrupt(make: Make) -> None:
    """Buffers that were taken before their interrupt came: it finds nothing, and yet the next one must interrupt."""
    vq, hand = make(callback=keep_on, event_idx=True)
    in_flight(vq, 4)
    hand.use_next()
    assert vq.get_buf() == (0, 0)
    vq.interrupt()
    assert hand.asks()


@both
def test_without_a_callback_there_are_no_interrupts(make: Make, event_idx: bool) -> None:
    vq, hand = make(event_idx=event_idx)
    in_flight(vq, 1)
    assert not hand.asks()
    hand.use_next()
    vq.interrupt()
    assert vq.get_buf() == (0, 0)


@both
def test_an_interrupt_without_used_buffers_is_nobodys(make: Make, event_idx: bool) -> None:
    calls: list[int] = []

    def call(_vq: DriverVirtqueue) -> bool:
        calls.append(1)
        return True

    vq, _ = make(callback=call, event_idx=event_idx)
    in_flight(vq, 1)
    vq.interrupt()
    assert calls == []


def test_what_was_used_before_the_device_broke_comes_back(make: Make) -> None:
    got: list[object] = []

    def callback(vq: DriverVirtqueue) -> bool:
        while used := vq.get_buf():
            got.append(used[0])
        return True

    vq, hand = make(callback=callback)
    buffer = a_buffer(vq, hand, "good")
    a_buffer(vq, hand, "kept")
    hand.use(buffer)
    hand.use(buffer)
    with pytest.raises(DeviceBroken):
        vq.interrupt()
    assert got == ["good"]
    assert vq.shutdown() == ["kept"]
