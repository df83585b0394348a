"""The fuzzer of foreign servers talks to the queues of a virtio device, as its driver does."""

import random
import shlex
import sys
from pathlib import Path

import pytest
import trio

from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.ram import RING_STRIDE, RINGS, FuzzRam
from vfiouser_virtio.testing.fuzz.servers import player
from vfiouser_virtio.testing.fuzz.servers.grammar import dma_map, version
from vfiouser_virtio.testing.fuzz.servers.judge import Judge
from vfiouser_virtio.testing.fuzz.servers.server import FuzzedServer
from vfiouser_virtio.testing.fuzz.servers.virtio_talk import ShownVirtio, talk

PATIENT = 60.0
SERVE = f"{shlex.quote(sys.executable)} -m vfiouser_virtio serve"
OUR_BLK = f"{SERVE} --device blk,size=1M,packed=on,num-queues=2 --socket {{socket}}"


class KeptRam(FuzzRam):
    """Memory of a case, for a look at it afterwards."""

    newest: "KeptRam"

    def __init__(self) -> None:
        super().__init__()
        KeptRam.newest = self

    def close(self) -> None:
        self.last = bytes(self.bytes)
        super().close()


@pytest.mark.slow
def test_requests_reach_the_queues_of_a_virtio_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some starts of a driver, without any mutations, some bring buffers back, on rings of both kinds."""
    monkeypatch.setattr(player, "FuzzRam", KeptRam)
    path = tmp_path / "x.sock"
    server = FuzzedServer(path, FuzzedServer.command_of(OUR_BLK, path))
    used = {False: 0, True: 0}

    async def play() -> None:
        judge = Judge(server, wait=PATIENT)
        shown = (await judge.get_to_know()).virtio
        assert shown is not None
        assert shown.device_id == DeviceId.BLOCK
        # A server that has other things to do is looked at more often before its client leaves.
        for looks in (4, 40, 400, 4000):
            for seed in range(16):
                await _play(judge, talk(random.Random(seed), shown), looks)
            if all(used.values()):
                break

    async def _play(judge: Judge, steps: list[Step], looks: int) -> None:
        packed = any(step.get("data") == "05000000" for step in steps)  # VERSION_1 and RING_PACKED
        look = next(step for step in steps if step.get("command") == "REGION_READ")
        steps = [version(), *map(dma_map, range(4)), *steps, *[look] * looks]
        assert await judge.judge([step | {"id": number} for number, step in enumerate(steps, 1)]) is None
        for queue in range(2):
            start = RINGS + RING_STRIDE * queue
            flags = int.from_bytes(KeptRam.newest.last[start + 14 : start + 16], "little")
            index = int.from_bytes(KeptRam.newest.last[start + 0x1002 : start + 0x1004], "little")
            used[packed] += bool(flags & DescFlags.USED if packed else index)

    try:
        trio.run(play)
    finally:
        server.stop()
    assert all(used.values()), used


def test_a_virtio_device_is_known_by_its_config_space() -> None:
    config = bytearray(256)
    assert ShownVirtio.of(bytes(config)) is None
    config[:4] = bytes.fromhex("f41a4210")
    assert ShownVirtio.of(bytes(config)) is None, "it has no common configuration"
    config[0x34] = 0x40
    config[0x40:0x50] = bytes.fromhex("09501001 04000000 00000000 00100000")
    config[0x50:0x64] = bytes.fromhex("09501402 04000000 00300000 00100000 04000000")  # and leads to itself
    shown = ShownVirtio.of(bytes(config))
    assert shown is not None
    assert shown == ShownVirtio(2, {1: (4, 0), 2: (4, 0x3000)}, 4)
    assert ShownVirtio.of(bytes(config[:20])) is None
    assert talk(random.Random(1), shown) == talk(random.Random(1), shown) != talk(random.Random(2), shown)
