"""`Queue`: what an author may do with a queue beside iterating."""

import pytest
import trio
import trio.testing

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio import Chain, Device, DeviceCore, Offer, Queue, Virtqueue, queue, remote


class Batches(Device):
    """Takes what is there as one batch, and answers each request with its place in that."""

    device_id = 63
    requestq = queue(max_size=8)

    async def run(self) -> None:
        while True:
            batch = [await self.requestq.next()]
            while (chain := self.requestq.next_nowait()) is not None:
                batch.append(chain)
            for number, chain in enumerate(batch):
                chain.writable.write(bytes([number]))
                chain.complete()


@pytest.mark.parametrize("private", [False, True])
async def test_what_is_there_is_had_without_waiting(private: bool) -> None:
    async with running(Batches(), private=private) as driver:
        tokens = [driver.add(0, [], [1]) for _ in range(4)]
        driver.kick(0)
        assert [(await driver.wait(0, token)).data for token in tokens] == [[b"\0"], [b"\1"], [b"\2"], [b"\3"]]
        assert driver.queue_interrupts == [1]


async def test_next_nowait_looks_at_the_ring() -> None:
    class Polls(Device):
        device_id = 63
        requestq = queue(max_size=8)

        async def run(self) -> None:
            while (chain := self.requestq.next_nowait()) is None:
                await trio.lowlevel.checkpoint()
            chain.complete(0)

    async with running(Polls(), offer=Offer(poll="off")) as driver:
        token = driver.add(0, [], [1])  # no notification
        assert (await driver.wait(0, token)).written == 0


def test_a_queue_is_used_by_a_device_that_is_served() -> None:
    device = Batches()
    assert (device.requestq.index, device.requestq.size, device.requestq.max_size) == (0, 8, 8)
    with pytest.raises(AuthorError, match="queue 0 of a device that is not being served"):
        device.requestq.next_nowait()


async def test_what_makes_virtqueues_can_be_chosen() -> None:
    """As the deliberately broken devices of the conformance tests do."""

    class Deaf(Virtqueue):
        def kick(self) -> None:
            heard.append(self.index)

    heard: list[int] = []

    async with running(Batches(), virtqueue=Deaf) as driver:
        assert isinstance(driver.core, DeviceCore)
        driver.add(0, [], [1])
        driver.kick(0, force=True)
        assert heard == [0]


def test_an_author_sees_nothing_but_a_small_queue() -> None:
    public = {name for name in dir(Queue) if not name.startswith("_")}
    for_authors = {"bursts", "hold", "index", "max_size", "next", "next_nowait", "pinned", "put_back", "size"} | {
        "abandoned",
        "complete_together",
        "has",
        "replied_in",
        "take_singles",
        "wait",
    }
    of_notifications = {"coalesce", "coalescing", "enabled", "interrupts", "notifications"}
    assert public == for_authors | of_notifications | {"attach", "resize"}


class PutsBack(Device):
    """Reads a request, puts it back, and answers it when it gets it again."""

    device_id = 63
    requestq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []
        self.old: list[Chain] = []

    async def run(self) -> None:
        async for chain in self.requestq:
            self.seen.append(chain.readable.read())
            if len(self.seen) == 1:
                chain.writable.write(b"x")
                self.requestq.put_back(chain)
                self.old.append(chain)
                continue
            chain.writable.write(self.seen[-1])
            chain.complete()


@pytest.mark.parametrize("private", [False, True])
async def test_what_is_put_back_is_the_next_one_again(private: bool) -> None:
    device = PutsBack()
    async with running(device, private=private) as driver:
        tokens = [driver.add(0, [b"%d" % number], [4]) for number in range(4)]
        driver.kick(0)
        answers = [await driver.wait(0, token) for token in tokens]
        assert device.seen == [b"0", b"0", b"1", b"2", b"3"]
        assert [answer.data[0][:1] for answer in answers] == [b"0", b"1", b"2", b"3"]
        assert [answer.written for answer in answers] == [1] * 4
        # The old one is nothing any more.
        [old] = device.old
        assert old.readable.length == 0
        old.writable.write(b"old")
        old.complete()
        assert (await driver.request([b"4"], [4])).written == 1


async def test_what_was_completed_cannot_be_put_back() -> None:
    class Twice(Device):
        device_id = 63
        requestq = queue(max_size=8)

        async def run(self) -> None:
            async for chain in self.requestq:
                chain.complete()
                self.requestq.put_back(chain)

    async with running(Twice()) as driver:
        driver.add(0, [b"x"])
        driver.kick(0)
        await driver.wait_broken()


class Upper(Device):
    """Answers in upper case, burst by burst, and counts what it gets in each."""

    device_id = 63

    def __init__(self) -> None:
        super().__init__()
        self.requestq = self.add_queue(64)
        self.bursts: list[int] = []
        self.pause: trio.Event | None = None
        """After each chain; a checkpoint in any case."""

    async def run(self) -> None:
        async for burst in self.requestq.bursts():
            self.bursts.append(0)
            for chain in burst:
                chain.writable.write(chain.readable.read().upper())
                chain.complete()
                self.bursts[-1] += 1
                self.spend()
                if self.pause is not None:
                    await self.pause.wait()

    def spend(self) -> None:
        """Called for each chain."""


