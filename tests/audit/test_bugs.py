"""A watch with a bug in it is switched off, and said once; its device does what it does without an audit."""

import json
import logging

import pytest
from support.bad_driver import BadDriver, bad_driver

from vfiouser_virtio.audit import AuditLog
from vfiouser_virtio.audit.packed import PackedWatch
from vfiouser_virtio.audit.pci_config import PciConfigWatch
from vfiouser_virtio.audit.report import as_json, as_text
from vfiouser_virtio.audit.split import SplitWatch
from vfiouser_virtio.audit.status import StatusWatch
from vfiouser_virtio.audit.types.blk import BlkWatch
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.virtio.blk import REQUEST_HEADER_CODEC
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.vfio_device import PciRegion
from vfiouser_virtio.virtio import Offer

_READ = REQUEST_HEADER_CODEC.pack(0, 0, 0)
_OUT_OF_RANGE = 99


def breaks(monkeypatch: pytest.MonkeyPatch, watch: type, *methods: str) -> None:
    """These methods of a watch have a bug."""

    def bug(*_: object, **__: object) -> None:
        raise IndexError("planted in the watch")

    for method in methods:
        monkeypatch.setattr(watch, method, bug)


async def read_two(driver: BadDriver) -> int:
    """Two reads of a sector, with a reset in between; how many were used."""
    used = 0
    for _ in range(2):
        driver.start()
        driver.add(0, [_READ], [512, 1])
        driver.notify(0)
        await driver.settle()
        assert driver.get("device_status") & DeviceStatus.NEEDS_RESET == 0
        used += driver.take_used(0)
    driver.function.region_read(PciRegion.CONFIG, 0, 4)
    assert driver.function.reset() is None
    return used


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    ("watch", "methods"),
    [
        (SplitWatch, ("looks",)),
        (SplitWatch, ("takes",)),
        (SplitWatch, ("stores",)),
        (SplitWatch, ("uses",)),
        (PackedWatch, ("looks",)),
        (PackedWatch, ("takes",)),
        (PackedWatch, ("uses",)),
        (BlkWatch, ("available",)),
        (BlkWatch, ("used",)),
        (BlkWatch, ("queue_reset",)),
        (BlkWatch, ("reset",)),
        (StatusWatch, ("field_read",)),
        (StatusWatch, ("field_written",)),
        (StatusWatch, ("notified",)),
        (StatusWatch, ("reset",)),
        (PciConfigWatch, ("read",)),
        (PciConfigWatch, ("written",)),
        (PciConfigWatch, ("reset",)),
    ],
)
async def test_a_device_goes_on(
    watch: type,
    methods: tuple[str, ...],
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    breaks(monkeypatch, watch, *methods)
    with caplog.at_level(logging.ERROR):
        async with bad_driver(Blk(size=1 << 20), Offer(poll="off", packed=packed)) as driver:
            assert await read_two(driver) == 2
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    if (watch, packed) in ((SplitWatch, True), (PackedWatch, False)):
        assert not said
        return
    (record,) = said
    assert watch.__name__ in record.getMessage()
    assert record.exc_info is not None
    assert "planted in the watch" in str(record.exc_info[1])


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_bad_chain_stops_its_device_as_without_the_audit(
    packed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaks(monkeypatch, SplitWatch, "takes")
    breaks(monkeypatch, PackedWatch, "takes", "refuses")
    async with bad_driver(Blk(size=1 << 20), Offer(poll="off", packed=packed)) as driver:
        driver.start()
        driver.add(0, [], [1])
        driver.rings[0].add([(1 << 40, 16, 0), (1 << 41, 16, 0)])
        driver.notify(0)
        await driver.settle()
        assert driver.get("device_status") & DeviceStatus.NEEDS_RESET
    assert sum("planted" in str(record.exc_info) for record in caplog.records) == 1


async def test_other_watches_go_on_and_the_report_says_which_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(monkeypatch, BlkWatch, "available")
    async with bad_driver(Blk(size=1 << 20), Offer(poll="off")) as driver:
        driver.start()
        await driver.request(0, [_READ], [512, 1])
        driver.set("queue_enable", 0)
        assert list(driver.broken) == ["queue/enable-zero"]
        log = AuditLog()
        log.devices["blk"] = driver.findings
        said = "blk: BlkWatch was switched off by a bug in it: IndexError: planted in the watch"
        assert said in " ".join(as_text(log).split())
        assert json.loads(as_json(log))["devices"][0]["switched-off"] == {
            "BlkWatch": "IndexError: planted in the watch"
        }
