"""`vfiouser_virtio.testing.survey`: what a server shows, as it is."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from construct import Bytes, Struct
from support.broken import made_with
from support.conformance_target import DEVICES, serving
from support.faithful import answering, offering

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import Bar, BarKind, Identity, PciFunction
from vfiouser_virtio.protocols.codec import Schema
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.testing.conformance import CHECKS, Verdict, Wire, run_check
from vfiouser_virtio.testing.survey import Survey, survey
from vfiouser_virtio.testing.survey_text import as_lspci, as_text
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_device import Buffer, RegionInfo
from vfiouser_virtio.vfio_user import Server, listen_path
from vfiouser_virtio.virtio import Device, queue


async def look(wire: Wire) -> Survey:
    async with wire.connect() as client:
        return await survey(client)


async def test_a_disk() -> None:
    async with serving("blk") as wire:
        found = await look(wire)
    assert found.flags == ["RESET", "PCI"]
    assert {(each.name, each.size) for each in found.regions if each.size} == {
        ("BAR1", 0x1000),
        ("BAR4", 0x4000),
        ("CONFIG", 4096),
    }
    assert [(each.name, each.count) for each in found.irqs] == [
        ("INTX", 1),
        ("MSI", 0),
        ("MSIX", 2),
        ("ERR", 1),
        ("REQ", 1),
    ]
    assert found.function is not None
    assert (found.function.vendor, found.function.device) == (0x1AF4, 0x1042)
    assert [(bar.index, bar.kind, bar.size) for bar in found.function.bars] == [
        (1, "mem32", 0x1000),
        (4, "mem64", 0x4000),
    ]
    assert found.names["device"] == "virtio blk"
    assert "2 vectors, table at BAR1 0x0, pending bits at BAR1 0x800" in [each.detail for each in found.capabilities]
    virtio = found.virtio
    assert virtio is not None
    assert [(each.cfg_type, each.offset, each.length) for each in virtio.structures[:4]] == [
        (1, 0, 64),
        (3, 0x1000, 1),
        (4, 0x2000, 0x1000),
        (2, 0x3000, 0x1000),
    ]
    assert {"FLUSH", "VERSION_1", "EVENT_IDX"} <= {feature.name for feature in virtio.features}
    assert virtio.config["capacity"] == 2048
    assert virtio.config["seg_max"] == 254
    assert [(queue.name, queue.max_size) for queue in virtio.queues] == [("requestq1", 256)]


async def test_other_types() -> None:
    async with serving("console") as wire:
        found = await look(wire)
    assert found.virtio is not None
    assert [queue.name for queue in found.virtio.queues] == ["receiveq0", "transmitq0"]
    assert found.virtio.config["cols"] == 80
    async with serving("rng", ids="2007") as wire:
        found = await look(wire)
    assert found.function is not None
    assert found.function.vendor == 0x5000
    assert found.names["vendor"] == "virtio, draft of 2007"


async def test_a_configuration_of_pages() -> None:
    async with serving("input") as wire:
        found = await look(wire)
    assert found.virtio is not None
    shown = found.virtio.config
    assert shown["name"] == "vfiouser-virtio keyboard"
    assert shown["ids"] == "bustype 0x0006 vendor 0x1af4 product 0x0001 version 0x0001"
    assert shown["EV_LED"] == "3 codes, 0x0 to 0x2"
    assert not {"serial", "select", "data", "EV_ABS"} & shown.keys()


async def test_it_leaves_no_trace() -> None:
    async with serving("blk") as wire:
        first, second = await look(wire), await look(wire)
        async with wire.connect() as client:
            assert await client.region_read(7, 0, 256) == first.config_space[:256]
    assert first.as_dict() == second.as_dict()


async def test_json_has_everything() -> None:
    async with serving("blk") as wire:
        found = await look(wire)
    read = json.loads(json.dumps(found.as_dict()))
    assert bytes.fromhex(read["config_space"]) == found.config_space
    assert read["virtio"]["config"]["capacity"] == 2048
    assert read["virtio"]["features"][0] == {"bit": 2, "name": "SEG_MAX"}
    assert read["capabilities"][0]["detail"] == "virtio COMMON at BAR4 0x0+0x40"
    assert read["function"]["bars"][1]["size"] == 0x4000


async def test_text() -> None:
    async with serving("blk") as wire:
        lines = as_text(await look(wire)).splitlines()
    for line in (
        "PCI function 1af4:1042 (virtio blk)",
        "  BAR4: 64-bit memory, prefetchable, 16 KiB",
        "  capability 70 VNDR: virtio NOTIFY at BAR4 0x3000+0x1000, multiplier 4",
        "virtio device type 2 (blk)",
        "  feature 32 VERSION_1",
        "  config capacity = 2048",
        "  queue 0 requestq1: up to 256 entries, notify_off 0",
    ):
        assert line in lines
    assert not [line for line in lines if "!" in line]


async def test_what_a_server_calls_its_capabilities_is_text() -> None:
    async with serving("rng") as wire:
        found = await look(wire)
    assert found.version is not None
    named = replace(found, version=replace(found.version, capabilities={"\x1b]0;owned\x07": "\n! forged"}))
    text = as_text(named)
    assert "\\x1b]0;owned\\x07 \\n! forged" in text
    assert all(line.isprintable() for line in text.splitlines())
    assert "! forged" not in text.splitlines()


async def test_lspci_format() -> None:
    async with serving("rng") as wire:
        lines = as_lspci(await look(wire)).splitlines()
    assert lines[0].startswith("00:00.0 ")
    assert lines[1] == "00: f4 1a 44 10 00 00 10 00 01 00 ff 00 00 00 00 00"
    assert len(lines) == 1 + 256 + 1
    assert lines[-2].startswith("ff0: 00 ")


@pytest.mark.parametrize("with_bar", [False, True])
async def test_a_function_that_is_not_virtio(with_bar: bool, nursery: trio.Nursery, tmp_path: Path) -> None:
    function = PciFunction(Identity(0x1234, 0x5678, class_code=0xFF0000), interrupt_pin=0)
    if with_bar:
        function.add_bar(0, Bar(0x100, lambda _at, count: bytes(count), lambda _at, _data: None, BarKind.IO))
    with listen_path(tmp_path / "s.sock") as listener:
        nursery.start_soon(Server(function).serve, listener)
        found = await look(Wire(tmp_path / "s.sock"))
        nursery.cancel_scope.cancel()
    assert found.virtio is None
    text = as_text(found)
    assert "PCI function 1234:5678" in text
    assert "interrupt pin: none" in text
    assert ("BAR0: I/O ports, 256 bytes" in text) is with_bar


async def test_a_region_capability_that_is_not_known() -> None:
    """0x8001 is what vfio-user is getting with `sparse_mmap_fds`."""

    class Capable(VirtioPci):
        def region_info(self, index: int) -> RegionInfo:
            info = super().region_info(index)
            return info._replace(capabilities=((0x8001, 1, bytes(32)), (3, 1, b""))) if index == 4 else info

    async with serving("rng", make=Capable) as wire:
        found = await look(wire)
    assert found.regions[4].capabilities == ["capability 0x8001", "MSIX_MAPPABLE"]
    assert found.virtio is not None
    assert found.virtio.queues
    assert "  region 4 BAR4: 16 KiB READ WRITE CAPS capability 0x8001 MSIX_MAPPABLE" in as_text(found).splitlines()


def with_config_of(size: int) -> type[VirtioPci]:
    """As SPDK's devices: so many bytes of the configuration can be read, an access beyond is an error."""

    class Short(VirtioPci):
        def region_read(self, index: int, offset: int, count: int) -> Buffer:
            if index == 4 and 0x2000 + size < offset + count <= 0x3000:
                raise PeerError("nothing there", errno.EAGAIN)
            return super().region_read(index, offset, count)

    return Short


