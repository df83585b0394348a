"""The 2007 interface over rings of both kinds, with only a device's hand at the other end."""

import random
from typing import Any, Protocol

import pytest
from support.guest import Hand

from vfiouser_virtio.guest import DeviceBroken, DriverVirtqueue, QueueFull
from vfiouser_virtio.vfio_user import PrivateMemory

NEXT, WRITE, INDIRECT = 1, 2, 4


class Make(Protocol):
    """See `conftest.Maker`."""

    notified: list[int]

    def __call__(self, size: int = 8, callback: Any = None, **features: Any) -> tuple[DriverVirtqueue, Hand]: ...


def keep_on(vq: DriverVirtqueue) -> bool:
    return True


# ---- to the device -------------------------------------------------------------------------------------------------


def test_a_buffer_is_shown_at_the_kick_and_not_before(make: Make) -> None:
    vq, hand = make()
    for _ in range(2):
        vq.add_buf([(0x1_0000_1000, 16), (0x2000, 512), (0x3000, 1)], 1, 2, "token")
    assert hand.take() is None
    assert vq.kick()
    for _ in range(2):
        taken = hand.take()
        assert taken is not None
        described = [descriptor[:3] for descriptor in taken[1]]
        assert described == [(0x1_0000_1000, 16, NEXT), (0x2000, 512, NEXT | WRITE), (0x3000, 1, WRITE)]
    assert hand.take() is None
    assert len(set(hand.taken)) == 2


def test_a_kick_without_anything_new_is_none(make: Make) -> None:
    vq, _ = make()
    assert not vq.kick()
    assert make.notified == []


def test_several_buffers_one_kick(make: Make) -> None:
    vq, hand = make()
    for token in range(3):
        vq.add_buf([(0x1000, 1)], 1, 0, token)
    assert vq.kick()
    assert not vq.kick()
    assert (len(hand.take_all()), make.notified) == (3, [1])


def test_a_queue_that_is_held_shows_nothing(make: Make) -> None:
    vq, hand = make()
    vq.stopped = True
    vq.add_buf([(0x1000, 1)], 1, 0, "token")
    assert not vq.kick()
    assert (hand.take(), make.notified) == (None, [])
    vq.stopped = False
    assert vq.kick()
    assert len(hand.take_all()) == 1


def test_indirect_takes_one_descriptor(make: Make) -> None:
    vq, hand = make(indirect=True)
    vq.add_buf([(0x1000, 16), (0x2000, 512)], 1, 1, "token")
    vq.kick()
    taken = hand.take()
    assert taken is not None
    ((table, length, flags, _),) = taken[1]
    assert (length, flags) == (32, INDIRECT)
    assert hand.table(table, 2) == [(0x1000, 16, 0, 0), (0x2000, 512, WRITE, 0)]
    assert vq.num_free == 7


def test_a_single_piece_needs_no_table(make: Make) -> None:
    vq, hand = make(indirect=True)
    vq.add_buf([(0x1000, 16)], 1, 0, "token")
    vq.kick()
    taken = hand.take()
    assert taken is not None
    assert [descriptor[:3] for descriptor in taken[1]] == [(0x1000, 16, 0)]


def test_full(make: Make) -> None:
    vq, hand = make(size=4)
    vq.add_buf([(0x1000, 1)] * 3, 3, 0, "a")
    with pytest.raises(QueueFull, match="2 descriptors are needed, 1 of 4 are free"):
        vq.add_buf([(0x1000, 1)] * 2, 2, 0, "b")
    vq.kick()
    hand.use_next()
    assert vq.get_buf() == ("a", 0)
    vq.add_buf([(0x1000, 1)] * 4, 4, 0, "b")
    assert vq.num_free == 0


@pytest.mark.parametrize(
    ("sg", "out_num", "in_num", "what"),
    [
        ([], 0, 0, "0 pieces"),
        ([(0, 1)], 0, 0, "1 pieces are not 0 to read and 0 to write"),
        ([(0, 1)], 2, -1, "1 pieces"),
        ([(0, 1)] * 9, 9, 0, "longer than the queue"),
        ([(0, 1 << 32), (0, 1)], 2, 0, "more than 4 GiB"),
        ([(0, 1 << 32), (0, 1)], 1, 1, "more than 4 GiB"),
    ],
)
@pytest.mark.parametrize("indirect", [False, True])
def test_what_no_driver_may_make(
    make: Make, sg: list[tuple[int, int]], out_num: int, in_num: int, what: str, indirect: bool
) -> None:
    vq, _ = make(indirect=indirect)
    with pytest.raises(ValueError, match=what):
        vq.add_buf(sg, out_num, in_num, "token")
    assert vq.num_free == 8


