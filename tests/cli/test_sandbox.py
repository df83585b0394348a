"""``serve --sandbox``: devices with each of their back ends at work in it, and what they leave behind.

A long file, since each back end has its own way to show that it works, of a few lines.
"""

import os
import signal
import socket
import termios
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.boot_client import ACK, DISCOVER, MAC, REQUEST, SERVER, dhcp, download, packed, read_dhcp
from support.command import COMMAND, ServeProcess, run_command, serve_process
from support.fake_simulator import fake_simulator
from support.net_namespace import net_namespace
from support.passt import passt_namespace, passt_script
from support.processes import children, is_gone

from vfiouser_virtio.backends.net.pcap_file import packet, section
from vfiouser_virtio.guest import VirtioDevice, bound_pci
from vfiouser_virtio.guest.drivers.balloon import BalloonPages
from vfiouser_virtio.guest.drivers.blk import Disk
from vfiouser_virtio.guest.drivers.console import ConsolePorts
from vfiouser_virtio.guest.drivers.input import InputEvents
from vfiouser_virtio.guest.drivers.net import NetInterface
from vfiouser_virtio.guest.drivers.rng import Entropy
from vfiouser_virtio.guest.function import open_function
from vfiouser_virtio.protocols.pcap import PacketDirection
from vfiouser_virtio.protocols.rtl_bridge import InterruptAction, RtlMessage
from vfiouser_virtio.vfio_user import SharedMemory, connect

SECTORS = 2048
MINE = """\
import pathlib, subprocess
from vfiouser_virtio.virtio import Device, queue

class Curious(Device):
    device_id = 4
    requestq = queue()
    async def run(self):
        for attempt in (lambda: pathlib.Path("/etc/passwd").read_text(), lambda: subprocess.run(["true"])):
            try:
                attempt()
            except OSError as error:
                self.log.error("%s", error.strerror)
        raise RuntimeError("as it is")
"""


@asynccontextmanager
async def driven(path: str) -> AsyncIterator[VirtioDevice]:
    with SharedMemory(16 << 20) as memory:
        async with connect(path, memory=[memory]) as client, bound_pci(client) as device:
            yield device


@asynccontextmanager
async def both(one: str, other: str) -> AsyncIterator[tuple[NetInterface, NetInterface]]:
    async with driven(one) as first, driven(other) as second:
        yield first.driver_data, second.driver_data


async def talk(one: NetInterface, other: NetInterface) -> None:
    """A frame each way, once there is somebody to take it."""
    for sender, receiver in ((one, other), (other, one)):
        frame = b"\xff" * 6 + sender.mac + b"\x88\xb5" + os.urandom(50)
        while True:
            await sender.send(frame)
            with trio.move_on_after(0.1):
                while (await receiver.receive()).data != frame:
                    pass
                break


@asynccontextmanager
async def sandboxed(folder: Path, *devices: str, command: tuple[str, ...] = COMMAND) -> AsyncIterator[ServeProcess]:
    """Served in a sandbox, in one process, which ends well, has nothing to say, and leaves nothing behind."""
    arguments = [word for device in devices for word in ("--device", device)]
    quiet = "--log-level=warning"
    async with serve_process("--sandbox", quiet, *arguments, folder=folder, command=command) as served:
        with trio.fail_after(120):
            yield served
        assert (await served.terminate(), served.log.read_text()) == (0, "")


async def test_disks(tmp_path: Path) -> None:
    ways = ["aio=io_uring", "aio=io_uring,cache=none", "aio=threads,cache=none", "aio=inline"]
    for number in range(len(ways)):
        (tmp_path / f"{number}.img").write_bytes(bytes(SECTORS * 512))
    disks = [f"blk,path={number}.img,{how},logical-block-size=4096" for number, how in enumerate(ways)]
    async with sandboxed(tmp_path, *disks, "blk,size=1M") as served:
        for number, path in enumerate(served.sockets):
            async with driven(path) as device:
                disk: Disk = device.driver_data
                data = os.urandom(256 << 10)
                await disk.write(8, data)
                await disk.flush()
                assert await disk.read(8, 512) == data
                await disk.write_zeroes(8, 256)
                await disk.discard(520, 256)
                assert await disk.read(8, 256) == bytes(256 * 512)
                if number == 0:  # it is made longer
                    os.truncate(tmp_path / f"{number}.img", 2 * SECTORS * 512)
                    while await disk.capacity() != 2 * SECTORS:
                        await trio.sleep(0.01)


