"""A BAR that QEMU maps: Linux reads and writes its memory without a message, and its trapped pages with one each."""

from pathlib import Path

import pytest
import trio
from support.frames import PAGE, Frames

from vfiouser_virtio import vm
from vfiouser_virtio.vfio_user import Server, listen_path

pytestmark = pytest.mark.qemu


async def test_linux_reaches_mapped_pages_without_messages(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path
) -> None:
    frames = Frames()
    view, messages = frames.mapping.view, frames.function.messages
    path = tmp_path / "frames.sock"
    device = {"driver": "vfio-user-pci", "addr": "5", "socket": {"type": "unix", "path": str(path)}}
    with listen_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(frames.function).serve, listener)
            async with vm.boot_guest(qemu, guest_image, devices=[device]) as guest:

                async def run(command: str) -> list[str]:
                    place = "cd /sys/bus/pci/devices/0000:00:05.0 && bar=$(sed -n 3p resource | cut -d' ' -f1) && "
                    return (await guest.run(place + command, check=True)).output.split()

                await run("echo 1 >enable")
                messages.clear()
                at = f"$((bar + {PAGE}))"
                await run(f"devmem {at} 32 0x12345678")
                assert bytes(view[PAGE : PAGE + 5]) == b"\x78\x56\x34\x12\0"
                view[4 * PAGE + 16 : 4 * PAGE + 24] = b"\x88\x77\x66\x55\x44\x33\x22\x11"
                assert await run(f"devmem $((bar + {4 * PAGE + 16})) 64") == ["0x1122334455667788"]
                assert await run(f"i=0; while [ $i -lt 50 ]; do devmem {at} 16; i=$((i + 1)); done | sort -u") == [
                    "0x5678"
                ]
                assert messages == []

                await run(f"devmem $((bar + {2 * PAGE})) 16 0xabcd")
                assert await run("devmem $((bar + 8)) 32") == ["0x00000000"]
                assert messages == [("write", 2 * PAGE, 2), ("read", 8, 4)]
                assert frames.trapped[2 * PAGE : 2 * PAGE + 2] == b"\xcd\xab"

                # Sizing by hand: the guest takes the BAR away, and finds its memory where it puts it again.
                await run("echo 0 >enable; echo 1 >enable")
                assert await run(f"devmem {at} 32") == ["0x12345678"]
                await guest.reboot()
                await run("echo 1 >enable")
                messages.clear()
                assert await run(f"devmem {at} 32") == ["0x12345678"]
                assert messages == []
            nursery.cancel_scope.cancel()
