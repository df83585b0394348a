"""``vfiouser-virtio conform`` (what it checks: tests/testing/test_conformance.py)."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from xml.etree import ElementTree

import pytest
import trio
from support.command import run_command, serve_process

from vfiouser_virtio.pci import Identity, PciFunction
from vfiouser_virtio.testing.conformance import CHECKS
from vfiouser_virtio.vfio_user import Server, listen_path

pytestmark = pytest.mark.once


async def conform(*arguments: str) -> CompletedProcess[str]:
    # Our server answers in the end, however busy the machine is.
    return await trio.to_thread.run_sync(lambda: run_command("conform", "--timeout", "60", *arguments))


async def test_all_of_it(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    async with serve_process("--device", "rng", folder=tmp_path) as serving:
        done = await conform("--junit", str(report), serving.sockets[0])
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == len(CHECKS) + 1
    assert lines[-1].startswith(f"{len(CHECKS)} checks: ")
    assert "FAIL" not in done.stdout
    assert len(ElementTree.fromstring(report.read_text())) == len(CHECKS)


async def test_a_failure_is_the_exit_status(tmp_path: Path) -> None:
    async with serve_process("--device", "rng", "--ids", "2007", folder=tmp_path) as serving:
        text = await conform("--only", "virtio14/PI?", serving.sockets[0])
        report = await conform("--only", "virtio14/PI2", "--only", "virtio14/RB1", "--json", serving.sockets[0])
    assert text.returncode == 1
    assert "FAIL  virtio14/PI2" in text.stdout
    assert text.stdout.endswith("4 checks: 3 pass, 1 fail\n")
    assert report.returncode == 1
    assert {each["id"]: each["verdict"] for each in json.loads(report.stdout)["checks"]} == {
        "virtio14/PI2": "fail",
        "virtio14/RB1": "pass",
    }


async def test_a_server_that_ends_with_its_first_client(tmp_path: Path) -> None:
    async with serve_process("--device", "rng", "--once", folder=tmp_path) as serving:
        done = await conform("--only", "virtio14/RB1", serving.sockets[0])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "has ended with its first client, as `serve --once` does" in done.stderr


def test_list() -> None:
    done = run_command("conform", "--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(CHECKS)
    listed = json.loads(run_command("conform", "--list", "--json").stdout)
    assert [each["id"] for each in listed["checks"]] == list(CHECKS)
    assert "virtio14/SH1" in listed["not-checked"]


def test_mistakes(tmp_path: Path) -> None:
    for arguments, mistake in (
        ([], "conform: which SOCKET? (or --list)"),
        (["--only", "virtio14/RS9", "x"], "--only: there is no check 'virtio14/RS9'; did you mean virtio14/RS2?"),
    ):
        done = run_command("conform", *arguments)
        assert done.returncode == 2
        assert done.stderr == f"vfiouser-virtio: {mistake}\n"
    done = run_command("conform", str(tmp_path / "none"))
    assert done.returncode == 7
    assert done.stderr == f"vfiouser-virtio: cannot connect to '{tmp_path}/none': No such file or directory\n"


async def test_a_network_device_and_its_peer(tmp_path: Path) -> None:
    net = f"net,hub=lan,id=net{{}},socket={tmp_path}/net{{}}.sock"
    async with serve_process("--device", net.format(0, 0), "--device", net.format(1, 1), folder=tmp_path):
        asked = ["--only", "virtio14/NR1", "--only", "virtio14/NX5"]
        with_peer = await conform(*asked, "--peer", f"{tmp_path}/net1.sock", f"{tmp_path}/net0.sock")
        alone = await conform(*asked, f"{tmp_path}/net0.sock")
        itself = await conform(*asked, "--peer", f"{tmp_path}/net0.sock", f"{tmp_path}/net0.sock")
        nobody = await conform(*asked, "--peer", f"{tmp_path}/none.sock", f"{tmp_path}/net0.sock")
    assert with_peer.stdout.endswith("2 checks: 2 pass\n"), with_peer.stdout + with_peer.stderr
    assert alone.stdout.endswith("2 checks: 2 not applicable\n")
    assert "needs a second one on its network (--peer)" in alone.stdout
    for done, status, words in ((itself, 2, "--peer is another device"), (nobody, 7, "none.sock': No such file")):
        assert done.returncode == status
        [line] = done.stderr.splitlines()
        assert words in line


async def test_a_function_that_is_not_virtio(tmp_path: Path, nursery: trio.Nursery) -> None:
    function = PciFunction(Identity(0x1234, 0x5678, class_code=0xFF0000), interrupt_pin=0)
    with listen_path(tmp_path / "s") as listener:
        nursery.start_soon(Server(function).serve, listener)
        done = await conform("--only", "virtio14/*", "--only", "vfio-user/version-json", str(tmp_path / "s"))
        nursery.cancel_scope.cancel()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, "one of the protocol, one for all of virtio, and the summary"
    assert lines[1].startswith("n/a   virtio14/")
    assert lines[1].endswith("no virtio device: the PCI function is 1234:5678")
