"""ACCES PCI-IDIO-16: 16 outputs and 16 inputs, with an interrupt when an input changes, for gpio-pci-idio-16.

Facts: ACCES I/O Products, PCI-IDIO-16 manual, chapter 4: eight I/O ports, most of them another thing to a reader than
to a writer. Of the interrupt status at +6, bit 2 is what Linux takes for "one of the inputs has changed".
"""

from vfiouser_virtio import main
from vfiouser_virtio.pci import BarKind, Identity, PciDevice, Register, bar, interrupts

CHANGED = 0x04


class Idio16(PciDevice):
    """Set ``inputs``, look at ``outputs``: 16 bits each. ``loopback`` wires each output to the input of its number."""

    identity = Identity(vendor=0x494F, device=0x0DC8, class_code=0x078000)
    irq = interrupts(1)

    ports = bar(2, size=8, kind=BarKind.IO)
    outputs_low = Register(0, width=8)
    inputs_low = Register(1, width=8, access="ro")
    """A write of anything acknowledges the interrupt."""
    irq_enable = Register(2, width=8, access="ro")
    """A read turns the interrupt on, a write of anything turns it off."""
    filter_all = Register(3, width=8, access="ro")
    """A read turns the filters of all inputs on, a write of anything turns them off: here no input bounces."""
    outputs_high = Register(4, width=8)
    inputs_high = Register(5, width=8, access="ro")
    irq_status = Register(6, width=8, access="ro")
    filters = Register(7, width=8)

    def __init__(self, *, loopback: bool = False) -> None:
        super().__init__()
        self.loopback = loopback
        self.enabled = False

    def reset(self) -> None:
        self.enabled = False

    @property
    def outputs(self) -> int:
        """The outputs, 16 bits."""
        return self.outputs_high.value << 8 | self.outputs_low.value

    @property
    def inputs(self) -> int:
        """The inputs, 16 bits; each change of them is an interrupt."""
        return self.inputs_high.value << 8 | self.inputs_low.value

    @inputs.setter
    def inputs(self, value: int) -> None:
        changed = value != self.inputs
        self.inputs_high.value, self.inputs_low.value = divmod(value, 256)
        if changed and self.enabled:
            self.irq_status.value = CHANGED
            self.irq[0].set(True)

    @outputs_low.on_write
    @outputs_high.on_write
    def driven(self, _value: int) -> None:
        if self.loopback:
            self.inputs = self.outputs

    @inputs_low.on_write
    def acknowledged(self, _value: int) -> None:
        self.irq_status.value = 0
        self.irq[0].set(False)

    @irq_enable.on_read
    def irq_on(self) -> None:
        self.enabled = True

    @irq_enable.on_write
    def irq_off(self, _value: int) -> None:
        self.enabled = False

    @filter_all.on_read
    def filter_on(self) -> None:
        self.filters.value = 0xFF

    @filter_all.on_write
    def filter_off(self, _value: int) -> None:
        self.filters.value = 0


if __name__ == "__main__":
    main(Idio16)