async def test_other_devices(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"entropy")
    devices = [
        "rng",
        "rng,source=bytes",
        "console,chardev=unix:console,chardev=pty:terminal,chardev=file:log",
        "balloon",
        "input",
    ]
    async with sandboxed(tmp_path, *devices) as served:
        random, source, console, balloon, keyboard = served.sockets
        async with driven(random) as device:
            entropy: Entropy = device.driver_data
            assert any(await entropy.read(4096))
        async with driven(source) as device:
            entropy = device.driver_data
            assert (await entropy.read(14)) == b"entropyentropy"
        async with driven(console) as device:
            ports: ConsolePorts = device.driver_data
            for number, open_host in enumerate((_connect, _open)):
                port = await ports.wait_port(number)
                await port.open()
                async with trio.lowlevel.FdStream(open_host(tmp_path)) as host:
                    await host.send_all(b"in")
                    assert await port.receive() == b"in"
                    await port.send(b"out")
                    assert await host.receive_some() == b"out"
            port = await ports.wait_port(2)
            await port.open()
            await port.send(b"logged")
        async with driven(balloon) as device:
            pages: BalloonPages = device.driver_data
            page = device.memory.alloc(4096, 4096)
            page.view[:] = b"x" * 4096
            await pages.inflate([page])
            assert not any(page.view)
        async with driven(keyboard) as device:
            events: InputEvents = device.driver_data
            assert (await events.describe()).name
    assert {path.name for path in tmp_path.iterdir()} == {"bytes", "log"}
    assert (tmp_path / "log").read_bytes() == b"logged"


async def test_a_terminal(tmp_path: Path) -> None:
    """A console on standard input has it in the sandbox, and restores its modes in the end."""
    ours, theirs = os.openpty()
    try:
        before = termios.tcgetattr(theirs)
        on_terminal = ("sh", "-c", f'exec setsid --ctty "$@" <{os.ttyname(theirs)}', "sh", *COMMAND)
        async with sandboxed(tmp_path, "console,chardev=stdio", command=on_terminal) as served:
            assert termios.tcgetattr(theirs) != before
            async with driven(served.sockets[0]) as device:
                ports: ConsolePorts = device.driver_data
                port = await ports.wait_port(0)
                os.write(ours, b"typed")
                assert await port.receive() == b"typed"
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def _connect(folder: Path) -> int:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(folder / "console"))
    return sock.detach()


def _open(folder: Path) -> int:
    return os.open(folder / "terminal", os.O_RDWR | os.O_NOCTTY)


async def test_networks(tmp_path: Path) -> None:
    (tmp_path / "tftp").mkdir()
    file = os.urandom(20_000)
    (tmp_path / "tftp" / "kernel").write_bytes(file)
    devices = [
        "net,hub=lan,dump=frames",
        "net,hub=lan",
        "net,netdev=stream,addr.path=stream,server=on",
        "net,netdev=stream,addr.path=stream",
        "net,netdev=dgram,local.path=one,remote.path=two",
        "net,netdev=dgram,local.path=two,remote.path=one",
        f"net,netdev=boot,tftp=tftp,bootfile=kernel,mac={MAC.hex(':')}",
        "net,pcap=capture",
    ]
    replayed = b"\xff" * 6 + MAC + b"\x88\xb5" + os.urandom(50)
    (tmp_path / "capture").write_bytes(
        section("test", "net0", 1 << 16) + packet(replayed, len(replayed), 0, PacketDirection.INBOUND)
    )
    async with sandboxed(tmp_path, *devices) as served:
        sockets = served.sockets
        for one, other in ((0, 1), (2, 3), (4, 5)):
            async with both(sockets[one], sockets[other]) as guests:
                await talk(*guests)
        async with driven(sockets[6]) as device:
            guest: NetInterface = device.driver_data

            async def receive() -> bytes:
                return (await guest.receive()).data

            await guest.send(dhcp(DISCOVER))
            offer = read_dhcp(await receive())
            await guest.send(dhcp(REQUEST, {50: packed(offer.yiaddr), 54: packed(SERVER)}))
            assert read_dhcp(await receive()).type == ACK
            data, _ = await download(guest.post, receive, "kernel", {})
            assert data == file
        async with driven(sockets[7]) as device:
            assert (await device.driver_data.receive()).data == replayed
    assert {path.name for path in tmp_path.iterdir()} == {"tftp", "frames", "capture"}
    assert (tmp_path / "frames").stat().st_size > 200


