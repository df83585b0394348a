"""Notifications of the packed ring, and the ring in memory that is reached by messages (virtio 1.4, 2.8.7, 2.8.10)."""

import pytest
from support.packed_side import DATA, DEVICE, RAM, WRAP, WRITE, Side

from vfiouser_virtio.protocols.virtio.ring import RingEventFlags


@pytest.fixture
def side() -> Side:
    return Side()


# ---- notifications ---------------------------------------------------------------------------------------------------


def complete(side: Side, count: int) -> bool:
    """As many buffers of one descriptor; whether an interrupt is due."""
    for number in range(count):
        side.offer(number, (DATA, 1, WRITE))
    for chain in side.ring.pop(64):
        chain.complete(1)
    return side.ring.publish()


@pytest.mark.parametrize("event_idx", [False, True])
def test_flags_suppress_interrupts(event_idx: bool) -> None:
    side = Side(event_idx=event_idx)
    assert complete(side, 1)
    side.wish(RingEventFlags.DISABLE)
    assert not complete(side, 1)
    side.wish(RingEventFlags.ENABLE)
    assert complete(side, 1)
    side.wish(3)  # reserved: better an interrupt too many
    assert complete(side, 1)


def test_desc_means_nothing_without_event_idx(side: Side) -> None:
    side.wish(RingEventFlags.DESC, 7)
    assert complete(side, 1)


def test_interrupts_when_the_descriptor_is_passed() -> None:
    side = Side(5, event_idx=True)
    side.wish(RingEventFlags.DESC, 0)
    assert complete(side, 1)  # 0 is used
    assert not complete(side, 1)
    side.wish(RingEventFlags.DESC, 4)
    assert not complete(side, 2)
    assert complete(side, 1)  # 4
    side.wish(RingEventFlags.DESC, 0, wrap=True)  # of the lap before: long passed
    assert not complete(side, 1)  # 0 of the second lap
    side.wish(RingEventFlags.DESC, 3, wrap=False)
    assert complete(side, 4)  # 1 to 4
    side.wish(RingEventFlags.DESC, 4, wrap=True)
    assert complete(side, 5)
    side.wish(RingEventFlags.DESC, 0x7FFF)  # no such descriptor
    complete(side, 5)


def test_what_was_suppressed_is_not_made_up_for() -> None:
    side = Side(8, event_idx=True)
    side.wish(RingEventFlags.DISABLE)
    assert not complete(side, 3)
    side.wish(RingEventFlags.DESC, 1)  # passed while they were disabled: the driver looks after it has asked
    assert not complete(side, 1)
    side.wish(RingEventFlags.DESC, 4)
    assert complete(side, 1)


def test_how_we_ask_for_notifications_without_event_idx(side: Side) -> None:
    side.ring.suppress_notifications()
    assert side.get(DEVICE, "HH")[1] == RingEventFlags.DISABLE
    assert side.ring.request_notification() is False
    assert side.get(DEVICE, "HH")[1] == RingEventFlags.ENABLE
    side.offer(0, (DATA, 1, WRITE))
    assert side.ring.request_notification() is True


def test_how_we_ask_for_notifications_with_event_idx() -> None:
    side = Side(3, event_idx=True)
    side.ring.suppress_notifications()
    assert side.get(DEVICE, "HH")[1] == RingEventFlags.DISABLE
    for turn in range(7):
        assert side.ring.request_notification() is False
        wrap = turn // 3 % 2 == 0
        assert side.get(DEVICE, "HH") == (turn % 3 | WRAP * wrap, RingEventFlags.DESC)
        side.offer(turn, (DATA, 1, WRITE))
        assert side.ring.request_notification() is True
        side.pop().complete(1)
        side.ring.publish()
        assert side.used() == (turn, 1)


@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_is_available_while_all_are_in_flight(event_idx: bool) -> None:
    side = Side(2, event_idx=event_idx)
    for number in range(2):
        side.offer(number, (DATA, 1, WRITE))
    assert len(side.ring.pop(64)) == 2
    assert not side.ring.has_available()
    assert not side.ring.request_notification()


def test_data_of_notifications(side: Side) -> None:
    assert side.ring.may_be_next(0 | WRAP)
    assert side.ring.may_be_next(7)
    assert not side.ring.may_be_next(8 | WRAP)


# ---- in memory that is reached by messages ---------------------------------------------------------------------------


def copies(side: Side) -> list[bytearray]:
    return [bytearray(side.ram[area.address - RAM :][: area.length]) for area in side.areas]


def test_by_message() -> None:
    """The owner keeps copies: it fetches what `fetch_order` says, and sends what `store_used` and the words say."""
    side = Side(5, event_idx=True)
    ring = side.ring
    ring.bind(*(memoryview(copy) for copy in copies(side)))

    def fetch() -> None:
        for part in ring.fetch_order:
            ring.parts[part][:] = copies(side)[part]

    def take(part: int, offset: int, length: int) -> tuple[int, bytes]:
        return side.areas[part].address + offset, bytes(ring.parts[part][offset : offset + length])

    def send(address: int, data: bytes) -> None:
        side.put(address, f"{len(data)}s", data)

    for turn in range(12):
        fetch()
        assert not ring.has_available()
        assert not ring.request_notification()
        send(*take(*ring.notification_word))
        assert side.get(DEVICE, "HH")[1] == RingEventFlags.DESC
        side.wish(RingEventFlags.DISABLE)
        side.offer(10, (DATA, 4, WRITE))
        side.offer(11, (DATA + 4, 4, 0), (DATA + 8, 4, WRITE))
        side.offer(12, (DATA + 12, 4, WRITE))
        fetch()
        chains = ring.pop(64)
        assert [chain.head for chain in chains] == [10, 11, 12]
        written = turn % 4 + 1
        for chain in chains[::-1]:
            chain.complete(written)
        assert ring.unpublished_chains == chains[::-1]
        messages = [take(*place) for place in ring.store_used(2)]
        fetch()  # before they are sent: the ring is looked at once more
        assert not ring.has_available()
        # Nothing shows before the last message, and then everything.
        for message in messages:
            assert side.used() is None
            send(*message)
        assert [side.used(1), side.used(2)] == [(12, written), (11, written)]
        for place in ring.store_used():
            send(*take(*place))
        assert side.used(1) == (10, written)
        assert ring.interrupt_word == (1, 0, 4)
        ring.parts[1][:] = copies(side)[1]
        assert not ring.interrupt_due()
