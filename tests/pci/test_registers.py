"""Registers of a `PciDevice` as a driver sees them: access, fields, hooks, widths, arrays and banks."""

import logging

import pytest
from support.pci_chip import Chip, Control, Driven

from vfiouser_virtio.errors import AuthorError, PeerError
from vfiouser_virtio.pci import (
    Bank,
    BarMemory,
    Fifo,
    Identity,
    PciDevice,
    Register,
    array,
    bar,
    field,
    flag,
    interrupts,
)
from vfiouser_virtio.transports.pci_device import PciDeviceFunction


def test_what_a_driver_may_do_with_bits(chip: Chip, driver: Driven) -> None:
    driver.write(0x00, 0)
    assert driver.read(0x00) == 0x0123_4567  # ro
    assert driver.read(0x08) == 0xFF
    assert driver.read(0x08) == 0  # rc
    driver.write(0x0C, 0x1234)
    assert driver.read(0x0C) == 0  # wo
    assert chip.secret.value == 0x1234
    driver.write(0x10, 0b0101)
    driver.write(0x10, 0b0010)
    assert driver.read(0x10) == 0b0111  # w1s
    driver.write(0x18, 0xFFFF_FFFF)
    assert driver.read(0x18) == 0x11FF_00FF  # writable


def test_fields_have_an_access_of_their_own(chip: Chip, driver: Driven) -> None:
    driver.write(0x04, 0x7FFF_FFFF)
    assert driver.read(0x04) == 0x8000_000F  # bits of no field are reserved, and done is cleared by a one
    assert chip.control.enable
    assert chip.control.mode == 7
    driver.write(0x04, 0x8000_0000)
    assert driver.read(0x04) == 0
    chip.control.mode = 5
    chip.control["enable"] = 1
    assert driver.read(0x04) == 0b1011
    assert chip.control["mode"] == 5
    with pytest.raises(AuthorError, match=r"control\.mode = 0x8: it has 3 bits"):
        chip.control.mode = 8
    with pytest.raises(AuthorError, match=r"strict = .* it has 32 bits"):
        chip.strict.value = 1 << 32
    assert list(Control.fields()) == ["enable", "mode", "done"]


def test_a_read_clears_only_what_it_has_read() -> None:
    class Counters(Base):
        regs = bar(0, size=0x100)
        wide = Register(0x00, width=64, access="rc", reset=0x1111_0000_2222)
        events = Register(0x08, access="rc", reset=0x0403_0201)

    driver = Driven(Counters())
    assert [driver.read(0, 4), driver.read(4, 4), driver.read(0, 8)] == [0x2222, 0x1111, 0]
    assert [driver.read(8, 1), driver.read(10, 2), driver.read(8, 4)] == [0x01, 0x0403, 0x0200]
    assert driver.read(8) == 0


def test_bytes_that_are_not_written_stay(chip: Chip, driver: Driven) -> None:
    driver.write(0x04, 0b1111)
    driver.write(0x07, 0x80, 1)  # clears done; a byte of zeros elsewhere would have cleared the rest
    assert driver.read(0x04) == 0b1111
    assert chip.calls[-1] == ("control", 0x8000_000F, 0x8000_000F)
    driver.write(0x04, 0x00, 1)
    assert chip.calls[-1] == ("control", 0x0000_0000, 0xF)


def test_accesses_are_split_and_merged(chip: Chip, driver: Driven) -> None:
    assert driver.read(0x02, 2) == 0x0123
    assert driver.read(0x00, 8) == 0x8000_0000_0123_4567
    assert driver.read(0x03, 3) == 0x00_0001
    driver.write(0x22, 0x4433_2211)
    assert [each.value for each in chip.scratch] == [0, 0x2211, 0x4433, 0]
    assert chip.calls == [("scratch", 1, 0x2211), ("scratch", 2, 0x4433)]
    driver.write(0x100, 0x1122_3344)
    driver.write(0x104, 0x5566_7788)
    assert chip.channels[0].address.value == 0x5566_7788_1122_3344
    assert driver.read(0x7FE, 8) == int.from_bytes(b"\0\0hello\0", "little")
    assert driver.read(0x800, 0x20) == int.from_bytes(b"hello", "little")


