"""What a driver does, as the log says it with -v."""

import logging
import re

import pytest

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.virtio.blk import BlkFeature
from vfiouser_virtio.testing.carriers import carry
from vfiouser_virtio.virtio.driver_activity import feature_names, status_names


def test_names() -> None:
    assert status_names(0) == "0"
    assert status_names(0x0B) == "ACKNOWLEDGE, DRIVER, FEATURES_OK"
    assert status_names(0x21) == "ACKNOWLEDGE, 0x20"
    assert feature_names(0, None) == "none"
    assert feature_names(1 << 9 | 1 << 23 | 1 << 32 | 1 << 42, BlkFeature) == "FLUSH, bit 23, VERSION_1, bit 42"
    assert feature_names(1 << 9, None) == "bit 9"


async def test_a_driver_that_starts_and_leaves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "vfiouser_virtio"):
        async with carry(Blk(size=1 << 20, num_queues=1), "socket"):
            pass
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("blk: ")]
    said = "\n".join(re.sub("0x[0-9a-f]+", "#", line.removeprefix("blk: ")) for line in lines)
    # In this order, with others between them.
    for expected in (
        r"pid \d+ has connected",
        r"client maps memory #\+# to read and write, file offset #",
        r"bus master on",
        r"reset; status was",
        r"driver sets status ACKNOWLEDGE\n",
        r"driver accepts features .*FLUSH.*VERSION_1",
        r"driver leaves out .*\n",
        r"driver enables queue 0: split ring of \d+, desc #, driver #, device #\n",
        r"driver sets status ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK",
    ):
        found = re.search(expected, said)
        assert found, f"{expected} is not in, or not behind the others:\n{said}"
        said = said[found.end() :]
    assert {record.device for record in caplog.records if record.getMessage() in lines} == {"blk"}  # type: ignore[attr-defined]


async def test_nothing_of_it_without_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vfiouser_virtio"):
        async with carry(Blk(size=1 << 20), "socket"):
            pass
    server = [record for record in caplog.records if not record.name.startswith("vfiouser_virtio.guest")]
    assert all("connected" in record.getMessage() for record in server)
