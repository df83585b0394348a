"""Queues that are looked at without a notification: when, for how long, and that it ends (virtio 1.4, 2.7.10).

A long file, since its tests share a clock and a driver that are made for polling alone.
"""

import os
import threading
import time

import pytest
import trio
import trio.testing

from vfiouser_virtio import trio_epoll
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.guest.drivers import Disk
from vfiouser_virtio.guest.pci_transport import PciTransport
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.testing.carriers import Carrier, Interrupts, carry
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Device, Offer, Queue, Stop, polling, queue
from vfiouser_virtio.virtio.polling import Polling

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "by-message"])
CONTENT = os.urandom(1 << 20)


class Echo(Device):
    device_id = 63
    requestq = queue(max_size=8)
    otherq = queue(max_size=8)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.queues:
                nursery.start_soon(self.serve, each)

    async def serve(self, each: Queue) -> None:
        async for chain in each:
            chain.writable.write(chain.readable.read())
            chain.complete()


class Clock:
    """What `polling` takes for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, look: float = 0.0) -> None:
        """``look``: how long each look at it takes."""
        self.now = 1000.0
        self._look = look
        monkeypatch.setattr(polling, "perf_counter", self._seen)

    def _seen(self) -> float:
        self.now += self._look
        return self.now

    def gap(self, subject: Polling, seconds: float) -> bool:
        """The ring is empty for so long; whether it was worth polling."""
        spins = subject.should_spin()
        self.now += seconds
        subject.filled()
        return spins


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return Clock(monkeypatch)


def patient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Polling takes so long before it gives up, however busy this machine is."""
    monkeypatch.setattr(polling, "BUDGET", seconds)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def count_kicks(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The queues that the driver notifies, as it does so."""
    kicks: list[int] = []
    notify = driver.core.notify_queue

    def counted(index: int, next_available: int | None = None) -> None:
        kicks.append(index)
        notify(index, next_available)

    monkeypatch.setattr(driver.core, "notify_queue", counted)
    return kicks


# ---- when ------------------------------------------------------------------------------------------------------------


def test_only_a_driver_that_is_quick_is_polled(clock: Clock) -> None:
    subject = Polling("adaptive")
    quick = polling.BUDGET / 4
    assert not clock.gap(subject, 60)
    learnt = [clock.gap(subject, quick) for _ in range(20)]
    assert learnt == sorted(learnt)
    assert learnt.index(True) in range(2, 10)
    assert all(clock.gap(subject, 60) for _ in range(2))  # nobody can know; it may be an accident
    assert not clock.gap(subject, quick)
    # In pairs: every other gap is long.
    assert not any([clock.gap(subject, gap) for gap in [quick, 60] * 20][10:])


def test_a_driver_that_is_quick_only_while_it_is_looked_at_is_polled(clock: Clock) -> None:
    """What a notification takes by itself had it waited for, and so notified of, for good."""
    subject = Polling("adaptive")
    looked_at, notified = polling.BUDGET / 2, polling.BUDGET + polling.NOTIFICATION / 2
    learnt = []
    for _ in range(40):
        spins = subject.should_spin()
        clock.now += looked_at if spins else notified
        subject.filled()
        learnt.append(spins)
    assert learnt == sorted(learnt)
    assert learnt.index(True) in range(2, 30)


def test_a_device_that_may_not_never_does(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    off = Polling("off")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    alone = Polling("adaptive")
    assert not any(clock.gap(subject, 0) for subject in (off, alone) for _ in range(20))
    assert Polling("on").should_spin()


def test_what_was_polled_in_vain_is_not_polled_again(clock: Clock) -> None:
    """Woken up by a notification without a reason, for example."""
    subject = Polling("adaptive")
    for _ in range(20):
        clock.gap(subject, 0)
    assert subject.should_spin()
    clock.now += 2 * polling.BUDGET
    assert not subject.should_spin()


def talk(clock: Clock, subject: Polling, *, others: float, reply: float) -> tuple[bool, bool]:
    """The driver sends, is given an answer of ``others``, and replies; whether each of the two waits was worth it."""
    sent = subject.should_spin()
    clock.now += others
    given = subject.expect()
    assert subject.should_spin() == given
    clock.now += reply
    subject.filled()
    return sent, given


def test_a_reply_is_looked_for_however_long_the_others_take(clock: Clock) -> None:
    subject = Polling("adaptive")
    slow, quick = 3 * polling.BUDGET, polling.BUDGET / 4
    learnt = [talk(clock, subject, others=slow, reply=quick) for _ in range(20)]
    assert not any(sent for sent, _ in learnt)
    replies = [given for _, given in learnt]
    assert replies == sorted(replies)
    assert replies.index(True) in range(2, 10)
    slowly = [talk(clock, subject, others=quick, reply=slow) for _ in range(10)]
    assert not any(any(each) for each in slowly[5:])


def test_a_driver_that_only_receives_is_not_waited_for(clock: Clock) -> None:
    subject = Polling("adaptive")
    for _ in range(20):
        talk(clock, subject, others=0, reply=0)
    subject.should_spin()
    given = []
    for _ in range(20):
        clock.now += polling.BUDGET / 10
        given.append(subject.expect())
    assert given == sorted(given, reverse=True)
    assert given.index(False) in range(3, 12)
    assert not subject.should_spin()


def test_nothing_is_expected_where_nothing_is_polled(clock: Clock) -> None:
    subject = Polling("off")
    for _ in range(20):
        assert talk(clock, subject, others=0, reply=0) == (False, False)


def others_take(clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Other programs have the CPU for so long when it is left to them."""

    def sched_yield() -> None:
        clock.now += seconds

    monkeypatch.setattr(os, "sched_yield", sched_yield)


async def find_at_second_look(subject: Polling) -> None:
    assert subject.should_spin()
    looks = iter([False, True])
    await subject.spin(lambda: next(looks))
    subject.filled()


async def test_polling_rests_when_others_need_the_cpu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Polling("adaptive")
    for _ in range(20):
        clock.gap(subject, 0)
    others_take(clock, monkeypatch, polling.BUDGET / 10)
    assert subject.should_spin()
    await subject.spin(lambda: False)  # for its whole time
    subject.filled()
    for _ in range(20):
        clock.gap(subject, 0)
    others_take(clock, monkeypatch, 3e-3)
    await find_at_second_look(subject)
    for _ in range(20):
        assert not clock.gap(subject, 0.001)
    clock.now += 20 * 0.003
    for _ in range(20):
        clock.gap(subject, 0)
    assert clock.gap(subject, 0)


async def test_a_short_loss_now_and_then_is_no_reason_to_rest(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Polling("adaptive")
    for _ in range(20):
        clock.gap(subject, 0)
    others_take(clock, monkeypatch, 0.9e-3)
    for pause in (0.02, 0.02, 0.02, 0.001, 0):
        await find_at_second_look(subject)
        clock.now += pause
        for _ in range(10):
            clock.gap(subject, 0)  # it is no slow driver
        assert clock.gap(subject, 0) == bool(pause)  # the second in so short a time


async def test_what_our_own_tasks_take_is_not_lost(clock: Clock) -> None:
    subject = Polling("adaptive")
    for _ in range(20):
        clock.gap(subject, 0)

    worked = False

    async def work() -> None:
        nonlocal worked
        clock.now += 3e-3  # or Python's garbage collector does
        worked = True

    assert subject.should_spin()
    await subject.spin(lambda: True)  # it looks for trio's epoll once
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await subject.spin(lambda: worked, lambda: 1)
    subject.filled()
    assert subject.should_spin()


@pytest.mark.usefixtures("clock")  # which stands still
async def test_a_look_is_no_round_of_trio() -> None:
    looks, rounds = iter(range(1000)), 0

    class Rounds(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            nonlocal rounds
            rounds += 1

    subject = Polling("on")
    assert subject.should_spin()
    await subject.spin(lambda: True)  # it looks for trio's epoll once
    trio.lowlevel.add_instrument(Rounds())
    assert not await subject.spin(lambda: next(looks) == 999)
    assert rounds == 0


@pytest.mark.usefixtures("clock")
async def test_between_two_looks_there_is_one_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    is_there = trio_epoll.TrioInput.is_there

    def counted(subject: trio_epoll.TrioInput) -> bool:
        calls.append("poll")
        return is_there(subject)

    monkeypatch.setattr(os, "sched_yield", lambda: calls.append("yield"))
    monkeypatch.setattr(trio_epoll.TrioInput, "is_there", counted)
    looks = iter(range(1000))
    subject = Polling("on")
    assert subject.should_spin()
    await subject.spin(lambda: next(looks) == 99)
    assert calls == ["yield", "poll"] * 49 + ["yield"]


@pytest.mark.usefixtures("clock")
async def test_input_for_another_task_is_no_later_for_the_looks() -> None:
    subject = Polling("on")
    assert subject.should_spin()
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        received = b""

        async def receive() -> None:
            nonlocal received
            received = await ours.recv(1)

        looks = 0

        def news() -> bool:
            nonlocal looks
            looks += 1
            if looks == 100:
                os.write(theirs.fileno(), b"x")
            return bool(received)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            assert await subject.spin(news)
    assert 100 < looks < 110


@pytest.mark.usefixtures("clock")
async def test_what_a_device_at_work_has_started_runs_before_the_looks() -> None:
    subject = Polling("on")
    assert subject.should_spin()
    started = trio.Event()

    async def work() -> None:
        await trio.lowlevel.checkpoint()
        started.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        assert await subject.spin(started.is_set, outstanding=lambda: 1) or started.is_set()


class Sleeps:
    """Counts how often, and for how long, `polling` sleeps until trio has input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: list[float] = []
        wait = trio_epoll.TrioInput.wait

        def counted(subject: trio_epoll.TrioInput, seconds: float) -> bool:
            self.of.append(seconds)
            return wait(subject, seconds)

        monkeypatch.setattr(trio_epoll.TrioInput, "wait", counted)


@pytest.mark.parametrize("depth", [1, 3])
async def test_what_is_under_way_is_not_polled_for_in_vain(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that has as many requests under way as ever waits for one of them, and is not looked for meanwhile."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(polling, "BUDGET_ON", 1000.0)
    sleeps = Sleeps(monkeypatch)
    subject = Polling("on")
    outstanding, looks, ended = depth, 0, trio.Event()

    async def work() -> None:
        nonlocal outstanding
        await trio.to_thread.run_sync(time.sleep, 0.1)
        outstanding = 0
        ended.set()

    def news() -> bool:
        nonlocal looks
        looks += 1
        return ended.is_set()

    for _ in range(5):
        subject.should_spin()
        await subject.spin(lambda: True, lambda: depth)
        subject.filled()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        assert subject.should_spin()
        await subject.spin(news, lambda: outstanding)
    assert sleeps.of
    assert set(sleeps.of) == {polling.NAP}
    assert looks <= 2 * len(sleeps.of)  # without the sleep there are thousands


@pytest.mark.usefixtures("clock")
async def test_a_request_without_a_task_ends_without_a_round_of_trio() -> None:
    """As a write by io_uring does, whose ring another task of trio waits for as well."""
    subject = Polling("on")
    for _ in range(5):
        subject.should_spin()
        await subject.spin(lambda: True, lambda: 1)
        subject.filled()
    outstanding = rounds = 0
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    class Rounds(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            nonlocal rounds
            rounds += 1

    def reap() -> bool:
        nonlocal outstanding
        outstanding -= os.eventfd_read(fd)
        return True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.wait_readable, fd)
        await trio.testing.wait_all_tasks_blocked()
        outstanding = 1
        assert subject.should_spin()
        trio.lowlevel.add_instrument(Rounds())
        threading.Timer(0.05, os.eventfd_write, [fd, 1]).start()
        assert not await subject.spin(lambda: not outstanding, lambda: outstanding, held=lambda: outstanding, reap=reap)
        assert rounds == 0
        nursery.cancel_scope.cancel()
    os.close(fd)


@pytest.mark.usefixtures("clock")
async def test_a_driver_that_may_send_more_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = Sleeps(monkeypatch)
    subject = Polling("on")
    for _ in range(5):
        subject.should_spin()
        await subject.spin(lambda: True, lambda: 3)
        subject.filled()
    looks = iter(range(1000))
    assert subject.should_spin()
    await subject.spin(lambda: next(looks) == 999, lambda: 2)
    assert sleeps.of == []


@pytest.mark.usefixtures("clock")
async def test_queues_that_are_looked_at_take_turns() -> None:
    looks = [0, 0]

    async def look(number: int) -> None:
        subject = Polling("on")
        assert subject.should_spin()

        def news() -> bool:
            looks[number] += 1
            return min(looks) > 50

        await subject.spin(news)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look, 0)
        nursery.start_soon(look, 1)
    assert abs(looks[0] - looks[1]) <= 2


# ---- adaptive --------------------------------------------------------------------------------------------------------


async def test_a_busy_driver_does_not_notify_and_an_idle_one_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, 1.0)
    async with running(Echo()) as driver:
        kicks = count_kicks(driver, monkeypatch)
        for number in range(100):
            await driver.request([b"%d" % number], [8], queue=number % 2)
        assert len(kicks) < 25
        with trio.fail_after(60):
            await trio.testing.wait_all_tasks_blocked()  # nobody looks any more
        kicks.clear()
        await driver.request([b"last"], [8])
        assert kicks == [0]


class Relay(Device):
    """What comes in the second queue goes to the driver in the first one, whenever the test says so."""

    device_id = 63
    receiveq = queue(max_size=8)
    transmitq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.network = trio.open_memory_channel[bytes](8)

    async def run(self) -> None:
        self.receiveq.replied_in(self.transmitq)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.receive)
            async for chain in self.transmitq:
                chain.complete()

    async def receive(self) -> None:
        async for data in self.network[1]:
            chain = await self.receiveq.next()
            chain.writable.write(data)
            chain.complete()


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_reply_takes_no_notification(monkeypatch: pytest.MonkeyPatch, packed: bool, event_idx: bool) -> None:
    patient(monkeypatch, 1.0)
    device, clock = Relay(), Clock(monkeypatch, look=1e-6)
    async with running(device, offer=Offer(packed=packed, event_idx=event_idx)) as driver:
        kicks = count_kicks(driver, monkeypatch)

        async def ping_pong() -> list[int]:
            clock.now += 60.0  # so long takes whom the driver talks with
            with trio.fail_after(60):
                await trio.testing.wait_all_tasks_blocked()  # the device waits for a notification
            device.network[0].send_nowait(b"ping")
            await driver.request([], [8], queue=0)
            kicks.clear()
            await driver.request([b"pong"], [], queue=1)
            return list(kicks)

        learnt = [await ping_pong() for _ in range(12)]
        assert learnt[0] == [1]
        assert learnt[-4:] == [[]] * 4
        monkeypatch.setattr(driver.core.queues[1].polling, "expect", lambda: False)
        assert await ping_pong() == [1]


class Absorber(Device):
    """Completes what it can in a call, a burst only where it cannot."""

    device_id = 63
    transmitq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.bursts = self.calls = 0

    async def run(self) -> None:
        async for burst in self.transmitq.bursts(at_once=True, at_kick=self.serve):
            self.bursts += 1
            for chain in burst:
                chain.complete()

    def serve(self) -> bool:
        singles = self.transmitq.take_singles(2, writable=False)
        if singles is None:
            return False
        self.calls += 1
        singles.end([0] * len(singles.buffers))
        return True


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_what_is_found_is_served_in_the_call(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    patient(monkeypatch, 1.0)
    device = Absorber()
    Clock(monkeypatch, look=1e-6)
    async with running(device, offer=Offer(packed=packed)) as driver:
        kicks = count_kicks(driver, monkeypatch)
        for _ in range(20):
            await driver.request([b"ping"], [])
        kicks.clear()
        bursts, calls = device.bursts, device.calls
        for _ in range(20):
            await driver.request([b"ping"], [])
        assert (kicks, device.bursts, device.calls) == ([], bursts, calls + 20)
        await driver.request([b"two", b"pieces"], [])  # which is no single
        assert device.bursts == bursts + 1


async def test_off_is_notified_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, 1.0)
    async with running(Echo(), offer=Offer(poll="off")) as driver:
        kicks = count_kicks(driver, monkeypatch)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
            await driver.request([b"x"], [8])
        assert kicks == [0] * 20


async def test_what_is_polled_can_be_reset_and_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, 30.0)
    async with running(Echo(), offer=Offer(suspend=True)) as driver:

        async def until_it_polls() -> None:
            for _ in range(20):
                await driver.request([b"x"], [8])

        await until_it_polls()
        driver.ram.unmap()
        await trio.sleep(0.01)
        driver.ram.map()
        await until_it_polls()
        driver.core.write_status(driver.status & ~DeviceStatus.DRIVER_OK | DeviceStatus.SUSPEND)
        with trio.fail_after(60):
            while driver.status & DeviceStatus.DRIVER_OK:
                await trio.sleep(0.001)
        driver.core.write_status(driver.status | DeviceStatus.DRIVER_OK)
        await until_it_polls()
        with trio.fail_after(60):
            await driver.reset()
        driver.probe()
        await until_it_polls()


# ---- on --------------------------------------------------------------------------------------------------------------

always = Offer(poll="on")


@pytest.mark.parametrize("budget", [30.0, 0.0], ids=["without-rest", "at-times"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("carrier", ["loopback", "socket", "socket-private"])
async def test_a_driver_that_never_notifies(
    carrier: Carrier, packed: bool, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it take an interrupt, over PCI: so is SPDK's driver."""
    monkeypatch.setattr(polling, "BUDGET_ON", budget)
    notified: list[int] = []

    def dropped(_: object, index: int, next_available: int | None = None) -> None:
        notified.append(index)

    for transport in (PciTransport, Loopback):
        monkeypatch.setattr(transport, "notify", dropped)
    device = Blk(backend=RamBackend(len(CONTENT), CONTENT), num_queues=2)
    interrupts: Interrupts | None = None if carrier == "loopback" else "poll"
    async with carry(device, carrier, interrupts=interrupts, offer=Offer(poll="on", packed=packed)) as found:
        disk: Disk = found.driver_data
        with trio.fail_after(60):
            assert await disk.read(0, 2048) == CONTENT
            await disk.write(7, b"\x55" * 512)
            assert await disk.read(6, 3) == CONTENT[6 * 512 : 7 * 512] + b"\x55" * 512 + CONTENT[8 * 512 : 9 * 512]
    if carrier != "socket-private":
        assert len(notified) <= 2  # before the queues were first looked at


@both_memories
async def test_always_is_also_after_a_reset_and_a_change_of_memory(
    private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "BUDGET_ON", 0.0)
    async with running(Echo(), private=private, offer=always) as driver:

        async def is_served() -> None:
            for each in (0, 1):
                token = driver.add(each, [b"abc"], [3])
                assert (await driver.wait(each, token)).data == [b"abc"]

        await is_served()
        driver.ram.unmap()
        token = driver.add(0, [b"late"], [4])
        await trio.sleep(0.05)
        assert not driver.is_used(0, token)
        driver.ram.map()
        assert (await driver.wait(0, token)).data == [b"late"]
        await driver.reset()
        driver.probe()
        await is_served()


async def test_always_ends_with_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one's memory may be another guest's: only its kick, or a reset, makes the queue go on."""
    async with running(Echo(), offer=always) as driver:
        await driver.request([b"x"], [8])
        driver.core.stop(Stop.UNTIL_KICK)
        token = driver.add(0, [b"x"], [8])
        await trio.sleep(0.05)
        assert not driver.is_used(0, token)
        driver.kick(0, force=True)
        await driver.wait(0, token)