@pytest.mark.once
async def test_a_tap_interface(tmp_path: Path) -> None:
    with net_namespace() as namespace:
        command = _entering(namespace.run(threading.get_native_id))
        async with (
            sandboxed(tmp_path, "net,netdev=tap,ifname=tap0,queues=2", command=command) as served,
            driven(served.sockets[0]) as device,
        ):
            guest: NetInterface = device.driver_data
            assert await guest.set_pairs(2) == 0
            await guest.send(b"\xff" * 6 + guest.mac + b"\x88\xb5" + bytes(50), pair=1)
            while namespace.run(_frames) == 0:
                await trio.sleep(0.01)
            namespace.ip("addr add 192.0.2.1/24 dev tap0")

            async def broadcast() -> None:
                while True:  # a datagram may be lost, such as while an interface is about to have its queues
                    namespace.run(_broadcast)
                    await trio.sleep(0.1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(broadcast)
                while b"from the host" not in (await guest.receive()).data:
                    pass
                nursery.cancel_scope.cancel()


async def test_networks_that_connect_again(tmp_path: Path) -> None:
    """Sockets are made and connected in the sandbox; a host's name was resolved before."""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        devices = [
            f"net,netdev=stream,addr.type=inet,addr.host=localhost,addr.port={tcp.getsockname()[1]},reconnect-ms=10",
            "net,netdev=stream,addr.path=peer,reconnect-ms=10",
        ]
        async with sandboxed(tmp_path, *devices) as served:
            unix.bind(str(tmp_path / "peer"))
            for path, listener in zip(served.sockets, (tcp, unix), strict=True):
                listener.listen()
                async with driven(path) as device:
                    with trio.socket.from_stdlib_socket(listener.dup()) as waiting:
                        peer, _ = await waiting.accept()
                    guest: NetInterface = device.driver_data
                    with peer:
                        while not await guest.link_is_up():
                            await trio.sleep(0.01)
                        await guest.send(b"\xff" * 6 + guest.mac + b"\x88\xb5" + b"to the peer")
                        assert b"to the peer" in await peer.recv(1000)


def _frames() -> int:
    """That the host has got from the guest."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[1]) for line in lines if line.strip().startswith("tap0:"))


def _broadcast() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(b"from the host", ("192.0.2.255", 9))


@pytest.mark.qemu  # as what fetches programs
@pytest.mark.once
async def test_passt(tmp_path: Path) -> None:
    """It is started before, and ends though nobody may kill it."""
    program = passt_script(tmp_path)
    with passt_namespace() as namespace:
        command = _entering(namespace.run(threading.get_native_id))
        async with (
            sandboxed(tmp_path, f"net,netdev=user,passt={program},mac={MAC.hex(':')}", command=command) as served,
            driven(served.sockets[0]) as device,
        ):
            guest: NetInterface = device.driver_data
            await guest.send(dhcp(DISCOVER))
            while (await guest.receive()).data[12:14] != b"\x08\0":
                pass


def _entering(thread: int) -> tuple[str, ...]:
    return "nsenter", f"--net=/proc/{os.getpid()}/task/{thread}/ns/net", *COMMAND


async def test_each_process_is_in_its_own(tmp_path: Path) -> None:
    """What the parent has, none of them has; the parent removes the sockets, and a process those of the console."""
    devices = ["--device", "rng,socket=rng.sock", "--device", "console,chardev=unix:console,socket=console.sock"]
    async with serve_process("--sandbox", "--processes", *devices, folder=tmp_path) as served:
        pid = served.process.pid
        processes = children(pid)
        [remover] = [process for child in processes for process in children(child)]
        for process, mode in ((pid, "0"), *((process, "2") for process in (*processes, remover))):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
            assert status["Seccomp"].strip() == mode
        async with driven(served.sockets[0]) as device:
            assert any(await device.driver_data.read(100))
        assert await served.terminate() == 0
        assert not Path(f"/proc/{remover}").exists()
    assert list(tmp_path.iterdir()) == []


async def test_the_socket_of_one_that_was_killed(tmp_path: Path) -> None:
    """The next process makes it anew, and the one that removes it in the end is its own."""
    device = ["--device", "console,chardev=unix:console,socket=console.sock"]
    async with serve_process("--supervise", "--sandbox=strict", *device, folder=tmp_path) as served:
        [keeper] = children(served.process.pid)
        with trio.fail_after(60):
            for _ in range(2):
                [killed] = children(keeper)
                [remover] = children(killed)
                os.kill(killed, signal.SIGKILL)
                while not (now := children(keeper)) or now == [killed] or not children(now[0]):
                    await trio.sleep(0.01)
                while not is_gone(remover):
                    await trio.sleep(0.01)
            os.close(_connect(tmp_path))
        assert await served.terminate() == 0
    assert list(tmp_path.iterdir()) == []


async def test_a_device_that_does_more_gets_errors(tmp_path: Path) -> None:
    """The log has its lines, the audit is written in the end, and the server goes on."""
    (tmp_path / "mine.py").write_text(MINE)
    devices = ["--device", "mine.py:Curious", "--device", "rng"]
    async with serve_process("--sandbox", "--audit=report.txt", *devices, folder=tmp_path) as served:
        with trio.fail_after(120):
            async with driven(served.sockets[0]):
                while "as it is" not in served.log.read_text():
                    await trio.sleep(0.01)
            async with driven(served.sockets[1]) as device:
                assert any(await device.driver_data.read(100))
        assert await served.terminate() == 0
    log = served.log.read_text()
    assert "curious0: Permission denied" in log
    assert "curious0: Operation not permitted" in log
    assert 'raise RuntimeError("as it is")' in log  # its file is read for that
    assert "audit of 2 devices" in (tmp_path / "report.txt").read_text()


LATE = """\
from pathlib import Path
from vfiouser_virtio.virtio import Device, queue

class Late(Device):
    device_id = 4
    requestq = queue()
    async def run(self):
        import beside, package.part, pluggy, wave
        self.log.warning("imported %s", (beside.NAME, package.part.NAME))
        for name in ("notes.txt", "folder/notes.txt"):
            try:
                Path(__file__).parent.joinpath(name).read_text()
            except OSError as error:
                self.log.warning("%s: %s", name, error.strerror)
        self.log.warning("that is all")
"""


async def test_what_an_author_imports_late(tmp_path: Path) -> None:
    """Modules beside a device file are read, from packages and site-packages too; other files there are not."""
    for name in ("package", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "part.py").write_text("NAME = 'a part'\n")
    for name in ("notes.txt", "folder/notes.txt"):
        (tmp_path / name).write_text("not for a guest\n")
    async with serve_process("--sandbox", "--device", "late.py:Late", folder=tmp_path) as served:
        with trio.fail_after(120):
            async with driven(served.sockets[0]):
                while "that is all" not in served.log.read_text() and "Traceback" not in served.log.read_text():
                    await trio.sleep(0.01)
        assert await served.terminate() == 0
    log = served.log.read_text()
    assert "imported ('beside', 'a part')" in log
    assert "notes.txt: Permission denied" in log
    assert "folder/notes.txt: Permission denied" in log


CARD = """\
from vfiouser_virtio.pci import BarKind, BarMemory, Identity, bar, interrupts
from vfiouser_virtio.pci.bridge import Bridge

class Card(Bridge):
    identity = Identity(vendor=0x1234, device=0x5AC1, class_code=0x120000)
    irq = interrupts(1, msix_bar=1)
    regs = bar(0, size=0x1000)
    pages = bar(2, size=0x1000, kind=BarKind.MEM64)
    frames = BarMemory(0, size=0x1000, mapped=True)
"""


async def test_a_pci_device_in_a_simulator(tmp_path: Path) -> None:
    """Simulators and clients that come once it is in the sandbox, one after the other; each maps memory of the card."""
    (tmp_path / "card.py").write_text(CARD)
    async with sandboxed(tmp_path, "card.py:Card,simulator=sim.sock,burndown=touched.json") as served:
        for number in range(2):
            async with (
                fake_simulator(tmp_path / "sim.sock") as simulator,
                trio.open_nursery() as nursery,
            ):
                with SharedMemory(16 << 20) as memory:
                    async with connect(served.sockets[0], memory=[memory]) as client, open_function(client) as card:
                        view = await card.bar[2].map(0, 0x1000)
                        assert view[0] == number
                        view[0] = number + 1
                        nursery.start_soon(card.bar[0].write32, 0x40, 0x600D)
                        written = await simulator.expect(RtlMessage.WRITE)
                        await simulator.answer(written)
                        at = card.memory.alloc(4096).address
                        assert await simulator.dma(RtlMessage.DMA_WRITE, at, 4, written.access[3]) == (0, b"")
                        assert await simulator.dma(RtlMessage.DMA_READ, at, 4) == (0, b"\x0d\x60\0\0")
                        await simulator.interrupt(0, InterruptAction.TRIGGER)
                        await card.irq[0].wait()
                await simulator.send(RtlMessage.END, 0)
                with pytest.raises(EOFError):
                    await simulator.receive()
    assert (tmp_path / "touched.json").read_text().count("client gone") == 2
    assert not (tmp_path / "sim.sock").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    for words, reason in (
        (["--engine", "libvfio-user", "--libvfio-user", "none.so"], "libvfio-user"),
        (["--device", "net,netdev=boot,tftp=nowhere"], "tftp=nowhere"),
    ):
        ended = run_command("serve", "--sandbox", "--device", "rng", *words, cwd=tmp_path)
        assert ended.returncode != 0
        assert reason in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
