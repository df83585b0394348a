"""`serve` as a program calls it that has devices of its own: on sockets, and off them again."""

import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

import vfiouser_virtio
from vfiouser_virtio import ConfigError, Device, DeviceError, VirtioPci, queue, serve
from vfiouser_virtio.testing.survey import survey
from vfiouser_virtio.vfio_user import ListenError, connect


class Pattern(Device):
    device_id = 4
    requestq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[str] = []

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(b"\xde\xad\xbe\xef")
            chain.complete()

    def close(self) -> None:
        self.closed.append("closed")


async def test_an_object_on_a_path(tmp_path: Path) -> None:
    device, path = Pattern(), tmp_path / "pattern.sock"
    async with serve(device, path=path) as serving:
        [endpoint] = serving.endpoints
        assert (endpoint.name, endpoint.driver, endpoint.socket_path) == ("pattern0", "Pattern", str(path))
        assert serving.functions[0].device is device
        assert device.log.device == "pattern0"
        assert f'"path":"{path}"' in serving.qemu_command
        async with connect(str(path)) as client:
            found = await survey(client)
        assert found.as_dict()["virtio"]["type"] == 4
        assert not device.closed
    assert device.closed == ["closed"]
    assert not path.exists()


async def test_several_devices_of_all_forms(tmp_path: Path) -> None:
    made = VirtioPci(Pattern(), ids="qemu", vectors=1, name="mine")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/inherited.sock")
        listening.listen()
        fd = os.dup(listening.fileno())
    async with serve(Pattern(), made, "rng", "rng,id=named", places=[f"{tmp_path}/a.sock", fd]) as serving:
        names = [endpoint.name for endpoint in serving.endpoints]
        assert names == ["pattern0", "mine", "rng0", "named"]
        assert serving.functions[1] is made
        paths = [endpoint.socket_path for endpoint in serving.endpoints]
        assert paths[:2] == [f"{tmp_path}/a.sock", f"{tmp_path}/inherited.sock"]
        folder = Path(str(paths[2])).parent
        assert Path(str(paths[3])).parent == folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in paths:
            async with connect(str(path)) as client:
                assert (await survey(client)).as_dict()["virtio"]["type"] == 4
    assert not folder.exists()


async def test_once_ends_with_its_client(tmp_path: Path) -> None:
    async with serve(Pattern(), path=tmp_path / "s", once=True) as serving:
        async with connect(f"{tmp_path}/s"):
            assert not serving.finished.is_set()
        with trio.fail_after(60):
            await serving.wait_finished()


async def test_an_exception_of_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    device = Pattern()
    with pytest.raises(ZeroDivisionError):
        async with serve(device, path=tmp_path / "s"):
            raise ZeroDivisionError
    assert device.closed == ["closed"]


@pytest.mark.parametrize(
    ("others", "options", "error", "message"),
    [
        ([], {"path": "/nonexistent/folder/s"}, ListenError, "/nonexistent/folder"),
        (["rng"], {"path": "s"}, ConfigError, "path is the socket of a single device"),
        ([], {"path": "s", "places": ["t"]}, ConfigError, "path is the socket of a single device"),
        ([], {"places": ["{tmp}/a", "{tmp}/b"]}, ConfigError, "1 more sockets than devices"),
        (["rng,id=pattern0", "rng,id=pattern0"], {}, ConfigError, "2 devices have id=pattern0"),
        (["rng,nonsense=1"], {}, ConfigError, 'no option "nonsense"'),
        (["blk,path=/nonexistent"], {}, DeviceError, "/nonexistent"),
    ],
)
async def test_what_cannot_be_served_is_closed_all_the_same(
    others: list[str], options: Mapping[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    device, wrapped = Pattern(), Pattern()
    places = options.get("places")
    given: dict[str, object] = dict(options)
    if isinstance(places, list):
        given["places"] = [str(place).format(tmp=tmp_path) for place in places]
    with pytest.raises(error, match=message):
        async with serve(device, *others, **given):  # type: ignore[arg-type] # a table of all its mistakes
            pytest.fail("it is served")
    assert device.closed == ["closed"]
    with pytest.raises(error, match=message):
        async with serve(VirtioPci(wrapped), *others, **given):  # type: ignore[arg-type] # likewise
            pytest.fail("it is served")
    assert wrapped.closed == ["closed"]


def test_the_names_for_authors() -> None:
    for name in dir(vfiouser_virtio):
        assert getattr(vfiouser_virtio, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vfiouser_virtio.nothing  # type: ignore[attr-defined] # that is the point


async def test_making_many_devices_leaves_other_tasks_their_turns() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        async with serve(*["rng"] * 20):
            assert turns > 15
        nursery.cancel_scope.cancel()
