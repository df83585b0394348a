"""The 2007 interface over rings of both kinds, with only a device's hand at the other end."""

import random
from collections import deque

import pytest
from support.driver_queue import INDIRECT, NEXT, WRITE, Make, a_buffer, keep_on

from vfiouser_virtio.guest import DeviceBroken, QueueFull
from vfiouser_virtio.vfio_user import PrivateMemory

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
        shown: deque[int] = deque()
        token_of: dict[int, int] = {}
        expected: list[tuple[int, int]] = []
        token, rounds = 0, 70_000 if wraps and size == 16 else 1000
        while token < rounds:
            count = dice.randint(1, min(3, size))
            if dice.random() < 0.6 and (1 if indirect else count) <= vq.num_free:
                out = dice.randint(0, count)
                vq.add_buf([(0x1000, 64)] * count, out, count - out, token)
                rooms[token] = 64 * (count - out)
                shown.append(token)
                token += 1
                continue
            vq.kick()
            token_of.update((buffer, shown.popleft()) for buffer in hand.take_all())
            if hand.taken:
                many = dice.randint(1, len(hand.taken)) if in_order else 1
                which = 0 if in_order else dice.randrange(len(hand.taken))
                batch, hand.taken[which : which + many] = hand.taken[which : which + many], []
                tokens = [token_of.pop(buffer) for buffer in batch]
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
