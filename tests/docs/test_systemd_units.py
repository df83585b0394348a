"""docs/systemd: units that systemd takes, that leave little, and under whose filter of system calls a server works."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from support.command import COMMAND, serve_process
from support.uapi import source, uapi_include

from vfiouser_virtio.guest import bound_pci
from vfiouser_virtio.protocols.seccomp import Arch
from vfiouser_virtio.serving.sandbox_filter import ANY_ARGUMENTS, CallArgument, assemble
from vfiouser_virtio.vfio_user import SharedMemory, connect

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"),
]

UNITS = Path(__file__).parents[2] / "docs" / "systemd"
SERVICE = "vfiouser-virtio@.service"
CHILD = Path(__file__).parents[1] / "support" / "unit_child.py"
# Ten times the number that `systemd-analyze security` shows: 0 leaves a service nothing, 100 everything.
MOST_EXPOSED = 8
# linux/sched.h, asm-generic/mman-common.h
CLONE_NEW = 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000 | 0x0002_0000
WRITE, EXEC = 2, 4


def settings() -> list[tuple[str, str]]:
    return re.findall(r"^(\w+)=(.*)$", (UNITS / SERVICE).read_text(), re.MULTILINE)


def analyze(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units of the machine ``vm``, whose program is one that is there."""
    folder = tmp_path / "units"
    folder.mkdir()
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/bin/vfiouser-virtio ", "/bin/true ")
        (folder / unit.name.replace("@", "@vm")).write_text(text)
    return folder


def test_systemd_takes_them(units: Path) -> None:
    names = [unit.name for unit in units.iterdir()]
    assert len(names) == 2
    for name in names:
        ended = analyze("verify", f"./{name}", cwd=units)
        assert (ended.returncode, ended.stderr) == (0, "")
    (units / names[0]).write_text((units / names[0]).read_text() + "\nNonsense=yes\n")
    assert "Nonsense" in analyze("verify", f"./{names[0]}", cwd=units).stderr


def test_what_they_leave(units: Path) -> None:
    words = ["security", "--offline=true", f"--threshold={MOST_EXPOSED}", "./vfiouser-virtio@vm.service"]
    ended = analyze(*words, cwd=units)
    assert ended.returncode == 0, ended.stdout
    service = units / "vfiouser-virtio@vm.service"
    service.write_text(service.read_text().replace("ProtectSystem=strict\n", "").replace("PrivateDevices=yes\n", ""))
    assert analyze(*words, cwd=units).returncode != 0


def test_a_stop_is_for_the_server_alone() -> None:
    """SIGTERM to a supervised device's own process would be its death."""
    assert dict(settings())["KillMode"] == "mixed"


def members(group: str) -> Iterator[str]:
    for line in analyze("syscall-filter", group, cwd=UNITS).stdout.splitlines()[1:]:
        name = line.strip()
        if name.startswith("@"):
            yield from members(name)
        elif name and not name.startswith("#"):
            yield name


def allowed_names() -> set[str]:
    """Of the unit's lines SystemCallFilter=, of which one with a tilde takes away (systemd.exec(5))."""
    allowed: set[str] = set(members("@default"))
    for name, value in settings():
        if name == "SystemCallFilter":
            named = {
                call for word in value.lstrip("~").split() for call in (members(word) if word[0] == "@" else [word])
            }
            allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


def unit_filter() -> bytes:
    """The filter that systemd makes of SystemCallFilter=, MemoryDenyWriteExecute=, RestrictNamespaces= and families."""
    machine = os.uname().machine
    header = source("asm-generic/unistd.h" if machine == "aarch64" else next(uapi_include().rglob("asm/unistd_64.h")))
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", header)}
    numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
    allowed = allowed_names()
    rules = {number: ANY_ARGUMENTS for name, number in numbers.items() if name in allowed}
    rules[numbers["mmap"]] = [(CallArgument(2, 0, WRITE),), (CallArgument(2, 0, EXEC),)]
    rules[numbers["mprotect"]] = [(CallArgument(2, 0, EXEC),)]
    rules[numbers["clone"]] = [(CallArgument(0, 0, CLONE_NEW),)]
    rules[numbers["socket"]] = [(CallArgument(0, socket.AF_UNIX),)]
    return assemble(Arch[machine], rules)


async def test_a_server_works_as_they_start_it(tmp_path: Path) -> None:
    """Its arguments, its sockets from LISTEN_FDS, its filter; QEMU's part is that of a guest in Python."""
    kept = dict(settings())
    assert [kept[name] for name in ("MemoryDenyWriteExecute", "RestrictNamespaces")] == ["yes", "yes"]
    assert kept["RestrictAddressFamilies"] == "AF_UNIX"
    (tmp_path / "filter").write_bytes(unit_filter())
    (tmp_path / "disk.img").write_bytes(b"an image".ljust(1 << 20, b"\0"))
    config = tmp_path / "vm.toml"
    config.write_text('[[device]]\ndriver = "blk"\npath = "disk.img"\n\n[[device]]\ndriver = "rng"\n')
    program, serve, *words = shlex.split(kept["ExecStart"].replace("/etc/vfiouser-virtio/%i.toml", str(config)))
    assert (program, serve) == ("/usr/bin/vfiouser-virtio", "serve")
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    paths = [str(tmp_path / f"{number}.sock") for number in range(2)]
    for sock, path in zip(sockets, paths, strict=True):
        sock.bind(path)
        sock.listen()
    fds = [sock.fileno() for sock in sockets]
    # At 3 and 4, whatever is there: what has those numbers goes first.
    shuffle = "import os, sys; [os.dup2(int(fd), 100 + i) for i, fd in enumerate(sys.argv[1].split())];"
    shuffle += "[os.dup2(100 + i, 3 + i) for i in range(2)]; os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    command = (sys.executable, "-c", shuffle, " ".join(map(str, fds)), str(CHILD), str(tmp_path / "filter"), "2")
    async with serve_process(*words, folder=tmp_path, pass_fds=fds, command=(*command, *COMMAND)) as served:
        for sock in sockets:
            sock.close()
        assert served.sockets == paths
        with trio.fail_after(120), SharedMemory(16 << 20) as memory:
            async with connect(paths[0], memory=[memory]) as client, bound_pci(client) as device:
                assert (await device.driver_data.read(0, 512)).startswith(b"an image")
            async with connect(paths[1], memory=[memory]) as client, bound_pci(client) as device:
                assert any(await device.driver_data.read(64))
        assert await served.terminate() == 0
        log = served.log.read_text()
        assert not re.search("ERROR|WARNING", log), log
