"""The 2007 interface over made-up used rings: no device, only a hand that writes what a device would, or should not."""

import random
from collections.abc import Callable, Iterator

import pytest
from support.guest import Hand

from vfiouser_virtio.guest import DeviceBroken, QueueFull, Virtqueue
from vfiouser_virtio.vfio_user import PrivateMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
Make = Callable[..., "tuple[Virtqueue, Hand]"]


@pytest.fixture
def memory() -> Iterator[PrivateMemory]:
    with PrivateMemory(1 << 20) as memory:
        yield memory


@pytest.fixture
def make(memory: PrivateMemory) -> Make:
    def make(size: int = 8, callback: object = None, **features: bool) -> tuple[Virtqueue, Hand]:
        vq = Virtqueue(memory, 0, size, lambda: notified.append(1), callback, **features)
        return vq, Hand(vq, memory)

    notified: list[int] = []
    make.notified = notified
    return make


def keep_on(vq: Virtqueue) -> bool:
    return True


# ---- to the device -------------------------------------------------------------------------------------------------


def test_a_buffer_is_shown_at_the_kick_and_not_before(make: Make) -> None:
    vq, hand = make()
    vq.add_buf([(0x1000, 16), (0x2000, 512), (0x3000, 1)], 1, 2, "token")
    assert hand.avail_idx == 0
    assert vq.kick()
    assert hand.avail_idx == 1
    first = hand.head(0)
    addr, length, flags, second = hand.descriptor(first)
    assert (addr, length, flags) == (0x1000, 16, NEXT)
    addr, length, flags, third = hand.descriptor(second)
    assert (addr, length, flags) == (0x2000, 512, NEXT | WRITE)
    assert hand.descriptor(third)[:3] == (0x3000, 1, WRITE)
    assert len({first, second, third}) == 3


def test_a_kick_without_anything_new_is_none(make: Make) -> None:
    vq, _ = make()
    assert not vq.kick()
    assert make.notified == []


def test_several_buffers_one_kick(make: Make) -> None:
    vq, hand = make()
    for token in range(3):
        vq.add_buf([(0x1000, 1)], 1, 0, token)
    assert vq.kick()
    assert (hand.avail_idx, make.notified) == (3, [1])


def test_indirect_takes_one_descriptor(make: Make) -> None:
    vq, hand = make(indirect=True)
    vq.add_buf([(0x1000, 16), (0x2000, 512)], 1, 1, "token")
    vq.kick()
    table, length, flags, _ = hand.descriptor(hand.head(0))
    assert (length, flags) == (32, INDIRECT)
    assert hand.descriptor(0, table) == (0x1000, 16, NEXT, 1)
    assert hand.descriptor(1, table) == (0x2000, 512, WRITE, 0)
    assert vq.num_free == 7