def test_hooks(chip: Chip, driver: Driven) -> None:
    assert [driver.read(0x30), driver.read(0x30)] == [1, 2]
    driver.write(0x130, 0xABCD, 8)
    driver.write(0x138, 7)
    assert chip.calls == [("start", 3, 7, 0xABCD)]
    driver.write(0x8F0, 0x41, 1)
    assert chip.calls[-1] == ("ram", 0xF0, 1)
    assert chip.ram.data[0xF0] == 0x41


def test_a_subclass_replaces_a_hook_and_adds_registers() -> None:
    class More(Chip):
        extra = Register(0x8, bar=2)

        def control_written(self, value: int, old: int) -> None:
            self.calls.append(("more", value, old))

    more = More()
    driver = Driven(more)
    driver.write(0x04, 1)
    assert more.calls == [("more", 1, 0x8000_0000)]
    driver.write(0x08, 5, region=2)
    assert more.extra.value == 5


def test_a_fifo(chip: Chip, driver: Driven) -> None:
    assert driver.read(0x40, 1) == 0xEE
    assert [chip.port.push(value) for value in (1, 2, 3)] == [True, True, False]
    assert [driver.read(0x40, 1) for _ in range(3)] == [1, 2, 0xEE]
    for value in (5, 6, 7):
        driver.write(0x40, value, 1)
    assert list(chip.port.from_driver) == [5, 6]
    assert (chip.port.underruns, chip.port.overruns) == (2, 1)


def test_widths_that_are_not_allowed_are_told(driver: Driven, caplog: pytest.LogCaptureFixture) -> None:
    driver.write(0x14, 0x1234_5678)
    assert driver.read(0x14, 2) == 0xFFFF
    driver.write(0x16, 0, 2)
    assert driver.read(0x10, 8) == (1 << 64) - 1
    assert driver.read(0x14) == 0x1234_5678
    assert "reads 2 bytes at BAR0+0x14, but accesses of strict have 4, aligned: it reads as all-ones" in caplog.text
    assert "writes 2 bytes at BAR0+0x16, but accesses of strict have 4, aligned: it is lost" in caplog.text
    assert driver.read(0x0, 2, region=2) == 0xFFFF
    assert driver.read(0x2, 4, region=2) == 0xFFFF_FFFF
    assert "accesses of BAR2 have 4 or 8, aligned" in caplog.text
    driver.write(0x0, 1 << 40, 8, region=2)
    assert driver.read(0x4, 4, region=2) == 1 << 8


def test_what_is_not_modelled_is_told_once(driver: Driven, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert driver.read(0x500) == 0
        driver.write(0x504, 0x1234)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "chip0: the driver reads 4 bytes at BAR0+0x500, which is not modelled",
        "chip0: the driver writes 0x1234 in 4 bytes at BAR0+0x504, which is not modelled",
    ]


def test_a_bug_in_a_hook_is_told_and_the_device_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(PciDevice):
        identity = Identity(1, 2)
        regs = bar(0, size=0x100)
        bad = Register(0x00)
        good = Register(0x04)

        @bad.on_write
        def broken(self, value: int) -> None:
            raise ZeroDivisionError(value)

        @bad.on_read
        def broken_too(self) -> int:
            return -1

    driver = Driven(Buggy())
    driver.write(0x00, 1)
    driver.write(0x04, 2)
    assert driver.read(0x00, 8) == 0x2_FFFF_FFFF
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 2
    assert "a bug in the device, in a write of bad: " in messages[0]
    assert "ZeroDivisionError: 1" in messages[0]
    assert __file__.rpartition("/")[2] in messages[0]
    assert "bad = -0x1: it has 32 bits" in messages[1]


def test_a_whole_bar_in_one_access() -> None:
    class Big(PciDevice):
        identity = Identity(1, 2)
        regs = bar(0, size=0x1000)
        words = array(Register(0), count=0x3FF)

    big = Big()
    driver = Driven(big)
    data = bytes(range(256)) * 0x10
    driver.function.region_write(0, 0, memoryview(data))
    assert big.words[0x123].value == int.from_bytes(data[4 * 0x123 :][:4], "little")
    assert bytes(driver.function.region_read(0, 0, len(data))) == data[:-4] + bytes(4)


