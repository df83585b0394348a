"""Ways through the code stay short: files that run between a cause and its effect, and callbacks on the way.

The server runs in a thread of its own, so that only its side is seen. A file counts when a line of it runs; a task that
is merely resumed to hand its resumption on does not. A callback is a function whose caller does not have its name:
something that was stored before, for which a reader has to search. docs/architecture.md has the ways in words.
"""

import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar
from unittest import mock

import pytest
import trio
from support.command import environment

import vfiouser_virtio
from vfiouser_virtio import eventfds
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.guest import bound_pci
from vfiouser_virtio.serving.serve import serve
from vfiouser_virtio.transports.pci import VIRTIO_BAR, VirtioPci
from vfiouser_virtio.vfio_user import Client, connect
from vfiouser_virtio.vfio_user.server.dispatch import dispatch
from vfiouser_virtio.virtio import Device, Offer
from vfiouser_virtio.vring import RingFeatures, SplitRing
from vfiouser_virtio.vring.descriptors import WRITE, make_chain

MOST_FILES_OF_A_KICK = 16
MOST_CALLBACKS_OF_A_KICK = 3
MOST_FILES_OF_A_MAPPING = 8
MOST_FILES_OF_AN_OPTION = 7

T = TypeVar("T")

PACKAGE = f"{Path(vfiouser_virtio.__file__).parent}{os.sep}"
OPTION_WAY = Path(__file__).parent / "support" / "option_way.py"
DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
PATIENCE = 60.0  # seconds
REQUESTS = 5
"""What else a server does now and then (looking for a driver that never notifies) does not come in each of them."""

_COMPREHENSION = re.compile("<(list|set|dict)comp>|<genexpr>|__.*__")


@dataclass
class Way:
    """What runs in one thread, in the order in which it comes, while ``recording``."""

    recording: bool = False
    files: dict[str, None] = field(default_factory=dict)
    callbacks: dict[str, None] = field(default_factory=dict)
    begin: CodeType | None = None
    end: CodeType | None = None

    def start(self, *, begin: Callable[..., object] | None = None, end: Callable[..., object] | None = None) -> None:
        """Record from the call of ``begin``, or at once, until ``end`` returns."""
        self.files, self.callbacks = {}, {}
        self.begin = None if begin is None else begin.__code__
        self.end = None if end is None else end.__code__
        self.recording = begin is None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """In the block this thread is."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)

    def _called(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if code is self.begin:
            self.recording = True
        if not self.recording or event != "call" or not code.co_filename.startswith(PACKAGE):
            return None
        if is_callback(frame):
            assert frame.f_back is not None
            self.callbacks[f"{name_of(frame.f_back.f_code)} calls {name_of(code)}"] = None
        return self._line

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and self.recording:
            self.files[frame.f_code.co_filename.removeprefix(PACKAGE)] = None
        elif event == "return" and frame.f_code is self.end:
            self.recording = False
        return self._line


def name_of(code: CodeType) -> str:
    return f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname}"


def is_callback(frame: FrameType) -> bool:
    """Whether a function is being called, not resumed, by one that does not name it."""
    code, caller = frame.f_code, frame.f_back
    if code.co_code[frame.f_lasti + 1] & 3 or code.co_flags & inspect.CO_GENERATOR:
        return False  # it goes on; or somebody iterates over what another has called
    if caller is None or not caller.f_code.co_filename.startswith(PACKAGE):
        return not code.co_flags & inspect.CO_COROUTINE  # a task that begins is none
    if _COMPREHENSION.fullmatch(code.co_name):
        return False
    return not re.search(rf"\b{re.escape(code.co_name)}\b", inspect.getsource(caller.f_code))


class Server:
    """A device on a socket, in a thread that is followed."""

    def __init__(self, device: Device, path: Path) -> None:
        # A busy machine can be late with a first notification, so that the driver seems to send none, and is polled.
        self.function = VirtioPci(device, name="device", offer=Offer(poll="off"))
        self.way = Way()
        self._path = path
        self._ready = threading.Event()

    async def run(self) -> None:
        await trio.to_thread.run_sync(self._run)

    async def ready(self) -> None:
        await trio.to_thread.run_sync(self._ready.wait, PATIENCE)
        assert self._ready.is_set()

    async def call(self, function: Callable[[], T]) -> T:
        """What it returns in the server's thread."""
        return await trio.to_thread.run_sync(partial(trio.from_thread.run_sync, function, trio_token=self._token))

    def _run(self) -> None:
        with self.way.followed():
            trio.run(self._serve)

    async def _serve(self) -> None:
        self._token, self.stop = trio.lowlevel.current_trio_token(), trio.Event()
        async with serve(self.function, path=self._path):
            self._ready.set()
            await self.stop.wait()


@asynccontextmanager
async def served(device: Device, folder: Path) -> AsyncIterator[Server]:
    server = Server(device, folder / "device.sock")
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            await server.ready()
            try:
                yield server
            finally:
                with trio.CancelScope(shield=True):
                    await server.call(server.stop.set)


