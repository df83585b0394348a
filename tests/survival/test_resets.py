"""Resets by the thousand: in every state, in every way, with requests under way; nothing grows."""

import gc
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing
from support.amounts import Amounts
from support.boot_devices import BOOT_DEVICES, BootDevice, gated_disk
from support.reset_states import reset_often
from support.survival_stage import Stage, stage

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.virtio import Offer

PAGE = 4096


@dataclass(frozen=True)
class Size:
    """Size of the process."""

    objects: int
    """That refer to others."""
    blocks: int
    """Of Python's allocator: the size of all that it refers to."""
    resident: int
    """Bytes."""

    @staticmethod
    async def now(place: Stage) -> "Size":
        """With nothing under way; descriptors, mappings and tasks are as they were in the beginning."""
        await place.served.serve_next()
        await place.check_gone(idle=True)
        await trio.testing.wait_all_tasks_blocked()
        # Trio keeps up to a thousand deadlines that are over, and forgets them all at its next turn with more.
        for _ in range(1200):
            with trio.move_on_after(3600):  # noqa: ASYNC100
                pass
        await trio.lowlevel.checkpoint()
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        return Size(len(gc.get_objects()), sys.getallocatedblocks(), resident)


def check_growth(before: Size, after: Size, resets: int) -> None:
    """What is kept for each reset is an object or a block at least for each, or a page where Python does not know."""
    grown = f"{before} grows to {after} by {resets} resets"
    assert after.objects - before.objects < max(resets / 10, 20), grown
    # CPython's cache of attributes keeps names that others make anew each time, up to 4096 of them.
    assert after.blocks - before.blocks < max(resets, 1000), grown
    assert after.resident - before.resident < max(resets * PAGE // 2, 1 << 20), grown


async def resets_in_halves(device: BootDevice, number: int, memory: Memory, offer: Offer) -> int:
    """Half of them, then the other half, which must leave nothing behind."""
    sizes: list[Size] = []
    combinations = 0
    async with stage(device.make(), device.works, name=device.type.name, offer=offer) as place:
        with trio.fail_after(900):
            for _ in range(2):
                combinations = await reset_often(
                    place.served, device.requests, number // 2, memory, place.neighbour_works
                )
                sizes.append(await Size.now(place))
    before, after = sizes
    check_growth(before, after, number // 2)
    return combinations


@pytest.mark.parametrize("memory", ["shared", "private"])
@pytest.mark.parametrize("name", BOOT_DEVICES)
async def test_resets_in_every_state(
    name: str, memory: Memory, amounts: Amounts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "vfiouser_virtio")  # the others would be kept for the report, and grow
    device = BOOT_DEVICES[name]
    offer = Offer(packed=device.offer.packed, suspend=True)
    number = amounts.resets if (name, memory) == ("blk", "shared") else amounts.resets // 4
    combinations = await resets_in_halves(device, number, memory, offer)
    assert combinations >= min(number // 2, 100)
    assert not [each.getMessage() for each in caplog.records]


class Hoarder(Blk):
    """Keeps something for each reset."""

    kept: list[list[object]] = []  # noqa: RUF012

    def reset(self) -> None:
        super().reset()
        self.kept.append([object()])


async def test_what_grows_is_noticed() -> None:
    def hoarder() -> Hoarder:
        device = gated_disk()
        found = Hoarder(backend=device.backend, num_queues=2)
        found.resize_queues(64)
        return found

    usual = BOOT_DEVICES["blk"]
    device = BootDevice(hoarder, usual.works, usual.type, usual.requests)
    with pytest.raises(AssertionError, match="grows to"):
        await resets_in_halves(device, 100, "shared", Offer())
    Hoarder.kept.clear()