@pytest.fixture
def no_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, no slice of time ends within the test."""
    monkeypatch.setattr("vfiouser_virtio.turns.SLICE", 60.0)
    monkeypatch.setattr("vfiouser_virtio.turns.SHARE", 60.0)


@pytest.mark.usefixtures("no_slices")
async def test_a_burst_is_taken_and_shown_at_once() -> None:
    async with running(Upper()) as driver:
        assert isinstance(driver.device, Upper)
        tokens = [driver.add(0, [b"abc%02d" % number], [8]) for number in range(20)]
        driver.kick(0)
        answers = [await driver.wait(0, token) for token in tokens]
        assert [b"".join(answer.data)[:5] for answer in answers] == [b"ABC%02d" % number for number in range(20)]
        assert driver.device.bursts == [20]
        assert driver.queue_interrupts == [1]


@pytest.mark.usefixtures("no_slices")
async def test_what_was_completed_is_shown_when_the_device_awaits_within_a_burst() -> None:
    async with running(Upper()) as driver:
        assert isinstance(driver.device, Upper)
        driver.device.pause = trio.Event()
        tokens = [driver.add(0, [b"x"], [1]) for _ in range(3)]
        driver.kick(0)
        assert b"".join((await driver.wait(0, tokens[0])).data) == b"X"
        assert driver.device.bursts == [1]
        driver.device.pause.set()
        for token in tokens[1:]:
            await driver.wait(0, token)
        assert driver.device.bursts == [3]


async def test_a_burst_that_is_too_much_for_a_slice_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn then, and the rest comes with the next burst."""
    now = 1000.0
    for module in ("turns", "virtio.virtqueue"):
        monkeypatch.setattr(f"vfiouser_virtio.{module}.perf_counter", lambda: now)

    class Slow(Upper):
        def spend(self) -> None:
            nonlocal now
            now += 10.0

    async with running(Slow()) as driver:
        assert isinstance(driver.device, Slow)
        tokens = [driver.add(0, [b"x"], [1]) for _ in range(5)]
        driver.kick(0)
        for token in tokens:
            await driver.wait(0, token)
        assert driver.device.bursts == [1] * 5


@pytest.mark.usefixtures("no_slices")
async def test_a_burst_without_awaits_is_shown_without_another_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device gives up in its midst, and where what comes later is completed by itself."""

    class AtOnce(Upper):
        async def run(self) -> None:
            async for burst in self.requestq.bursts(at_once=True):
                self.bursts.append(0)
                for chain in burst:
                    chain.complete(0)
                    self.bursts[-1] += 1
                    if self.bursts[-1] == 3:
                        break
                del burst

    async with running(AtOnce()) as driver:
        assert isinstance(driver.device, AtOnce)
        token = trio.lowlevel.current_trio_token()
        monkeypatch.setattr(type(token), "run_sync_soon", lambda *_: pytest.fail("another round"))
        tokens = [driver.add(0, [b"x"], [1]) for _ in range(5)]
        driver.kick(0)
        for each in tokens:
            await driver.wait(0, each)
        assert driver.device.bursts == [3, 2]


class Gathers(Device):
    """Answers requests by three, all at once; what are fewer it puts back until there are more."""

    device_id = 63
    requestq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    async def run(self) -> None:
        while True:
            self.looks += 1
            chains: list[Chain] = []
            while len(chains) < 3 and (chain := self.requestq.next_nowait()) is not None:
                chains.append(chain)
            if len(chains) < 3:
                for chain in reversed(chains):
                    self.requestq.put_back(chain)
                await self.requestq.wait(3)
                continue
            for number, chain in enumerate(chains):
                chain.writable.write(bytes([number]))
            self.requestq.complete_together([(chain, 1) for chain in chains])


@pytest.mark.parametrize("private", [False, True])
async def test_waiting_for_several(private: bool) -> None:
    """The device looks again when there are as many, and not for each."""
    async with running(device := Gathers(), private=private) as driver:
        tokens: list[int] = []
        for _ in range(3):
            assert not any(driver.is_used(0, token) for token in tokens)
            tokens.append(driver.add(0, [], [1]))
            driver.kick(0)
            await trio.testing.wait_all_tasks_blocked(0.02)
        assert [(await driver.wait(0, token)).data for token in tokens] == [[b"\0"], [b"\1"], [b"\2"]]
        assert device.looks <= 4


@pytest.mark.parametrize("private", [False, True])
async def test_completed_together_is_shown_together(private: bool) -> None:
    async with running(Gathers(), private=private, features=0) as driver:
        for _ in range(3):
            driver.add(0, [], [1])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert driver.rings[0].used_idx == 3
        assert driver.queue_interrupts == [1]


async def test_to_complete_together_what_was_completed_is_a_mistake() -> None:
    mistakes: list[str] = []

    class Twice(Device):
        device_id = 63
        requestq = queue(max_size=8)

        async def run(self) -> None:
            chain = await self.requestq.next()
            self.requestq.complete_together([(chain, 0)])
            try:
                self.requestq.complete_together([(chain, 0)])
            except AuthorError as error:
                mistakes.append(str(error))
            await trio.sleep_forever()

    async with running(Twice()) as driver:
        await driver.request([b"x"])
    assert mistakes == ["chain 0x0 completed twice"]


class KeepsAll(Device):
    """Completes what it was given when it is told, all at once, and writes nothing."""

    device_id = 63
    requestq = queue(max_size=64)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []

    async def run(self) -> None:
        async for chain in self.requestq:
            self.kept.append(chain)


async def test_others_have_their_turns_between_chains_of_which_nothing_is_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 chains of 1023 buffers each, in memory that takes messages, held up all devices for 40 ms."""
    device = KeepsAll()
    async with running(device, private=True) as driver:
        tokens = [driver.add(0, [], [1]) for _ in range(40)]
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        assert len(device.kept) == 40
        looks = 0

        def clock() -> float:  # each look at it says that it is time
            nonlocal looks
            looks += 1
            return float("inf")

        monkeypatch.setattr(remote, "perf_counter", clock)
        for chain in device.kept:
            chain.complete(0)
        for token in tokens:
            assert (await driver.wait(0, token)).written == 0
        assert looks >= 40
