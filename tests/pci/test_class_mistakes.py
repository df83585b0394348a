"""Mistakes in the class body of a `PciDevice`: each is one clear line, where the class is defined or made."""

import textwrap

import pytest

from vfiouser_virtio import pci
from vfiouser_virtio.errors import AuthorError

BAR = "regs = bar(0, size=0x10)"

MISTAKES = {
    "size": ("regs = bar(0, size=0x1800)", "bar(0): a 32-bit memory BAR has a power of two from 16"),
    "index": ("regs = bar(7, size=0x100)", "bar(7): a 32-bit memory BAR has index 0 to 5"),
    "last wide": ("regs = bar(5, size=0x100, kind=BarKind.MEM64)", "a 64-bit memory BAR has index 0 to 4"),
    "kind": ("regs = bar(0, size=0x100, kind='io')", "bar(0): kind='io': expected BarKind.MEM32"),
    "prefetchable": ("regs = bar(0, size=0x100, kind=BarKind.IO, prefetchable=True)", "cannot be prefetchable"),
    "widths": ("regs = bar(0, size=0x100, widths=3)", "widths=3: expected some of 1, 2, 4 and 8"),
    "upper half": (
        "regs = bar(0, size=0x100, kind=BarKind.MEM64)\nmore = bar(1, size=0x100)",
        "Chip.more: BAR 1 is declared already, by regs",
    ),
    "msix": (f"{BAR}\nirq = interrupts(1, msix_bar=0)", "Chip.irq: msix_bar=0 is regs: MSI-X' table has a BAR"),
    "bar": ("regs = bar", "Chip.regs: bar is a function: write regs = bar(index, size=…)"),
    "offset": (f"{BAR}\na = Register('0')", "offset '0': expected a number"),
    "class": (f"{BAR}\na = Register", "Chip.a: Register is a class: write a = Register(offset)"),
    "field": (f"{BAR}\na = flag(0)", "Chip.a: a field is declared in a subclass of Register"),
    "array": (f"{BAR}\na = array(Register, count=2)", "array(<class"),
    "banks": (f"{BAR}\na = banks(Register(0), 0, count=2, stride=8)", "expected a class: class Channel(Bank)"),
    "hook": (
        f"{BAR}\na = Register(0)\n@a.on_write\nasync def written(self): ...",
        "Chip: a: its hook written() is async: hooks are plain methods",
    ),
    "run": ("def run(self): ...", "Chip.run() is not async: write `async def run(self) -> None`"),
    "generator": ("async def run(self):\n    yield", "Chip.run() has a `yield`"),
    "reset": ("async def reset(self): ...", "Chip.reset() is async: hooks are plain functions"),
    "one capability": ("capabilities = vendor_capability(b'1')", "this is one capability: write (…,)"),
    "list": ("capabilities = [vendor_capability(b'1')]", "expected a tuple of Capability and ExtendedCapability"),
    "bytes": ("capabilities = (b'1234',)", "b'1234' in it: expected Capability or ExtendedCapability"),
    "short": ("capabilities = (Capability(b'1'),)", "one of 1 bytes: its id and where the next one is take 2"),
    "identity": ("identity = (1, 2)", "Chip.identity: (1, 2): expected Identity(vendor=…, device=…)"),
    "irq": ("irq = 3", "Chip.irq: expected interrupts(…)"),
    "name": ("name = 5", "Chip.name: 5: expected text"),
}


@pytest.mark.parametrize(("body", "words"), MISTAKES.values(), ids=MISTAKES)
def test_one_line_says_what_is_wrong(body: str, words: str) -> None:
    source = f"class Chip(pci.PciDevice):\n    identity = Identity(1, 2)\n{textwrap.indent(body, '    ')}\nChip()\n"
    names = {name: getattr(pci, name) for name in pci.__all__}
    with pytest.raises(AuthorError) as caught:
        exec(compile(source, "chip.py", "exec"), {"pci": pci, "__name__": "chip", **names})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_right_in_a_body() -> None:
    class Chip(pci.PciDevice):
        identity = pci.Identity(1, 2)
        capabilities = (pci.vendor_capability(b"1"), pci.serial_number_capability(1))
        regs = pci.bar(0, size=0x10)

        class Control(pci.Register):
            enable = pci.flag(0)

        control = Control(0)

        async def run(self) -> None:
            await super().run()

    assert not Chip().control.enable


def test_a_bank_is_looked_at_as_well() -> None:
    with pytest.raises(AuthorError, match=r"^Channel\.start: Doorbell is a class"):
        type("Channel", (pci.Bank,), {"start": pci.Doorbell})
