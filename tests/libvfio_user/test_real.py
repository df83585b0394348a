"""What only the real library does: capabilities, resets, migration, blocking calls; and our own client on it."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.vfu_peer import Peer, attached
from support.vfu_stage import MEM, PAGE, ask

from vfiouser_virtio.libvfio_user.bindings import (
    CapFlag,
    Context,
    DevIrqType,
    DmaInfo,
    Library,
    Migration,
    MigrState,
    PciType,
    RegionFlag,
    ResetType,
)
from vfiouser_virtio.protocols import pci
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_FEATURE_HEADER,
    FEATURE_MIG_DEVICE_STATE,
    MIG_DATA,
    Command,
    DeviceFeature,
    DeviceFeatureFlags,
    PciRegion,
)
from vfiouser_virtio.vfio_user import SharedMemory, connect

pytestmark = pytest.mark.usefixtures("libvfio_user")


@pytest.fixture
def context(libvfio_user: Library, tmp_path: Path) -> Iterator[Context]:
    with Context(libvfio_user, tmp_path / "s") as context:
        context.pci_init(PciType.EXPRESS)
        yield context


def capability(schema: Any, cap_id: int, **fields: int) -> bytes:
    names = [part.name for part in schema.subcons]
    return bytes(schema.build(dict.fromkeys(names, 0) | {"id": cap_id} | fields))


def test_capabilities(context: Context) -> None:
    context.setup_region(PciRegion.CONFIG, PAGE, lambda offset, buffer, is_write: None, RegionFlag.RW)
    msix = context.pci_add_capability(0, 0, capability(pci.MSIX_CAP, pci.CapId.MSIX, flags=3, table=1, pba=0x801))
    assert msix == 0x40
    pm = context.pci_add_capability(0x80, CapFlag.READONLY, capability(pci.PM_CAP, pci.CapId.PM, pmc=3))
    assert pm == 0x80
    vendor = [context.pci_add_capability(0, CapFlag.CALLBACK, b"\x09\x00\x08three") for _ in range(2)]
    serial = pci.DSN_CAP.build({"header": 0x10003, "sn_lo": 1, "sn_hi": 2})
    dsn = context.pci_add_capability(0, CapFlag.EXTENDED, serial)
    assert dsn == 0x100
    assert context.pci_find_capability(pci.CapId.MSIX) == msix
    assert context.pci_find_capability(pci.CapId.VNDR) == vendor[0]
    assert context.pci_find_next_capability(vendor[0], pci.CapId.VNDR) == vendor[1]
    assert context.pci_find_next_capability(vendor[1], pci.CapId.VNDR) == 0
    assert context.pci_find_capability(pci.CapId.EXP) == 0
    assert context.pci_find_capability(pci.ExtCapId.DSN, extended=True) == dsn
    with pytest.raises(OSError, match="vfu_pci_add_capability") as caught:
        context.pci_add_capability(0x41, 0, capability(pci.PM_CAP, pci.CapId.PM))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="vfu_pci_add_capability") as caught:
        context.pci_add_capability(0, 0, b"\x42\x00")
    assert caught.value.errno == errno.ENOTSUP
    with attached(context) as peer:
        space = ask(context, peer, peer.region_read, PciRegion.CONFIG, 0, 256).payload[16:]
    assert space[0x34] == msix
    assert space[msix : msix + 4] == b"\x11\x80\x03\x00"
    assert bytes(context.pci_get_config_space()[0x100:0x10C]) == bytes.fromhex("030001000100000002000000")


def test_a_function_level_reset(context: Context) -> None:
    resets: list[ResetType] = []
    context.setup_device_reset_cb(resets.append)
    devcap = pci.ExpDevCap.FLR
    at = context.pci_add_capability(0, 0, capability(pci.EXP_CAP, pci.CapId.EXP, flags=2, devcap=devcap))
    with attached(context) as peer:
        control = (pci.ExpDevCtl.BCR_FLR).to_bytes(2, "little")
        assert ask(context, peer, peer.region_write, PciRegion.CONFIG, at + 8, control).error == 0
        assert ask(context, peer, peer.send, Command.DEVICE_RESET).error == 0
    with pytest.raises(OSError, match="vfu_run_ctx"):
        context.run_ctx()
    assert resets == [ResetType.PCI_FLR, ResetType.DEVICE, ResetType.LOST_CONN]


def test_migration(context: Context) -> None:
    states: list[MigrState] = []
    written: list[bytes] = []
    saved = [b"the state", b" of it"]
    context.setup_device_migration_callbacks(
        Migration(states.append, lambda count: saved.pop(0) if saved else b"", written.append)
    )

    def feature(peer: Peer, flags: int, data: bytes = b"") -> bytes:
        argsz = DEVICE_FEATURE_HEADER.sizeof() + 8
        header = DEVICE_FEATURE_HEADER.build({"argsz": argsz, "flags": flags})
        reply = ask(context, peer, peer.send, Command.DEVICE_FEATURE, header + data)
        assert reply.error == 0
        return bytes(reply.payload[8:])

    def state(peer: Peer, number: int) -> None:
        data = FEATURE_MIG_DEVICE_STATE.build({"device_state": number, "data_fd": -1})
        feature(peer, DeviceFeatureFlags.SET | DeviceFeature.MIG_DEVICE_STATE, data)

    def read(peer: Peer) -> bytes:
        request = MIG_DATA.build({"argsz": 8 + 64, "size": 64})
        reply = ask(context, peer, peer.send, Command.MIG_DATA_READ, request)
        assert reply.error == 0
        return bytes(reply.payload[8 : 8 + MIG_DATA.parse(reply.payload).size])

    with attached(context) as peer:
        assert feature(peer, DeviceFeatureFlags.GET | DeviceFeature.MIGRATION)[0] & 1
        state(peer, 6)  # PRE_COPY
        assert [read(peer) for _ in range(3)] == [b"the state", b" of it", b""]
        state(peer, 3)  # STOP_COPY
        state(peer, 1)  # STOP
        state(peer, 4)  # RESUMING
        data = MIG_DATA.build({"argsz": 8 + 5, "size": 5}) + b"again"
        assert ask(context, peer, peer.send, Command.MIG_DATA_WRITE, data).error == 0
        state(peer, 1)
        state(peer, 2)  # RUNNING
    assert written == [b"again"]
    assert states[:2] == [MigrState.PRE_COPY, MigrState.STOP_AND_COPY]
    assert MigrState.RESUME in states
    assert states[-1] == MigrState.RUNNING


def test_blocking_calls(libvfio_user: Library, tmp_path: Path) -> None:
    with Context(libvfio_user, tmp_path / "s", non_blocking=False) as context:
        context.pci_init(PciType.EXPRESS)
        context.setup_region(0, PAGE, lambda offset, buffer, is_write: None, MEM)
        context.realize_ctx()
        replies = []

        def client() -> None:
            peer = Peer(context.name)
            peer.version()
            peer.receive()
            for _ in range(3):
                peer.region_read(0, 0, 4)
                replies.append(peer.receive().payload[16:])
            peer.close()

        thread = threading.Thread(target=client)
        thread.start()
        assert context.attach_ctx()
        with pytest.raises(OSError, match="vfu_run_ctx") as caught:
            context.run_ctx()
        assert caught.value.errno == errno.ENOTCONN
        thread.join()
        assert replies == [bytes(4)] * 3


async def serve(context: Context) -> None:
    """A device's whole loop."""
    while True:
        await trio.lowlevel.wait_readable(context.get_poll_fd())
        if context.attach_ctx():
            try:
                while True:
                    await trio.lowlevel.wait_readable(context.get_poll_fd())
                    context.run_ctx()
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise


