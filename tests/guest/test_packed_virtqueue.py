"""What only packed rings have: wrap counters, any size, and event suppression structures."""

from typing import Any, Protocol

import pytest
from support.guest import PackedHand

from vfiouser_virtio.guest import DeviceBroken, DriverVirtqueue, PackedVirtqueue

ENABLE, DISABLE, DESC, RESERVED = range(4)


class Make(Protocol):
    """See `conftest.Maker`."""

    notified: list[int]

    def __call__(self, size: int = 8, callback: Any = None, **features: Any) -> tuple[PackedVirtqueue, PackedHand]: ...


@pytest.fixture
def kind() -> str:
    return "packed"


def in_flight(vq: DriverVirtqueue, count: int) -> None:
    for token in range(count):
        vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()


def serve(vq: DriverVirtqueue, hand: PackedHand, count: int) -> None:
    """So many descriptors further on, with nothing in flight."""
    for _ in range(count):
        in_flight(vq, 1)
        hand.use_next()
        assert vq.get_buf() == (0, 0)


def test_parts_are_aligned(make: Make) -> None:
    vq, _ = make(size=3)
    assert (vq.desc % 16, vq.driver % 4, vq.device % 4) == (0, 0, 0)


def test_the_largest_queue(make: Make) -> None:
    vq, hand = make(size=32768)
    in_flight(vq, 32768)
    assert vq.num_free == 0
    assert vq.next_available == 0  # the wrap counter is 0 in the second round
    for _ in range(32768):
        hand.use_next()
    assert len([vq.get_buf() for _ in range(32768)]) == 32768
    serve(vq, hand, 3)
    assert vq.next_available == 3


def test_the_bits_of_each_round(make: Make) -> None:
    """AVAIL is the wrap counter, USED its inverse: in every descriptor of a list, on both sides of the ring's end."""
    vq, hand = make(size=4)
    for place in range(0, 40, 3):
        vq.add_buf([(0x1000, 1)] * 3, 1, 2, "token")
        vq.kick()
        flags = [hand.descriptor((place + step) % 4)[2] for step in range(3)]
        rounds = [1 - (place + step) // 4 % 2 for step in range(3)]
        assert [flag & 0x8080 for flag in flags] == [0x80 if first else 0x8000 for first in rounds]
        assert [flag & 7 for flag in flags] == [1, 3, 2]
        hand.use_next()
        assert vq.get_buf() == ("token", 0)


def test_the_first_descriptor_of_a_batch_is_shown_last(make: Make) -> None:
    vq, hand = make(size=4)
    serve(vq, hand, 3)
    for token in "ab":
        vq.add_buf([(0x1000, 1)] * 2, 1, 1, token)
    assert hand.take() is None
    assert [hand.is_available(at, wrap) for at, wrap in ((3, 1), (0, 0), (1, 0), (2, 0))] == [False, True, True, True]
    vq.kick()
    assert len(hand.take_all()) == 2


def test_next_available(make: Make) -> None:
    """2.9: descriptor index and wrap counter of what comes next."""
    vq, hand = make(size=3)
    seen = [vq.next_available]
    for _ in range(6):
        serve(vq, hand, 1)
        seen.append(vq.next_available)
    assert seen == [0x8000, 0x8001, 0x8002, 0, 1, 2, 0x8000]


def test_ids_are_of_buffers_that_are_in_flight(make: Make) -> None:
    """A buffer that overtakes frees its descriptor, but not the id of the one that it has overtaken."""
    vq, hand = make(size=3)
    in_flight(vq, 3)
    slow, *others = hand.take_all()
    for _ in range(10):
        hand.use(others.pop(0))
        assert vq.get_buf() is not None
        in_flight(vq, 1)
        taken = hand.take()
        assert taken is not None
        assert taken[0] not in (slow, *others)
        others.append(taken[0])
    hand.use(slow)
    assert vq.get_buf() == (0, 0)


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_the_driver_asks_for(make: Make, event_idx: bool) -> None:
    vq, hand = make(size=3, callback=lambda vq: True, event_idx=event_idx)
    assert hand.driver_event == ((0, 1, DESC) if event_idx else (0, 0, ENABLE))
    serve(vq, hand, 4)
    vq.interrupt()
    assert hand.driver_event == ((1, 0, DESC) if event_idx else (0, 0, ENABLE))
    vq.callback = lambda vq: False
    in_flight(vq, 1)
    hand.use_next()
    vq.interrupt()
    assert hand.driver_event[2] == DISABLE
    assert vq.get_buf() == (0, 0)
    assert vq.restart()
    assert hand.driver_event == ((2, 0, DESC) if event_idx else (0, 0, ENABLE))


def test_descriptor_events_only_count_with_event_idx(make: Make) -> None:
    vq, hand = make()
    hand.set_device_event(5, 1, DESC)
    in_flight(vq, 1)
    assert make.notified == [1]


def test_reserved_event_flags_are_no_reason_to_be_silent(make: Make) -> None:
    vq, hand = make(event_idx=True)
    hand.set_device_event(5, 1, RESERVED)
    in_flight(vq, 1)
    assert make.notified == [1]


def test_an_event_of_the_other_round(make: Make) -> None:
    vq, hand = make(size=4, event_idx=True)
    hand.set_device_event(1, 0, DESC)  # the second descriptor, but not of this round
    in_flight(vq, 3)
    assert make.notified == []


def test_a_length_without_write_is_reserved(make: Make) -> None:
    """2.8.4: ignored by drivers, however long."""
    vq, hand = make()
    in_flight(vq, 1)
    taken = hand.take()
    assert taken is not None
    hand.use(taken[0], 0xFFFF_FFFF, flags=0)
    assert vq.get_buf() == (0, 0)


def test_next_and_indirect_in_used_descriptors_are_ignored(make: Make) -> None:
    vq, hand = make()
    in_flight(vq, 1)
    taken = hand.take()
    assert taken is not None
    hand.use(taken[0], 8, flags=7)
    assert vq.get_buf() == (0, 8)


def test_used_without_having_been_available(make: Make) -> None:
    vq, hand = make()
    hand.use(0)
    with pytest.raises(DeviceBroken, match="id is 0x0, which is not a buffer in flight") as caught:
        vq.get_buf()
    assert caught.value.rule == "2.8.22"


def test_out_of_order(make: Make) -> None:
    """Nothing tells an element from a batch's; but what it skips is not used a second time."""
    vq, hand = make(size=4, in_order=True)
    in_flight(vq, 3)
    first, second, _ = hand.take_all()
    hand.use(second, 1, [first])
    hand.use(first)
    assert [vq.get_buf(), vq.get_buf()] == [(0, 8), (1, 1)]
    with pytest.raises(DeviceBroken, match="not a buffer in flight"):
        vq.get_buf()
