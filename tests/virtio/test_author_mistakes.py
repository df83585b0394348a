"""What the author of a device does wrong is said to be the device's, in one line that names the author's."""

import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from construct import Int8ul, Int32ul, Struct

from vfiouser_virtio.errors import AuthorError, GuestError
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, running
from vfiouser_virtio.virtio import Chain, Device, queue

HERE = Path(__file__).name
Config = record(Struct("limit" / Int32ul, "mode" / Int8ul))
both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "by-message"])


class Served(Device):
    """Does with each chain what a test wants."""

    device_id = 63
    requestq = queue(max_size=8)

    def __init__(self, serve: Callable[[Chain], None] = lambda chain: chain.complete()) -> None:
        super().__init__()
        self.serve = serve

    async def run(self) -> None:
        async for chain in self.requestq:
            self.serve(chain)


def logged(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    ours = [each for each in caplog.records if each.name.startswith("vfiouser_virtio.virtio")]
    return [each.getMessage() for each in ours if each.levelno >= level]


# ---- in run() --------------------------------------------------------------------------------------------------------


def write_too_much(chain: Chain) -> None:
    chain.writable.write(b"12345")


def write_too_much_in_pieces(chain: Chain) -> None:
    chain.writable.write(b"123")
    chain.writable.write(b"45")


def complete_too_much(chain: Chain) -> None:
    chain.writable.write(b"1")
    chain.complete(5)


def complete_too_much_of_what_was_taken(chain: Chain) -> None:
    chain.writable.take(4)
    chain.complete(5)


def complete_less_than_nothing(chain: Chain) -> None:
    chain.complete(-5)


def complete_twice(chain: Chain) -> None:
    chain.complete()
    chain.complete()


def write_after_completing(chain: Chain) -> None:
    chain.complete()
    chain.writable.write(b"1")


def take_after_completing(chain: Chain) -> None:
    chain.complete()
    chain.writable.take_last(1)


@both_memories
@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (write_too_much, "write() of 0x5 bytes, where the driver's buffer has room for 0x4 more"),
        (write_too_much_in_pieces, "write() of 0x2 bytes, where the driver's buffer has room for 0x1 more"),
        (complete_too_much, "where the driver's buffer has room for 0x4 bytes"),
        (complete_too_much_of_what_was_taken, "where the driver's buffer has room for 0x4 bytes"),
        (complete_less_than_nothing, "where the driver's buffer has room for 0x4 bytes"),
        (complete_twice, "completed twice"),
        (write_after_completing, "after the chain was completed"),
        (take_after_completing, "after the chain was completed"),
    ],
)
async def test_what_is_done_to_a_chain(
    serve: Callable[[Chain], None], words: str, private: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(Served(serve), private=private) as driver:
        token = driver.add(0, [], [3, 1])
        driver.kick(0)
        await driver.wait_broken()
        assert "completed" in words or not driver.is_used(0, token)  # the driver is told nothing of stale bytes
        [line] = logged(caplog)
        source = serve.__code__
        last = max(number for *_, number in source.co_lines() if number)
        assert line.startswith("served: a bug in the device, which now needs a reset: ")
        assert f"{HERE}:{last}: " in line
        assert words in line
        assert caplog.records[-1].exc_info is None  # one line
        await driver.reset()
        driver.device.serve = lambda chain: chain.complete(0)  # type: ignore[attr-defined]  # it is a Served
        driver.probe()
        assert (await driver.request([], [4])).written == 0


@both_memories
async def test_all_that_fits_may_be_completed(private: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with running(Served(), private=private) as driver:
        for count in (None, 0, 1, 3, 4):
            driver.device.serve = lambda chain, count=count: chain.complete(count)  # type: ignore[attr-defined]
            assert (await driver.request([b"x"], [3, 1])).written == (count or 0)
    assert not logged(caplog)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda chain: chain.readable.read(5), "a request needs 0x5 more readable bytes, its buffer has 0x1"),
        (lambda chain: chain.writable.take(5), "a request needs 0x5 more writable bytes, its buffer has 0x4"),
        (lambda chain: chain.writable.take_last(5), "a request needs 0x5 more writable bytes, its buffer has 0x4"),
        (lambda chain: chain.parse(Int32ul), "a request needs 0x4 more readable bytes, its buffer has 0x1"),
    ],
)
async def test_what_a_request_lacks_is_the_drivers_fault(
    ask: Callable[[Chain], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The line says who has asked for it: it could be that the driver is right."""
    async with running(Served(ask)) as driver:
        driver.add(0, [b"x"], [3, 1])
        driver.kick(0)
        await driver.wait_broken()
    [line] = logged(caplog)
    where = f" (seen at {re.escape(str(Path(ask.__code__.co_filename).relative_to(Path.cwd())))}:"
    assert line.startswith(f"served: the guest's driver broke virtio, device needs a reset: {words}")
    assert re.search(rf" \(seen at \S*{HERE}:{ask.__code__.co_firstlineno}\)$", line), (line, where)


async def test_a_broken_ring_is_no_line_of_the_authors(caplog: pytest.LogCaptureFixture) -> None:
    async with running(Served()) as driver:
        driver.add_raw(0, [(0xDEAD_0000, 4, 0)])
        driver.kick(0)
        await driver.wait_broken()
    [line] = logged(caplog)
    assert "broke virtio" in line
    assert HERE not in line


async def test_any_other_error_has_its_line_and_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(Served):
        async def run(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.work)

        async def work(self) -> None:
            async for chain in self.requestq:
                dict[int, int]()[chain.head]

    async with running(Buggy()) as driver:
        token = driver.add(0, [], [4])
        driver.kick(0)
        await driver.wait_broken()
    [line] = logged(caplog)
    at = Buggy.work.__code__.co_firstlineno + 2
    assert re.fullmatch(rf"buggy: a bug in the device, which .* reset: \S*{HERE}:{at}: KeyError: {token}", line)
    assert "Traceback" in caplog.text


# ---- the class -------------------------------------------------------------------------------------------------------


class Forgets(Device):
    device_id = 63
    requestq = queue()

    def __init__(self) -> None:
        self.served = 0


class Unknown(Device):
    device_id = 63
    driver_writes = frozenset({"mode", "moed"})

    def __init__(self) -> None:
        super().__init__(config=Config(limit=1))


class NoConfig(Device):
    device_id = 63
    driver_writes = frozenset({"mode"})


class Text(Unknown):
    driver_writes = "mode"  # type: ignore[assignment]  # the mistake


class Reserved(Device):
    device_id = 63

    def __init__(self, features: int = 1 << 34 | 1 << 5 | 1 << 24 | 1 << 42) -> None:
        super().__init__(features=features)


class Replaced(Device):
    device_id = 63

    def __init__(self) -> None:
        super().__init__()
        self.config = Config(limit=1)  # type: ignore[assignment]  # the mistake


class NotAsync(Device):
    device_id = 63

    def run(self) -> None:  # type: ignore[override]  # the mistake
        pass


class Yields(Device):
    device_id = 63

    async def run(self) -> AsyncIterator[None]:  # type: ignore[override] # the mistake
        yield


class AsyncHook(Device):
    device_id = 63

    async def features_ok(self) -> bool:  # type: ignore[override]  # the mistake
        return True


@pytest.mark.parametrize(
    ("device_class", "words"),
    [
        (Forgets, "its __init__ does not call super().__init__()"),
        (Unknown, "driver_writes names moed, which is no field of its configuration (limit, mode)"),
        (NoConfig, "driver_writes names mode, which is no field of its configuration (none: it has no configuration)"),
        (Text, 'driver_writes is the text "mode": write frozenset({"mode"})'),
        (Reserved, "has the reserved bits 24 (NOTIFY_ON_EMPTY), 34 (RING_PACKED), 42: "),
        (lambda: Reserved(-1), "features=-1 is no mask of feature bits"),
        (lambda: Reserved(1 << 128), "has the reserved bit 128: "),
        (Replaced, "give super().__init__() a config="),
        (NotAsync, "run() is not async: write `async def run(self) -> None`"),
        (Yields, "run() has a `yield`"),
        (AsyncHook, "features_ok() is async: hooks are plain functions"),
    ],
)
def test_a_class_that_cannot_be_a_device(device_class: Callable[[], Device], words: str) -> None:
    with pytest.raises(AuthorError) as caught:
        Driver(device_class())
    message = str(caught.value)
    assert words in message
    assert re.match(rf"\S*{HERE}:\d+: \w+: ", message)
    assert "\n" not in message


def test_bits_of_device_types_are_good() -> None:
    Driver(Reserved(1 << 0 | 1 << 23 | 1 << 50 | 1 << 127))


@pytest.mark.parametrize("use", [lambda device: device.requestq, lambda device: device.add_queue(8)])
def test_what_is_not_there_before_super_init(use: Callable[[Device], object]) -> None:
    device = Forgets()
    with pytest.raises(AuthorError, match=r"Forgets: there is no self\.\w+ before its __init__ has called super"):
        use(device)
    with pytest.raises(AttributeError, match="'Forgets' object has no attribute 'other'"):
        _ = device.other  # type: ignore[attr-defined]  # it is not there


def test_a_config_that_is_no_record() -> None:
    with pytest.raises(AuthorError, match=r"config=\{'limit': 1\} is no record"):
        Device(config={"limit": 1})  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize("name", ["queues", "config", "features", "run", "name"])
def test_a_queue_with_the_name_of_something_else(name: str) -> None:
    with pytest.raises(AuthorError, match=f"a queue cannot be called '{name}'"):
        type("Bad", (Device,), {name: queue()})


# ---- hooks and the end of run() --------------------------------------------------------------------------------------


async def test_run_that_returns_nothing_to_wait_for(caplog: pytest.LogCaptureFixture) -> None:
    class Mapped(Served):
        def run(self) -> Callable[[], None]:  # type: ignore[override]  # the mistake
            return lambda: None

    async with running(Mapped()) as driver:
        await driver.wait_broken()
    [line] = logged(caplog)
    assert f"{HERE}:{Mapped.run.__code__.co_firstlineno}: " in line
    assert "run() is not async: it returned <function" in line


async def test_run_may_be_a_plain_function_that_returns_a_coroutine() -> None:
    class Indirect(Served):
        def run(self) -> Coroutine[Any, Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # it wants its own
            return super().run()

    async with running(Indirect()) as driver:
        assert (await driver.request([], [4])).written == 0


def test_features_ok_that_forgets_to_return(caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(Device):
        device_id = 63

        def features_ok(self) -> bool:  # type: ignore[empty-body]  # the mistake
            pass

    driver = Driver(Forgetful())
    with pytest.raises(AssertionError, match="refuses features"):
        driver.probe()
    assert driver.status & NEEDS_RESET
    [line] = logged(caplog)
    assert f"{HERE}:{Forgetful.features_ok.__code__.co_firstlineno}: features_ok() returned None: return True" in line


async def test_hooks_that_raise_break_their_device_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Raising(Served):
        wrong = False

        def features_ok(self) -> bool:
            assert not self.wrong, "features"
            return True

        def reset(self) -> None:
            assert not self.wrong, "reset"

    device = Raising()
    async with running(device) as driver:
        device.wrong = True
        await driver.reset()
        with pytest.raises(AssertionError, match="refuses features"):
            driver.probe()
        assert driver.status & NEEDS_RESET
        device.wrong = False
        await driver.reset()
        driver.probe()
        assert (await driver.request([], [4])).written == 0
    first, second = logged(caplog)
    assert re.search(rf"raising: a bug in the device's reset\(\): \S*{HERE}:\d+: AssertionError: reset", first)
    assert re.search(rf"raising: a bug in the device, .*: \S*{HERE}:\d+: AssertionError: features", second)


async def test_a_run_that_returned_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Returns(Served):
        async def run(self) -> None:
            await anext(self.requestq)

    async with running(Returns()) as driver:
        for _ in range(3):
            driver.add(0, [], [4])
            driver.kick(0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await driver.reset()
            driver.probe()
    [line] = logged(caplog)
    at = Returns.run.__code__.co_firstlineno
    assert re.fullmatch(rf"returns: run\(\) returned \(\S*{HERE}:{at}\): its queues are not served until .*", line)


async def test_a_device_without_queues_may_end_its_run(caplog: pytest.LogCaptureFixture) -> None:
    class Quiet(Device):
        device_id = 63

    async with running(Quiet()):
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert not logged(caplog)


async def test_a_mistake_that_is_caught_is_no_mistake() -> None:
    def careful(chain: Chain) -> None:
        try:
            chain.writable.write(b"x" * 100)
        except AuthorError:
            chain.writable.write(b"x")
        chain.complete()

    async with running(Served(careful)) as driver:
        assert (await driver.request([], [4])).written == 1


def test_author_errors_are_no_guest_errors() -> None:
    assert not issubclass(AuthorError, GuestError)