async def test_our_client_drives_a_device(context: Context, nursery: trio.Nursery) -> None:
    registers = bytearray(PAGE)
    regions: list[DmaInfo] = []
    resets: list[ResetType] = []
    masks: list[tuple[int, int, bool]] = []

    def access(offset: int, buffer: memoryview, is_write: bool) -> None:
        if is_write:
            registers[offset : offset + len(buffer)] = buffer
        else:
            buffer[:] = registers[offset : offset + len(buffer)]

    def masked(start: int, count: int, mask: bool) -> None:
        masks.append((start, count, mask))

    context.pci_set_id(0x494F, 0x0DC8, 0x494F, 0x0DC8)
    context.setup_region(2, PAGE, access, MEM)
    context.setup_device_dma(regions.append, regions.remove)
    context.setup_device_reset_cb(resets.append)
    context.setup_device_nr_irqs(DevIrqType.INTX, 1)
    context.setup_device_nr_irqs(DevIrqType.MSIX, 2)
    context.setup_irq_state_callback(DevIrqType.INTX, masked)
    context.realize_ctx()
    nursery.start_soon(serve, context)
    before = len(os.listdir("/proc/self/fd"))
    with SharedMemory(1 << 20) as ram:
        async with connect(context.name, memory=[ram]) as client:
            info = await client.device_info()
            assert (info.num_regions, info.num_irqs) == (9, 5)
            assert await client.config_read(0, 4) == 0x0DC8_494F
            await client.region_write(2, 8, b"\x01\x02\x03\x04")
            assert await client.region_read(2, 8, 4) == b"\x01\x02\x03\x04"
            assert [(region.iova, region.size) for region in regions] == [(ram.address, 1 << 20)]
            ram.view[16:20] = b"here"
            (view,) = context.sgl_get(context.addr_to_sgl(ram.address + 16, 4))
            assert bytes(view) == b"here"
            fired = [trio.Event(), trio.Event()]
            await client.connect_msix([event.set for event in fired])
            for vector, event in enumerate(fired):
                context.irq_trigger(vector)
                with trio.fail_after(60):
                    await event.wait()
            await client.device_reset()
            assert resets == [ResetType.DEVICE]
            del view
    with trio.fail_after(60):
        while resets != [ResetType.DEVICE, ResetType.LOST_CONN]:
            await trio.sleep(0.01)
    assert regions == []
    assert len(os.listdir("/proc/self/fd")) == before
    nursery.cancel_scope.cancel()


def test_a_client_that_waits_for_memory_hears_of_an_error(context: Context) -> None:
    """A message's reply that is an error is the OSError of the list's access."""
    context.setup_device_dma(None, None)
    with attached(context) as peer:
        ask(context, peer, peer.dma_map, 0, PAGE)
        sgl = context.addr_to_sgl(0, 4)
        answer = threading.Thread(target=_vanish, args=(peer.receive, peer.close))
        answer.start()
        with pytest.raises(OSError, match="vfu_sgl_read") as caught:
            context.sgl_read(sgl)
        answer.join()
    assert caught.value.errno == errno.ENOTCONN


def _vanish(receive: Callable[[], object], close: Callable[[], None]) -> None:
    receive()
    close()
