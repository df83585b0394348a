"""A disk whose guest and server are killed (SIGKILL) at random moments: what was flushed is there, nothing is torn."""

from pathlib import Path

import pytest
from support.amounts import Amounts

from vfiouser_virtio.testing.soak.children import children
from vfiouser_virtio.testing.soak.kills import PLANS, DiskPlan, KilledDisk

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
async def test_flushed_writes_survive_kills(plan: DiskPlan, tmp_path: Path, amounts: Amounts) -> None:
    async with children() as processes:
        result = await KilledDisk(processes, tmp_path, plan, seed=2007, flushes=amounts.flushed_writes).run()
    assert not result.complaints
    assert result.flushed >= amounts.flushed_writes
    assert set(result.kills) == {"guest", "server", "both"} or amounts.flushed_writes < 1000


async def test_flushed_writes_survive_kills_of_a_supervised_device(tmp_path: Path, amounts: Amounts) -> None:
    """The device's process alone, in the middle of writes, and its guest; then its keeper as well."""
    plan = DiskPlan("supervised", "aio=threads", serve=("--supervise",))
    async with children() as processes:
        disk = KilledDisk(processes, tmp_path, plan, seed=2007, flushes=amounts.flushed_writes)
        result = await disk.run(("device", "device", "device", "guest", "server"))
    assert not result.complaints
    assert result.flushed >= amounts.flushed_writes
    assert result.kills["device"]
