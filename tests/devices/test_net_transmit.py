"""The transmit path of the network device: headers, buffers, offloads, a netdev without room."""

from itertools import pairwise

import pytest
from support.net_cable import Cable, a_frame

from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.driver import running

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
PLAIN = bytes(12)
TX = 1


@both_memories
@pytest.mark.parametrize("cut", [(76,), (12, 64), (1, 11, 14, 50), (5, 71), (13, 63)], ids=str)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
async def test_a_frame_arrives_however_its_buffer_is_cut(private: bool, cut: tuple[int, ...], indirect: bool) -> None:
    cable, frame = Cable(), a_frame(64)
    packet = PLAIN + frame
    async with running(Net(netdev=cable), private=private, features=Feature.INDIRECT_DESC.mask) as driver:
        ends = [sum(cut[:count]) for count in range(len(cut) + 1)]
        pieces = [packet[start:end] for start, end in pairwise(ends)]
        used = await driver.request(pieces, queue=TX, indirect=indirect)
        assert used.written == 0
        assert await cable.wait_sent(1) == [frame]
        assert cable.sent[0].offload is None
