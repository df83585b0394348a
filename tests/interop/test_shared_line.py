"""Two functions on one interrupt line, one of which takes back what it has said: Linux must not turn the line off."""

import pytest
import trio
from pci.uart import Uart
from support import gallery

from vfiouser_virtio import serve, vm
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.pci import Identity, PciDevice, Register, bar

pytestmark = [pytest.mark.qemu, pytest.mark.variant]


class Pulse(PciDevice):
    """Its interrupt is over before QEMU can have heard of it: as of a driver that looks, and was quicker.

    In a read QEMU holds its lock, which it takes to be interrupted; so this is not by chance.
    """

    identity = Identity(vendor=0x1234, device=0x9015, class_code=0xFF0000)
    regs = bar(0, size=0x1000)
    pulse = Register(0x00)

    @pulse.on_read
    def read(self) -> None:
        self.irq[0].set(True)
        self.irq[0].set(False)


# uio_pci_generic asks config space alone whether its device has interrupted: QEMU would keep the line up.
SCRIPT = (
    f"set -e\n{gallery.FIND}{gallery.TTY}"
    r"""
echo 1234 9015 >/sys/bus/pci/drivers/uio_pci_generic/new_id
pulse=$(find_device 1234:9015)
bar=$(head -n 1 $pulse/resource | cut -d' ' -f1)
[ $(cat $pulse/irq) = $(cat $device/irq) ]
exec 4</dev/uio0
stty -F /dev/$tty 115200 raw -echo
exec 3<>/dev/$tty
talk() {
    for n in 1 2 3; do seq 100 199 >&3; head -c 400 <&3 | sha256sum; done
}
talk &
for n in $(seq 30); do devmem $bar >/dev/null; done
wait
talk
irqs uio_pci_generic
dmesg | grep -c "nobody cared" || true
"""
)


async def test_an_interrupt_that_is_over_leaves_the_line_to_others() -> None:
    image = vm.guest_image("trixie:amd64", more_modules=("8250_pci", "uio_pci_generic"))
    chardev, stream = pair()
    async with stream, serve(Uart(chardev=chardev), Pulse()) as served, trio.open_nursery() as nursery:

        async def echo() -> None:
            async for data in stream:
                await stream.send_all(data)

        nursery.start_soon(echo)
        places: list[dict[str, object]] = [{"addr": "6.0", "multifunction": True}, {"addr": "6.1"}]
        devices = [{**each, **place} for each, place in zip(served.qemu_devices, places, strict=True)]
        async with vm.boot_guest(vm.find_qemu(), image, devices=devices) as guest:
            *sums, interrupts, complaints = (await guest.run(SCRIPT, timeout=240, check=True)).output.splitlines()
        assert len(sums) == 6
        assert len(set(sums)) == 1
        # The port's own: some for each 16 bytes. A line that stays up brings 100,000, until Linux turns it off.
        assert int(interrupts) < 10_000
        assert complaints == "0"
        nursery.cancel_scope.cancel()
