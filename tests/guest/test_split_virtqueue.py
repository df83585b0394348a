"""What only split rings have: indexes of 16 bits that run on, and sizes that are powers of two."""

from typing import Any, Protocol

import pytest
from support.guest import SplitHand

from vfiouser_virtio.guest import DeviceBroken, DriverVirtqueue, SplitVirtqueue


class Make(Protocol):
    """See `conftest.Maker`."""

    notified: list[int]

    def __call__(self, size: int = 8, callback: Any = None, **features: Any) -> tuple[SplitVirtqueue, SplitHand]: ...


@pytest.fixture
def kind() -> str:
    return "split"


def in_flight(vq: DriverVirtqueue, count: int) -> None:
    for token in range(count):
        vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()


@pytest.mark.parametrize("size", [3, 65536])
def test_sizes_that_a_split_queue_cannot_have(make: Make, size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        make(size=size)


def test_parts_are_aligned(make: Make) -> None:
    vq, _ = make(size=2)
    assert (vq.desc % 16, vq.driver % 2, vq.device % 4) == (0, 0, 0)


def test_used_flags_mean_nothing_with_event_idx(make: Make) -> None:
    vq, hand = make(event_idx=True)
    hand.set_used_flags(1)
    in_flight(vq, 1)
    assert make.notified == [1]


def test_avail_event_across_the_wrap(make: Make) -> None:
    vq, hand = make(size=4, event_idx=True)
    notified = []
    for index in range(0x10004):
        if index % 0x8000 == 0x7FFE:
            hand.set_avail_event(index + 1)  # "when you add the next but one"
        vq.add_buf([(0x1000, 1)], 1, 0, index)
        if vq.kick():
            notified.append(index)
        hand.use_next()
        assert vq.get_buf() == (index, 0)
    # The event is 0 at first; behind 0xffff it lies a whole round away.
    assert notified == [0, 0x7FFF, 0xFFFF]


def test_next_available_is_the_index(make: Make) -> None:
    """2.9: next_off and next_wrap are the 16 bits of it."""
    vq, hand = make(size=2)
    for count in range(1, 0x10002):
        vq.add_buf([(0x1000, 1)], 1, 0, 0)
        vq.kick()
        assert vq.next_available == count & 0xFFFF == hand.avail_idx
        hand.use_next()
        vq.get_buf()


def test_with_in_order_descriptors_are_taken_in_ring_order(make: Make) -> None:
    vq, hand = make(size=8, in_order=True)
    at = 0
    for count in (1, 2, 3, 2, 3, 1, 4, 8, 5):
        vq.add_buf([(0x1000, 8)] * count, 0, count, 0)
        vq.kick()
        taken = hand.take()
        assert taken is not None
        places = [taken[0], *(descriptor[3] for descriptor in taken[1][:-1])]
        assert places == [(at + step) % 8 for step in range(count)]
        at += count
        hand.use(taken[0])
        assert vq.get_buf() is not None


def test_the_middle_of_a_chain_is_no_id(make: Make) -> None:
    vq, hand = make()
    vq.add_buf([(0x1000, 8), (0x2000, 8)], 1, 1, "token")
    vq.kick()
    hand.use(hand.descriptor(hand.head(0))[3])
    with pytest.raises(DeviceBroken, match="not a buffer in flight"):
        vq.get_buf()


def test_an_id_of_32_bits(make: Make) -> None:
    vq, hand = make()
    in_flight(vq, 1)
    hand.use(0x1_0000)
    with pytest.raises(DeviceBroken, match="id is 0x10000, which is not a buffer in flight"):
        vq.get_buf()


@pytest.mark.parametrize("idx", [2, 9, 0x8000, 0xFFFF])
def test_an_index_that_cannot_be(make: Make, idx: int) -> None:
    vq, hand = make()
    in_flight(vq, 1)
    hand.used_idx = idx
    with pytest.raises(DeviceBroken, match=f"used.idx is {idx:#x}: only 0x1 buffers can follow 0x0"):
        vq.get_buf()


def test_an_index_that_goes_back(make: Make) -> None:
    vq, hand = make()
    in_flight(vq, 4)
    for _ in range(2):
        hand.use_next()
        assert vq.get_buf() is not None
    hand.used_idx = 1
    with pytest.raises(DeviceBroken, match=r"used\.idx is 0x1: only 0x2 buffers can follow 0x2"):
        vq.get_buf()


def test_a_spinning_device_is_found_by_the_callback(make: Make) -> None:
    vq, hand = make(callback=lambda vq: True)
    in_flight(vq, 1)
    hand.used_idx = 7
    with pytest.raises(DeviceBroken):
        vq.interrupt()


def test_out_of_order(make: Make) -> None:
    """A batch says how long it is: an element further on than used.idx was moved is not in order."""
    vq, hand = make(in_order=True)
    in_flight(vq, 3)
    first, second, third = hand.take_all()
    hand.use(third)
    with pytest.raises(DeviceBroken, match=f"buffer {third:#x} is used before {first:#x}") as caught:
        vq.get_buf()
    assert caught.value.rule == "RB2"
    assert vq.shutdown() == [0, 1, 2]
    assert second not in (first, third)
