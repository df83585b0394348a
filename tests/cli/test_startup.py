"""A server starts with what it needs: half of its start is imports, and more of them creep in unseen."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import serve_process
from support.small_client import client_of, read_status, status_write

from vfiouser_virtio import vfio_user
from vfiouser_virtio.vfio_user import client

_WHAT_IS_LOADED = """
import sys
from vfiouser_virtio import late_modules
late_modules.install()
from vfiouser_virtio.cli import main
from vfiouser_virtio.serving.device_setup import setups
from vfiouser_virtio.serving.device_specs import parse_device
from vfiouser_virtio.serving.serve import serve
for setup in setups(list(map(parse_device, sys.argv[1:] or ["rng"]))):
    setup.create().device.close()
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules of a process that is about to serve an entropy device."""
    command = [sys.executable, "-c", _WHAT_IS_LOADED]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "vfiouser_virtio.devices.blk",  # other devices
        "vfiouser_virtio.vfio_user.client.client",  # the other end of the socket
        "vfiouser_virtio.guest",
        "vfiouser_virtio.vm",
        "vfiouser_virtio.testing",
        "vfiouser_virtio.faults.catalogue",  # faults of devices that are asked for none
        "vfiouser_virtio.faults.plan",
        "vfiouser_virtio.audit",
        "vfiouser_virtio.pci.device",  # PCI devices of authors' own
        "vfiouser_virtio.serving.pci_options",
        "vfiouser_virtio.serving.device_files",
        "vfiouser_virtio.serving.fault_options",
        "vfiouser_virtio.serving.own_thread",  # devices that open files
        "vfiouser_virtio.connecting",  # devices that connect to others
        "vfiouser_virtio.pci.bar_mapping",  # what few devices have
        "vfiouser_virtio.pci.extended_capabilities",
        "vfiouser_virtio.pci.msi",
        "vfiouser_virtio.pci.option_rom",
        "vfiouser_virtio.memory_discard",
        "vfiouser_virtio.virtio.limits",
        "vfiouser_virtio.virtio.throttle",
        "vfiouser_virtio.vring.packed",
        "http.client",  # libvirt's XML, by way of xml.sax.saxutils
        "tomllib",  # --config
        "_ssl",  # what trio imports for TLS, DTLS and names of hosts
        "_hashlib",
        "idna.core",
        "bdb",  # what construct imports for its debugger and its pickles
        "_pickle",
        "_lzma",  # archives of shutil
    ],
)
def test_a_server_does_without(loaded: set[str], module: str) -> None:
    assert "vfiouser_virtio.devices.rng" in loaded
    assert module not in loaded


def test_their_number_is_limited(loaded: set[str]) -> None:
    """Each takes 0.15 ms at least, and the sum of many small ones is what is noticed last."""
    ours = sorted(name for name in loaded if name.startswith("vfiouser_virtio"))
    assert len(ours) <= 136, ours


def test_what_a_driver_can_ask_for_is_there_from_the_start() -> None:
    """To import it later would take a file descriptor, and a neighbour of the device may have used them up."""
    command = [sys.executable, "-c", _WHAT_IS_LOADED, "rng,packed=on", "balloon"]
    found = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert {"vfiouser_virtio.vring.packed", "vfiouser_virtio.memory_discard"} <= found


def test_a_disk_in_ram_needs_no_files() -> None:
    """Neither the module for disks in files, nor those of io_uring and threads."""
    script = (
        "import sys, vfiouser_virtio.devices.blk as blk; blk.Blk(size=blk.Size(1 << 20)).close(); print(*sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = set(ended.stdout.split())
    assert "vfiouser_virtio.backends.ram" in found
    assert not found & {f"vfiouser_virtio.backends.{name}" for name in ("file", "io_uring", "workers", "delay")}


def test_what_is_imported_late_is_there_all_the_same() -> None:
    for name in client.__all__:
        assert getattr(vfio_user, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = importlib.import_module(vfio_user.__name__).nothing


def test_help_needs_neither_trio_nor_devices() -> None:
    script = """
import sys
from vfiouser_virtio.cli import main
try:
    main(["--help"])
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = set(ended.stderr.split())
    assert "vfiouser_virtio.cli.serve" in found
    assert not found & {"trio", "construct", "vfiouser_virtio.virtio", "vfiouser_virtio.serving.serve"}


def test_garbage_is_looked_for_once_the_command_is_there() -> None:
    """Not while it is imported, and never among what that has made."""
    script = """
import gc
from vfiouser_virtio.__main__ import main
try:
    main()
except SystemExit:
    print(gc.isenabled(), gc.get_freeze_count() > 0)
"""
    ended = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "True True"


_COUNTED = """
import gc
from vfiouser_virtio.devices.rng import Rng

class Counted(Rng):
    def reset(self):
        super().reset()
        with open("counted", "a") as file:
            print(len(gc.get_objects()), file=file)
"""


@pytest.mark.parametrize("more", [(), ("--processes",)])
async def test_full_collections_do_not_look_at_what_stays(more: tuple[str, ...], tmp_path: Path) -> None:
    """Modules, devices and sockets: 50,000 objects, and of one device 2000 that are made later."""
    (tmp_path / "device.py").write_text(_COUNTED)
    async with serve_process(*more, "--device", "device.py:Counted", folder=tmp_path) as served:
        with client_of(served.sockets[0]) as client:
            await client.version()
            await client.send(status_write(client, 0))
            await read_status(client)
    counted = (tmp_path / "counted").read_text().split()
    assert int(counted[-1]) < 700, counted


def test_the_command_loads_late_what_libraries_import_for_nothing() -> None:
    script = """
import sys
from vfiouser_virtio.__main__ import main
try:
    main()
except SystemExit:
    import trio, construct
    print("ssl" in sys.modules, "_ssl" in sys.modules, "_pickle" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "True False False"


def test_a_device_file_needs_no_server() -> None:
    """What a test of a device imports."""
    script = "import sys; from vfiouser_virtio import Chain, Device, Size, queue; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = set(ended.stdout.split())
    assert "vfiouser_virtio.virtio.device" in found
    assert not found & {"vfiouser_virtio.vfio_user", "vfiouser_virtio.serving", "vfiouser_virtio.cli"}