def test_an_access_of_too_many_registers() -> None:
    class Huge(PciDevice):
        identity = Identity(1, 2)
        regs = bar(0, size=1 << 20)
        table = array(Register(0), count=65536, stride=16)

    device = Huge()
    driver = Driven(device)
    why = r"of 0x100000 bytes at BAR0\+0x0: 65536 registers are there, and 1024 at once are the most"
    with pytest.raises(PeerError, match=f"read {why}"):
        driver.read(0, 1 << 20)
    with pytest.raises(PeerError, match=f"write {why}"):
        driver.write(0, 0, 1 << 20)
    assert not device.table[0].reads
    assert driver.read(0x1000, 1024 * 16) == 0
    assert device.table[0x100].reads == 1


def test_reset(chip: Chip, driver: Driven) -> None:
    driver.write(0x04, 1)
    driver.write(0x800, 0)
    driver.write(0x40, 1, 1)
    driver.function.reset()
    driver.command(2)
    assert chip.calls[-1] == ("reset",)
    assert driver.read(0x04) == 0x8000_0000
    assert bytes(chip.ram.data[:5]) == b"hello"
    assert not chip.port.from_driver


def test_what_is_sticky_is_kept_over_resets() -> None:
    class Kept(PciDevice):
        identity = Identity(1, 2)
        regs = bar(0, size=0x2000)
        serial = Register(0x00, reset=7, sticky=True)
        flash = BarMemory(0x40, size=8, contents=b"flash", sticky=True)
        pages = BarMemory(0x1000, size=0x1000, contents=b"pages", sticky=True, mapped=True)

        def __init__(self) -> None:
            super().__init__()
            self.flash.data[5:8] = b"set"
            self.pages.data[5:8] = b"set"

    device = Kept()
    driver = Driven(device)
    assert (driver.read(0), bytes(device.flash.data), bytes(device.pages.data[:8])) == (7, b"flashset", b"pagesset")
    driver.write(0, 8)
    driver.write(0x40, ord("F"), 1)
    driver.write(0x1000, ord("P"), 1)
    for reset in (driver.function.reset, device.soft_reset):
        reset()
        driver.command(2)
        assert (driver.read(0), bytes(device.flash.data), bytes(device.pages.data[:8])) == (8, b"Flashset", b"Pagesset")


def test_a_misspelt_field_is_told(caplog: pytest.LogCaptureFixture) -> None:
    device = Chip()
    driver = Driven(device)
    device.control.done = True
    driver.function.disconnected()
    assert "no field" not in caplog.text
    driver = Driven(device)
    device.control.dnoe = True  # type: ignore[attr-defined]
    driver.function.disconnected()
    assert "chip0: a bug in the device: control has no field 'dnoe', to which it has assigned" in caplog.text


def test_devices_of_a_class_have_registers_of_their_own(chip: Chip) -> None:
    other = Chip()
    other.control.value = 1
    other.channels[1].address.value = 5
    other.ram.data[0] = 0
    assert chip.control.value == 0x8000_0000
    assert chip.channels[1].address.value == 0
    assert chip.ram.data[0] == ord("h")
    assert chip.channels[3].address.name == "channels[3].address"


class Base(PciDevice):
    identity = Identity(1, 2)


def test_mistakes_of_authors_are_named() -> None:
    def make(expected: str, **body: object) -> None:
        with pytest.raises(AuthorError, match=expected):
            type("Wrong", (Base,), body)()

    regs = bar(0, size=0x100)
    make("declare its BAR above it", one=Register(0))
    make("overlap", regs=regs, one=Register(0), two=Register(2, width=16))
    make(r"ends at 0x104, behind BAR 0 of 0x100 bytes", regs=regs, one=Register(0x100))
    make("ends at 0x110", regs=regs, many=array(Register(0), count=4, stride=0x44) and array(Register(0x100), count=4))
    make("every device has already", regs=regs, log=Register(0))
    make(r"expected interrupts\(…\)", irq=3)
    with pytest.raises(AuthorError, match="multiple of 4"):
        Register(2)
    with pytest.raises(AuthorError, match="8, 16, 32 or 64"):
        Register(0, width=24)
    with pytest.raises(AuthorError, match="does not fit its 8 bits"):
        Register(0, width=8, reset=0x100)
    with pytest.raises(AuthorError, match="highest and the lowest bit"):
        field(1, 3)
    with pytest.raises(AuthorError, match="a pin of 0 to 4"):
        interrupts(1, pin=5)
    with pytest.raises(AuthorError, match="contents"):
        BarMemory(0, size=2, contents=b"abc")
    with pytest.raises(AuthorError, match="have two fields"):
        type("Twice", (Register,), {"one": field(3, 0), "two": flag(2)})(0)

    make("Wrong: one .* and two overlap", regs=regs, one=Register(0), two=Register(2, width=16))
    make("BAR 0 is declared already", regs=regs, one=Register(0), more=bar(0, size=0x100), two=Register(4))
    for name in ("index", "device"):
        with pytest.raises(AuthorError, match="every bank has already"):
            type("WrongBank", (Bank,), {name: Register(0)})
    for wrong in (lambda: bar(0, size=0x100, widths={32}), lambda: Register(0, widths=(3,))):
        with pytest.raises(AuthorError, match="expected some of 1, 2, 4 and 8"):
            wrong()