@pytest.mark.parametrize("size", [0, 32769, 65536])
def test_sizes_that_no_queue_can_have(make: Make, size: int) -> None:
    with pytest.raises(ValueError, match=f"queue of {size} entries"):
        make(size=size)


# ---- notifications -------------------------------------------------------------------------------------------------


def test_a_device_that_wants_no_notifications(make: Make) -> None:
    vq, hand = make()
    hand.want_notifications(False)
    vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert not vq.kick()
    hand.want_notifications(True)
    vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert vq.kick()
    assert make.notified == [1]


def test_a_notification_inside_of_a_batch(make: Make) -> None:
    vq, hand = make(event_idx=True)
    hand.want_notification_at(3)
    for _ in range(2):
        vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert not vq.kick()
    for _ in range(3):
        vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert vq.kick()


def test_a_notification_at_every_place(make: Make) -> None:
    """Whatever place of a round the device asks for, the driver notifies when that one is made available."""
    vq, hand = make(size=4, event_idx=True)
    dice = random.Random(34)
    for _ in range(5000):
        ahead = dice.randint(1, 4)
        hand.want_notification_at(ahead)
        done = 0
        while done < ahead:
            batch = dice.randint(1, 4 - done)
            for _ in range(batch):
                vq.add_buf([(0x1000, 1)], 1, 0, 0)
            assert vq.kick() == (done < ahead <= done + batch)
            done += batch
        for _ in range(done):
            hand.use_next()
            assert vq.get_buf() == (0, 0)


# ---- from the device -----------------------------------------------------------------------------------------------


def test_tokens_come_back_in_the_devices_order(make: Make) -> None:
    vq, hand = make()
    for token in "abc":
        vq.add_buf([(0x1000, 100)], 0, 1, token)
    vq.kick()
    buffers = hand.take_all()
    assert vq.get_buf() is None
    for number in (2, 0, 1):
        hand.use(buffers[number], number)
    assert [vq.get_buf() for _ in range(4)] == [("c", 2), ("a", 0), ("b", 1), None]
    assert (vq.num_free, vq.num_in_flight) == (8, 0)


def test_falsy_tokens_are_tokens(make: Make) -> None:
    vq, hand = make()
    vq.add_buf([(0x1000, 1)], 1, 0, None)
    vq.kick()
    hand.use_next()
    assert vq.get_buf() == (None, 0)


SIZES = {"split": (1, 2, 16), "packed": (1, 2, 3, 7, 16)}


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_long_life(make: Make, kind: str, event_idx: bool, indirect: bool, in_order: bool) -> None:
    """Random chains in random order, far beyond the wrap of every index: no buffer, descriptor or wake-up gets lost."""
    wraps = kind == "split" and event_idx and not indirect and not in_order  # indexes of 16 bits
    for size in SIZES[kind]:
        dice = random.Random(2007)
        vq, hand = make(size=size, callback=keep_on, indirect=indirect, event_idx=event_idx, in_order=in_order)
        rooms: dict[int, int] = {}
        expected: list[tuple[int, int]] = []
        token, rounds = 0, 70_000 if wraps and size == 16 else 1000
        while token < rounds:
            count = dice.randint(1, min(3, size))
            if dice.random() < 0.6 and (1 if indirect else count) <= vq.num_free:
                out = dice.randint(0, count)
                vq.add_buf([(0x1000, 64)] * count, out, count - out, token)
                rooms[token] = 64 * (count - out)
                token += 1
                continue
            vq.kick()
            hand.take_all()
            if hand.taken:
                many = dice.randint(1, len(hand.taken)) if in_order else 1
                which = 0 if in_order else dice.randrange(len(hand.taken))
                batch, hand.taken[which : which + many] = hand.taken[which : which + many], []
                tokens = [vq._in_flight[buffer][0] for buffer in batch]
                written = dice.randint(0, rooms[tokens[-1]])
                hand.use(batch[-1], written, batch[:-1])
                expected += [(skipped, rooms.pop(skipped)) for skipped in tokens[:-1]]
                expected.append((tokens[-1], written))
                rooms.pop(tokens[-1])
            if dice.random() < 0.7:
                while used := vq.get_buf():
                    assert used == expected.pop(0)
                assert not expected
                assert hand.asks()
        assert vq.num_in_flight == len(rooms) + len(expected)


def a_buffer(vq: DriverVirtqueue, hand: Hand, token: object = "token") -> int:
    """One with room for eight bytes, which the device takes."""
    vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()
    taken = hand.take()
    assert taken is not None
    return taken[0]


