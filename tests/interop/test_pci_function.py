"""A PCI function that is no virtio device, in front of a real QEMU and Linux: BARs of each kind, MSI, FLR, PM reset."""

from pathlib import Path

import pytest
import trio
from support.pci import Machine

from vfiouser_virtio import vm
from vfiouser_virtio.vfio_user import Server, listen_path

pytestmark = pytest.mark.qemu

BAR_TYPES = r"""
cut -d' ' -f3 resource | head -6
"""

SCRATCH = r"""
bar=$(head -1 resource | cut -d' ' -f1)
echo 1 >enable
devmem $bar 32 0xdeadbeef
devmem $((bar + 1)) 16
devmem $bar 64
"""

PORTS = r"""
printf '\125' | dd of=resource4 bs=1 seek=3 conv=notrunc 2>/dev/null
dd if=resource4 bs=1 skip=3 count=1 2>/dev/null | od -An -tx1
"""

# A driver's steps by hand: four messages to the local APIC, with vectors that Linux has no handler for, and says so.
MSI = r"""
poke() { printf "$2" | dd of=config bs=$3 seek=$(($1 / $3)) conv=notrunc 2>/dev/null; }
poke 4 '\006\000' 2
poke $((msi + 4)) '\000\000\340\376' 4
poke $((msi + 12)) '\320\000' 2
poke $((msi + 16)) "$mask" 4
poke $((msi + 2)) '\041\000' 2
"""

HEARD = r"""
until dmesg | grep "No irq handler" | grep -q "0\.$last"; do sleep 0.1; done
dmesg | grep "No irq handler" | grep -o '0\.2\(0[89]\|1[01]\)' | sort
"""  # which side of it the vector is on depends on Linux; a busy machine's guest may have others to complain about


async def test_linux_uses_and_resets_a_raw_function(qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path) -> None:
    machine = Machine(vectors=4)
    msi_cap = machine.function.add_msi(4)
    path = tmp_path / "raw.sock"
    device = {"driver": "vfio-user-pci", "addr": "5", "socket": {"type": "unix", "path": str(path)}}
    with listen_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(machine.function).serve, listener)
            async with vm.boot_guest(qemu, guest_image, devices=[device]) as guest:

                async def run(command: str) -> list[str]:
                    place = "cd /sys/bus/pci/devices/0000:00:05.0 && "
                    return (await guest.run(place + command.strip(), check=True)).output.split()

                types = [int(word, 16) & 0x10_2300 for word in await run(BAR_TYPES)]
                # IORESOURCE_MEM, MEM, MEM | PREFETCH | MEM_64, none, IO, none
                assert types == [0x200, 0x200, 0x10_2200, 0, 0x100, 0]
                assert await run(SCRATCH) == ["0xADBE", "0x00000000DEADBEEF"]
                assert machine.memory[Machine.SCRATCH][:5] == b"\xef\xbe\xad\xde\0"
                assert await run(PORTS) == ["55"]
                assert machine.memory[Machine.PORTS][3] == 0x55

                await run(f"msi={msi_cap} mask='\\002\\000\\000\\000'" + MSI)
                for vector in (0, 1, 3):
                    machine.function.irq(vector)
                assert await run("last=211" + HEARD) == ["0.208", "0.211"]
                await run(f"msi={msi_cap} mask='\\000\\000\\000\\000'" + MSI)
                assert await run("last=209" + HEARD) == ["0.208", "0.209", "0.211"], "sent when it is unmasked"

                assert await run("cat reset_method") == ["flr", "pm"]
                for method in ("flr", "pm"):
                    machine.calls.clear()
                    await run(f"echo {method} >reset_method && echo 1 >reset")
                    assert machine.calls.count("reset") == 1, method
                    assert (await run(SCRATCH))[0] == "0xADBE", "Linux restored COMMAND and the BARs"
            nursery.cancel_scope.cancel()