def test_what_is_declared_is_not_replaced(chip: Chip) -> None:
    for of, name in ((chip, "control"), (chip, "scratch"), (chip, "ram"), (chip.channels[0], "address")):
        with pytest.raises(AuthorError, match=rf"{name} = …: no driver would see 5; assign to self\.{name}\.value"):
            setattr(of, name, 5)
    with pytest.raises(AuthorError, match=r"irq = interrupts\(…\)"):
        chip.irq = []  # pyright: ignore[reportAttributeAccessIssue]
    chip.count = 7
    chip.control.mode = 3


def test_a_hook_on_a_register_of_the_base_class_is_a_mistake() -> None:
    for hook in (Chip.ident.on_write, Chip.control.on_read, Chip.scratch.on_write, Chip.ram.on_write):
        with pytest.raises(AuthorError, match="is of Chip, which would have this hook too"):
            hook(lambda _: None)


def test_a_layout_that_cannot_be_names_the_class() -> None:
    with pytest.raises(AuthorError, match=r"^Wrong\.irq: msix_bar=9 is none of 0 to 5"):
        type("Wrong", (Base,), {"irq": interrupts(1, msix_bar=9)})()

    class Without(Base):
        def __init__(self) -> None: ...

    with pytest.raises(AuthorError, match=r"Without.__init__\(\) does not call super\(\).__init__\(\)"):
        PciDeviceFunction(Without())


def test_what_no_access_reaches_is_a_mistake() -> None:
    class Narrow(Base):
        words = bar(2, size=0x100, widths={4, 8})
        port = Fifo(0x10, depth=4, width=8)

    why = "^Narrow: port: its accesses have 1 bytes, those of BAR 2 4 or 8: none reaches it$"
    with pytest.raises(AuthorError, match=why):
        Narrow()


def test_widths_count_from_where_the_register_is() -> None:
    class Far(Base):
        regs = bar(0, size=0x100)
        wide = Register(0x14, width=64, widths=(4, 8), reset=0x1122_3344_5566_7788)

    driver = Driven(Far())
    assert driver.read(0x14, 8) == 0x1122_3344_5566_7788
    assert driver.read(0x18, 4) == 0x1122_3344
    assert driver.read(0x18, 8) == 0xFFFF_FFFF_FFFF_FFFF, "not aligned in the register"


def test_a_hook_with_the_name_of_its_register_is_a_mistake() -> None:
    with pytest.raises(AuthorError, match="give its hook another name"):

        class _Wrong(PciDevice):
            regs = bar(0, size=0x100)

            one = Register(0)  # pyright: ignore[reportAssignmentType]

            @one.on_write  # type: ignore[no-redef]
            def one(self, value: int) -> None: ...


def test_a_hook_with_other_parameters_is_a_mistake() -> None:
    class Wrong(Base):
        regs = bar(0, size=0x100)
        one = Register(0)

        @one.on_write
        def written(self, one: int, two: int, three: int) -> None: ...

    with pytest.raises(AuthorError, match=r"one: its hook written\(\) has 3 parameters beside self, not 0 to 2"):
        Wrong()


def test_registers_are_there_after_init() -> None:
    class Early(Base):
        regs = bar(0, size=0x100)
        one = Register(0)

        def __init__(self) -> None:
            self.one.value = 1
            super().__init__()

    with pytest.raises(AuthorError, match=r"there is no self\.one before super\(\).__init__\(\) was called"):
        Early()