async def test_a_configuration_that_is_shorter_than_its_structure_says() -> None:
    async with serving("blk", make=with_config_of(60)) as wire:
        found = await look(wire)
    assert found.virtio is not None
    assert found.problem == ""
    assert found.virtio.config["capacity"] == 2048
    assert found.virtio.config["write_zeroes_may_unmap"] == 1
    assert found.virtio.unread
    assert not {*found.virtio.unread} & {*found.virtio.config}
    assert f"  config not readable: {', '.join(found.virtio.unread)}" in as_text(found).splitlines()


_CONFIG: Schema = Struct("all" / Bytes(36))


class Unknown(Device):
    """SPDK's virtio-scsi as a survey sees it: features and configuration of a type that is not known here."""

    device_id = 8
    requestq = queue()

    def __init__(self) -> None:
        super().__init__(config=record(_CONFIG)(all=bytes(range(1, 37))), features=0b110)

    async def run(self) -> None:
        await trio.sleep_forever()


async def test_a_type_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration is shown as far as it can be read, and its features are not said to be wrong."""
    monkeypatch.setitem(DEVICES, "unknown", Unknown)
    async with serving("unknown", make=with_config_of(36)) as wire:
        found = await look(wire)
        results = [await run_check(wire, CHECKS[check_id]) for check_id in ("virtio14/CC4", "virtio14/CF1")]
    assert found.virtio is not None
    assert found.virtio.config["raw"] == bytes(range(1, 37)).hex(" ")
    assert found.virtio.unread == []
    assert "  feature 1 (of a device type that is not known here)" in as_text(found).splitlines()
    assert [result.verdict for result in results] == [Verdict.PASS, Verdict.PASS], results


async def test_a_device_that_makes_no_sense() -> None:
    many = type("Many", (VirtioPci,), {"common_cfg": answering(num_queues=lambda _cfg, _original: 0xFFFF)})
    async with serving("rng", make=made_with(offering(1 << 44), many)) as wire:
        text = as_text(await look(wire))
    assert "  feature 44 ! not defined" in text
    assert "… and 64511 more queues" in text