def test_a_single_piece_needs_no_table(make: Make) -> None:
    vq, hand = make(indirect=True)
    vq.add_buf([(0x1000, 16)], 1, 0, "token")
    vq.kick()
    assert hand.descriptor(hand.head(0)) == (0x1000, 16, 0, 0)


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
    ],
)
@pytest.mark.parametrize("indirect", [False, True])
def test_what_no_driver_may_make(make: Make, sg: list, out_num: int, in_num: int, what: str, indirect: bool) -> None:
    vq, _ = make(indirect=indirect)
    with pytest.raises(ValueError, match=what):
        vq.add_buf(sg, out_num, in_num, "token")
    assert vq.num_free == 8


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_sizes_that_a_split_queue_cannot_have(make: Make, size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        make(size=size)


def test_parts_are_aligned(make: Make) -> None:
    vq, _ = make(size=2)
    assert (vq.desc % 16, vq.driver % 2, vq.device % 4) == (0, 0, 0)


# ---- notifications -------------------------------------------------------------------------------------------------


def test_no_notify_flag(make: Make) -> None:
    vq, hand = make()
    hand.set_used_flags(1)
    vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert not vq.kick()
    hand.set_used_flags(0)
    vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert vq.kick()
    assert make.notified == [1]


def test_avail_event_across_the_wrap(make: Make) -> None:
    vq, hand = make(size=4, event_idx=True)
    hand.set_used_flags(1)  # means nothing with EVENT_IDX
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


def test_avail_event_inside_of_a_batch(make: Make) -> None:
    vq, hand = make(event_idx=True)
    hand.set_avail_event(2)
    for _ in range(2):
        vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert not vq.kick()  # indexes 0 and 1
    for _ in range(3):
        vq.add_buf([(0x1000, 1)], 1, 0, 0)
    assert vq.kick()  # 2 to 4


# ---- from the device -----------------------------------------------------------------------------------------------


def test_tokens_come_back_in_the_devices_order(make: Make) -> None:
    vq, hand = make()
    for token in "abc":
        vq.add_buf([(0x1000, 100)], 0, 1, token)
    vq.kick()
    heads = [hand.head(position) for position in range(3)]
    assert vq.get_buf() is None
    for number in (2, 0, 1):
        hand.use(heads[number], number)
    assert [vq.get_buf() for _ in range(4)] == [("c", 2), ("a", 0), ("b", 1), None]
    assert (vq.num_free, vq.num_in_flight) == (8, 0)


def test_falsy_tokens_are_tokens(make: Make) -> None:
    vq, hand = make()
    vq.add_buf([(0x1000, 1)], 1, 0, None)
    vq.kick()
    hand.use_next()
    assert vq.get_buf() == (None, 0)


def test_long_life(make: Make) -> None:
    """Random chains in random order, far beyond the wrap of every index: no descriptor gets lost."""
    dice = random.Random(2007)
    vq, hand = make(size=16, indirect=True, event_idx=True)
    open_heads: dict[int, tuple[int, int]] = {}
    for token in range(70000):
        out, in_ = dice.randrange(3), dice.randrange(1, 3)
        vq.add_buf([(0x1000, 64)] * (out + in_), out, in_, token)
        vq.kick()
        open_heads[hand.head(token)] = token, 64 * in_
        if len(open_heads) > 8:
            head = dice.choice(list(open_heads))
            used, room = open_heads.pop(head)
            written = dice.randint(0, room)
            hand.use(head, written)
            assert vq.get_buf() == (used, written)
    assert vq.num_free == 16 - len(open_heads)


@pytest.mark.parametrize("head", [5, 8, 0xFFFF, 0xFFFF_FFFF])
def test_an_id_that_was_never_offered(make: Make, head: int) -> None:
    vq, hand = make()
    vq.add_buf([(0x1000, 8)], 0, 1, "token")
    vq.kick()
    hand.use(head)
    with pytest.raises(DeviceBroken, match=f"id is {head:#x}, which is not a buffer in flight") as caught:
        vq.get_buf()
    assert caught.value.rule == "2.7.8"


def test_the_same_id_twice(make: Make) -> None:
    vq, hand = make()
    for token in "ab":
        vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()
    hand.use(hand.head(0))
    hand.use(hand.head(0))
    assert vq.get_buf() == ("a", 0)
    with pytest.raises(DeviceBroken, match="not a buffer in flight"):
        vq.get_buf()


def test_the_middle_of_a_chain_is_no_id(make: Make) -> None:
    vq, hand = make()
    vq.add_buf([(0x1000, 8), (0x2000, 8)], 1, 1, "token")
    vq.kick()
    hand.use(hand.descriptor(hand.head(0))[3])
    with pytest.raises(DeviceBroken, match="not a buffer in flight"):
        vq.get_buf()


@pytest.mark.parametrize("indirect", [False, True])
def test_a_length_beyond_the_room(make: Make, indirect: bool) -> None:
    vq, hand = make(indirect=indirect)
    for _ in range(2):
        vq.add_buf([(0x1000, 4096), (0x2000, 8), (0x3000, 1)], 1, 2, "token")
    vq.kick()
    hand.use_next(9)
    assert vq.get_buf() == ("token", 9)
    hand.use_next(10)
    with pytest.raises(DeviceBroken, match=r"used length 0xa of buffer .* room for 0x9") as caught:
        vq.get_buf()
    assert caught.value.rule == "UR2"


@pytest.mark.parametrize("idx", [2, 9, 0x8000, 0xFFFF])
def test_an_index_that_cannot_be(make: Make, idx: int) -> None:
    vq, hand = make()
    vq.add_buf([(0x1000, 8)], 0, 1, "token")
    vq.kick()
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


def test_a_broken_queue_stays_broken(make: Make) -> None:
    calls = []
    vq, hand = make(callback=lambda vq: calls.append(1))
    vq.add_buf([(0x1000, 8)], 0, 1, "token")
    vq.kick()
    hand.use(7)
    with pytest.raises(DeviceBroken):
        vq.get_buf()
    with pytest.raises(DeviceBroken):
        vq.get_buf()
    with pytest.raises(DeviceBroken):
        vq.add_buf([(0x1000, 8)], 0, 1, "token")
    vq.interrupt()
    assert calls == []


# ---- callbacks -----------------------------------------------------------------------------------------------------


def asks(hand: Hand) -> bool:
    """Whether a device that uses one more buffer now would interrupt."""
    if hand.vq.event_idx:
        return hand.used_event == hand.used_idx
    return not hand.avail_flags & 1


both = pytest.mark.parametrize("event_idx", [False, True])


def in_flight(vq: Virtqueue, count: int) -> None:
    for token in range(count):
        vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()


@both
def test_a_callback_that_returns_true_stays_on(make: Make, event_idx: bool) -> None:
    seen = []

    def callback(vq: Virtqueue) -> bool:
        while used := vq.get_buf():
            seen.append(used[0])
        return True

    vq, hand = make(callback=callback, event_idx=event_idx)
    in_flight(vq, 4)
    assert asks(hand)
    for count in (1, 2, 1):
        for _ in range(count):
            hand.use_next()
        vq.interrupt()
        assert asks(hand)
    assert seen == [0, 1, 2, 3]


@both
def test_a_callback_that_returns_false_stays_off_until_restart(make: Make, event_idx: bool) -> None:
    calls = []

    def callback(vq: Virtqueue) -> bool:
        calls.append(vq.get_buf())
        return False

    vq, hand = make(callback=callback, event_idx=event_idx)
    in_flight(vq, 4)
    hand.use_next()
    vq.interrupt()
    assert calls == [(0, 0)]
    assert not asks(hand)
    assert not vq.callbacks_on
    hand.use_next()
    vq.interrupt()  # a device may interrupt although it was not asked (2.7.7.1)
    assert len(calls) == 1
    assert vq.get_buf() == (1, 0)
    assert vq.restart()
    assert asks(hand)
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
    assert not asks(hand)
    vq.interrupt()
    assert calls == [1]
    assert vq.get_buf() == (0, 0)
    assert vq.restart()
    assert asks(hand)


@both
def test_no_wake_up_is_lost_between_the_last_look_and_restart(make: Make, event_idx: bool) -> None:
    """The race that restart's answer is for: the device uses a buffer while callbacks are being turned on."""
    vq, hand = make(callback=lambda vq: False, event_idx=event_idx)
    in_flight(vq, 2)
    hand.use_next()
    vq.interrupt()
    got = [vq.get_buf()]
    assert vq.get_buf() is None  # and now, before restart:
    interrupt_due = asks(hand)
    hand.use_next()
    assert not interrupt_due  # the device had no reason to interrupt, so restart must tell
    assert not vq.restart()
    got.append(vq.get_buf())
    assert [token for token, _ in got if got] == [0, 1]
    assert vq.restart()


def test_used_while_the_callback_runs(make: Make) -> None:
    """With EVENT_IDX an index that was passed is never crossed again: the callback has to be called once more."""
    seen: list[int] = []

    def callback(vq: Virtqueue) -> bool:
        used = vq.get_buf()  # only one, although there are more
        assert used is not None
        seen.append(used[0])
        if len(seen) == 1:
            hand.use_next()
        return True

    vq, hand = make(callback=callback, event_idx=True)
    in_flight(vq, 4)
    hand.use_next()
    vq.interrupt()
    assert seen == [0, 1]
    assert asks(hand)


def test_a_callback_that_leaves_everything_is_called_for_the_next(make: Make) -> None:
    calls = []
    vq, hand = make(callback=lambda vq: calls.append(1) or True, event_idx=True)
    in_flight(vq, 4)
    hand.use_next()
    vq.interrupt()
    assert calls == [1]
    assert asks(hand)
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
    assert asks(hand)


@both
def test_without_a_callback_there_are_no_interrupts(make: Make, event_idx: bool) -> None:
    vq, hand = make(event_idx=event_idx)
    in_flight(vq, 1)
    assert not asks(hand)
    hand.use_next()
    vq.interrupt()
    assert vq.get_buf() == (0, 0)


@both
def test_an_interrupt_without_used_buffers_is_nobodys(make: Make, event_idx: bool) -> None:
    calls = []
    vq, _ = make(callback=lambda vq: calls.append(1) or True, event_idx=event_idx)
    in_flight(vq, 1)
    vq.interrupt()
    assert calls == []


def test_a_spinning_device_is_found_by_the_callback(make: Make) -> None:
    vq, hand = make(callback=keep_on)
    in_flight(vq, 1)
    hand.used_idx = 7
    with pytest.raises(DeviceBroken):
        vq.interrupt()


# ---- the end -------------------------------------------------------------------------------------------------------


def test_shutdown_gives_the_tokens_back(make: Make, memory: PrivateMemory) -> None:
    vq, hand = make(indirect=True)
    for token in "abc":
        vq.add_buf([(0x1000, 8), (0x2000, 8)], 1, 1, token)
    vq.kick()
    hand.use_next()
    assert vq.get_buf() == ("a", 0)
    vq.live = True
    with pytest.raises(RuntimeError, match="while the device still has the queue"):
        vq.shutdown()
    vq.live = False
    with pytest.raises(RuntimeError, match="before shutdown"):
        vq.close()
    assert sorted(vq.shutdown()) == ["b", "c"]
    assert vq.shutdown() == []
    vq.close()
    memory.alloc(memory.size)  # everything is free again, tables, too
