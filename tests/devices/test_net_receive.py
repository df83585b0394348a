"""The receive path of the network device: buffers, mergeable or not, offloads, what does not fit."""

import pytest
from support.net_cable import Cable, a_frame

from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.testing.driver import running

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
RX = 0
MERGEABLE = NetFeature.MRG_RXBUF.mask


@both_memories
@pytest.mark.parametrize("features", [0, MERGEABLE], ids=["big", "mergeable"])
async def test_frames_arrive_in_order_behind_a_header_that_says_nothing(private: bool, features: int) -> None:
    cable = Cable()
    frames = [a_frame(60 + number, seed=number) for number in range(100)]
    async with running(Net(netdev=cable), private=private, features=features) as driver:
        tokens = [driver.add(RX, [], [1526]) for _ in frames]
        driver.kick(RX)
        await cable.deliver(*frames)
        for token, frame in zip(tokens, frames, strict=True):
            used = await driver.wait(RX, token)
            assert used.written == 12 + len(frame)
            assert used.data[0][: used.written] == bytes(10) + b"\x01\0" + frame
            assert not used.data[0][used.written :].strip(b"\xaa")


@both_memories
async def test_a_long_frame_is_spread_over_mergeable_buffers(private: bool) -> None:
    cable, frame = Cable(), a_frame(9014)
    async with running(Net(netdev=cable), private=private, features=MERGEABLE) as driver:
        tokens = [driver.add(RX, [], [size]) for size in (1500, 1000, 4096, 4096, 4096)]
        driver.kick(RX)
        await cable.deliver(frame)
        used = [await driver.wait(RX, token) for token in tokens[:4]]
        assert [each.written for each in used] == [1500, 1000, 4096, 9026 - 6596]
        data = b"".join(each.data[0][: each.written] for each in used)
        assert data == bytes(10) + b"\x04\0" + frame
        assert not driver.is_used(RX, tokens[4])