async def write_eventfds(client: Client) -> Callable[[int, int, int, int], None]:
    """What notifies queues as QEMU does under KVM: not by a message, but by an eventfd for each."""
    by_offset = {each.offset: each.fd for each in await client.io_fds(VIRTIO_BAR)}

    def post(bar: int, offset: int, _size: int, _value: int) -> None:
        assert bar == VIRTIO_BAR
        os.eventfd_write(by_offset[offset], 1)

    return post


Request = Callable[[Any], Awaitable[object]]


@pytest.mark.parametrize("by_eventfd", [False, True], ids=["message", "eventfd"])
@pytest.mark.parametrize(
    ("device", "request_", "passes"),
    [
        pytest.param(Rng, lambda driver: driver.read(16), ["devices/rng.py"], id="rng"),
        pytest.param(
            lambda: Blk(size=1 << 20),
            lambda driver: driver.read(0, 8),
            ["devices/blk_requests.py", "backends/ram.py"],
            id="blk",
        ),
    ],
)
async def test_a_kick_becomes_a_read_and_its_interrupt(
    device: Callable[[], Device], request_: Request, passes: list[str], by_eventfd: bool, tmp_path: Path
) -> None:
    async with served(device(), tmp_path) as server:
        with SharedMemory(1 << 20) as memory:
            async with (
                connect(tmp_path / "device.sock", memory=[memory]) as client,
                bound_pci(client) as found,
            ):
                post = await write_eventfds(client) if by_eventfd else client.bar_post
                ways: list[Way] = []
                with mock.patch.object(client, "bar_post", post):
                    await request_(found.driver_data)
                    for _ in range(REQUESTS):
                        # A device that still looks at its ring would find the buffer without a kick.
                        while not server.function.core.queues[0].waiters:
                            await trio.sleep(0.001)
                        server.way.start(end=eventfds.signal)
                        await request_(found.driver_data)
                        ways.append(Way(files=server.way.files, callbacks=server.way.callbacks))
    # It is the way that is meant: from the kick to the device, and to the interrupt. The device looks at its ring for
    # other reasons, too, and may then find a buffer before its kick.
    begin = ["eventfd_watch.py"] if by_eventfd else ["vfio_user/server/session.py", "pci/function.py"]
    ways = [way for way in ways if all(file in way.files for file in begin)]
    assert ways, f"no buffer was found by its kick ({begin})"
    files = [file for file in ways[-1].files if all(file in way.files for way in ways)]
    callbacks = [each for each in ways[-1].callbacks if all(each in way.callbacks for way in ways)]
    for file in [*begin, *passes, "transports/pci.py", "eventfds.py"]:
        assert file in files, f"{file} is not in {files}"
    assert len(files) <= MOST_FILES_OF_A_KICK, listing(files)
    assert_documented(files)
    assert len(callbacks) <= MOST_CALLBACKS_OF_A_KICK, listing(callbacks)


async def test_a_mapping_becomes_a_segment(tmp_path: Path) -> None:
    address = 1 << 40
    async with served(Rng(), tmp_path) as server:
        with SharedMemory(1 << 20) as memory, SharedMemory(1 << 20, address=address) as another:
            async with connect(tmp_path / "device.sock", memory=[memory]) as client:
                memory_of_device = server.function.memory
                ring = SplitRing(4, memory_of_device, RingFeatures())

                def look_up() -> list[memoryview]:
                    """What a ring does for a buffer, and a device for its segment."""
                    server.way.recording = True
                    segments = make_chain(ring, memory_of_device, 0, [(address, 64, WRITE, 0)]).writable.take(64)
                    server.way.recording = False
                    return segments

                # How a message comes from the socket to its handler is another way: that of all messages.
                server.way.start(begin=dispatch, end=dispatch)
                await client.map_memory(another)
                [segment] = await server.call(look_up)
                segment[:5] = b"hello"
                assert another.read(address, 5) == b"hello"
    files = list(server.way.files)
    for file in ("vfio_user/server/dispatch.py", "memory.py", "vring/chain.py"):
        assert file in files, f"{file} is not in {files}"
    assert len(files) <= MOST_FILES_OF_A_MAPPING, listing(files)
    assert_documented(files)


def test_an_option_becomes_an_argument(tmp_path: Path) -> None:
    """Files whose functions are given it: as text, in what describes the device, or in how that is set up."""
    word = "a-serial-number-that-is-too-long"
    command = ["serve", "--device", f"blk,size=1M,serial={word}", "--socket", str(tmp_path / "s")]
    run = subprocess.run(
        [sys.executable, OPTION_WAY, word, *command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert run.returncode != 0
    assert f"'{word}' is longer than 20 bytes" in run.stderr  # it has come to its constructor
    files = [*run.stdout.split(), "devices/blk.py"]
    for file in ("cli/__init__.py", "serving/device_specs.py", "serving/options.py"):
        assert file in files, f"{file} is not in {files}"
    assert len(files) <= MOST_FILES_OF_AN_OPTION, listing(files)
    assert_documented(files)


def assert_documented(files: list[str]) -> None:
    words = set(re.findall(r"[\w/]+", DOCUMENT.read_text(encoding="utf-8")))
    for file in files:
        assert file.startswith("devices/") or file.removesuffix(".py") in words, f"{DOCUMENT.name} does not say {file}"


def listing(names: list[str]) -> str:
    return "\n".join([f"{len(names)} on the way:", *names])