@pytest.mark.parametrize("buffer", [5, 8, 0xFFFF])
def test_an_id_that_was_never_offered(make: Make, kind: str, buffer: int) -> None:
    vq, hand = make()
    a_buffer(vq, hand)
    hand.use(buffer)
    with pytest.raises(DeviceBroken, match=f"id is {buffer:#x}, which is not a buffer in flight") as caught:
        vq.get_buf()
    assert caught.value.rule == {"split": "2.7.8", "packed": "2.8.22"}[kind]


def test_the_same_id_twice(make: Make) -> None:
    vq, hand = make()
    first, _ = a_buffer(vq, hand, "a"), a_buffer(vq, hand, "b")
    hand.use(first)
    hand.use(first)
    assert vq.get_buf() == ("a", 0)
    with pytest.raises(DeviceBroken, match="not a buffer in flight"):
        vq.get_buf()


@pytest.mark.parametrize("indirect", [False, True])
def test_a_length_beyond_the_room(make: Make, kind: str, indirect: bool) -> None:
    vq, hand = make(indirect=indirect)
    for _ in range(2):
        vq.add_buf([(0x1000, 4096), (0x2000, 8), (0x3000, 1)], 1, 2, "token")
    vq.kick()
    hand.use_next(9)
    assert vq.get_buf() == ("token", 9)
    hand.use_next(10)
    with pytest.raises(DeviceBroken, match=r"used length 0xa of buffer .* room for 0x9") as caught:
        vq.get_buf()
    assert caught.value.rule == {"split": "UR2", "packed": "2.8.4"}[kind]


def test_a_broken_queue_stays_broken(make: Make) -> None:
    calls = []
    vq, hand = make(callback=lambda vq: calls.append(1))
    a_buffer(vq, hand)
    hand.use(7)
    with pytest.raises(DeviceBroken):
        vq.get_buf()
    with pytest.raises(DeviceBroken):
        vq.get_buf()
    with pytest.raises(DeviceBroken):
        vq.add_buf([(0x1000, 8)], 0, 1, "token")
    vq.interrupt()
    assert calls == []


# ---- IN_ORDER ------------------------------------------------------------------------------------------------------


def test_a_batch_is_used_by_its_last_buffer(make: Make) -> None:
    """Those that are skipped count as written to the full (2.7.9, 2.8.8)."""
    vq, hand = make(in_order=True)
    for token, count in zip("abcd", (1, 2, 3, 1), strict=True):
        vq.add_buf([(0x1000, 8)] * count, 0, count, token)
    vq.kick()
    a, b, c, d = hand.take_all()
    hand.use(c, 5, [a, b])
    assert [vq.get_buf() for _ in range(4)] == [("a", 8), ("b", 16), ("c", 5), None]
    hand.use(d, 1)
    assert vq.get_buf() == ("d", 1)
    assert (vq.num_free, vq.num_in_flight) == (8, 0)


def test_in_order_one_by_one(make: Make) -> None:
    vq, hand = make(in_order=True)
    for token in "abc":
        vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()
    for written, buffer in enumerate(hand.take_all()):
        hand.use(buffer, written)
    assert [vq.get_buf() for _ in range(4)] == [("a", 0), ("b", 1), ("c", 2), None]


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
    """The race of every look: a buffer is used before the device can see that it should interrupt for it."""
    seen: list[int] = []

    def callback(vq: DriverVirtqueue) -> bool:
        while used := vq.get_buf():
            seen.append(used[0])
        return True

    vq, hand = make(callback=callback, event_idx=event_idx)
    in_flight(vq, 4)
    enable = vq._enable_interrupts

    def late() -> None:
        if len(hand.taken) == 1:
            hand.use_next()
        enable()

    monkeypatch.setattr(vq, "_enable_interrupts", late)
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


# ---- the end -------------------------------------------------------------------------------------------------------


def test_shutdown_gives_the_tokens_back(make: Make, memory: PrivateMemory) -> None:
    vq, hand = make(indirect=True)
    for token in "abcd":
        vq.add_buf([(0x1000, 8), (0x2000, 8)], 1, 1, token)
    vq.kick()
    hand.use_next()
    hand.use_next()
    assert vq.get_buf() == ("a", 0)
    vq.live = True
    with pytest.raises(RuntimeError, match="while the device still has the queue"):
        vq.shutdown()
    vq.live = False
    with pytest.raises(RuntimeError, match="before shutdown"):
        vq.close()
    assert sorted(vq.shutdown()) == ["b", "c", "d"]
    assert vq.shutdown() == []
    vq.close()
    memory.alloc(memory.size)  # everything is free again, tables, too
