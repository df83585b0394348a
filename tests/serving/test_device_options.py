"""A class's constructor is its options."""

from pathlib import Path
from typing import Annotated, ClassVar

import pytest

from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.serving.device_setup import (
    DeviceSetup,
    common_options,
    limit_options,
    offer_options,
    setups,
    shipped_classes,
)
from vfiouser_virtio.serving.device_specs import parse_device
from vfiouser_virtio.serving.options import class_options, convert_options
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.virtio import Device, Limits, Offer, bus
from vfiouser_virtio.virtio.options import Making, OneOf, Size

SECTOR = Size(512)


class Toy(Device):
    device_id = 42

    def __init__(  # type: ignore[no-untyped-def] # the type of greeting is that of its default
        self,
        path: Annotated[Path, "where it is"],
        *,
        num_queues: Annotated[int, "how many"] = 1,
        size: Size = SECTOR,
        readonly: bool = False,
        greeting="hello",
        backend: object = None,
    ) -> None:
        super().__init__()


class Plain(Device):
    device_id = 42


def only(text: str) -> DeviceSetup:
    (setup,) = setups([parse_device(text)])
    return setup


def test_options_are_read_off_the_constructor() -> None:
    options = class_options(Toy)
    assert list(options) == ["path", "num-queues", "size", "readonly", "greeting"]
    assert (options["num-queues"].help, options["num-queues"].kind.shown) == ("how many", "N")
    assert options["greeting"].kind.shown == "TEXT"
    assert class_options(Plain) == {}


def test_a_parameter_that_nobody_can_give() -> None:
    class Hopeless(Device):
        def __init__(self, backend: object) -> None:
            super().__init__()

    with pytest.raises(ConfigError, match="no option can give backend"):
        class_options(Hopeless)


def test_an_annotation_that_names_nothing() -> None:
    class Wrong(Device):
        def __init__(self, size: "Sise") -> None:  # type: ignore[name-defined] # noqa: F821 - that is the mistake
            super().__init__()

    with pytest.raises(ConfigError, match=r"Wrong.*Sise"):
        class_options(Wrong)


def test_conversion() -> None:
    given = {"path": "a", "num_queues": "4", "size": "1M", "readonly": None}
    assert convert_options(class_options(Toy), given, label="toy") == {
        "path": Path("a"),
        "num_queues": 4,
        "size": 1 << 20,
        "readonly": True,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pat": "x"}, 'toy: no option "pat"; did you mean "path"?'),
        ({}, "toy: path=PATH is missing (where it is)"),
        ({"path": None}, "toy: path needs a value: path=PATH"),
        ({"path": "a", "num-queues": "many"}, "toy: num-queues=many: expected a whole number"),
        ({"path": "a", "num-queues": "1", "num_queues": "2"}, "toy: num-queues is given twice"),
        ({"path": ["a", "b"]}, "toy: path is given 2 times"),
        ({"path": "a", "backend": "x"}, 'toy: no option "backend"'),
    ],
)
def test_mistakes(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert_options(class_options(Toy), given, label="toy")
    assert str(caught.value).startswith(message)


# ---- an object of one of several classes -----------------------------------------------------------------------------


class Cable:
    def __init__(self, addr__path: Annotated[str, "where it goes"], length: Annotated[int, "metres"] = 1) -> None:
        self.path, self.length, self.closed = addr__path, length, False

    def close(self) -> None:
        self.closed = True


class Radio:
    def __init__(self, *, radio: Annotated[str, "name"], length: Annotated[int, "of the wave"] = 3) -> None:
        self.radio, self.length = radio, length
        if length < 0:
            raise DeviceError("no such wave")

    def close(self) -> None:
        pass


class Wired(Device):
    device_id = 42
    made: ClassVar[list[Cable]] = []

    def __init__(
        self,
        *,
        link: Annotated[Cable | Radio | None, OneOf({"cable": Cable, "radio": Radio}), "what it hangs on"] = None,
        broken: bool = False,
    ) -> None:
        super().__init__()
        self.link = link
        if isinstance(link, Cable):
            self.made.append(link)
        if broken:
            raise DeviceError("it is broken")


def wired(text: str) -> Cable | Radio | None:
    device = setups([parse_device(f"wired,{text}")._replace(device_class=Wired)])[0].make()
    assert isinstance(device, Wired)
    return device.link


def test_options_of_a_class_that_is_chosen_are_the_device_s() -> None:
    options = class_options(Wired)
    assert list(options) == ["link", "addr.path", "length", "radio", "broken"]
    assert options["length"].help == "metres"  # every one has it
    assert options["radio"].help == "link=radio: name"
    cable = wired("link=cable,addr.path=/x,length=5")
    assert isinstance(cable, Cable)
    assert (cable.path, cable.length) == ("/x", 5)
    radio = wired("radio=fm")  # by the option that has its name
    assert isinstance(radio, Radio)
    assert (radio.radio, radio.length) == ("fm", 3)
    assert wired("") is None


def tuned(*, band: Annotated[int, "of the radio"] = 2, length: Annotated[int, "of the wave"] = 3) -> Radio:
    return Radio(radio=f"band {band}", length=length)


class Tuned(Device):
    device_id = 42

    def __init__(
        self, link: Annotated[Radio | None, OneOf({"radio": Radio, "tuned": tuned}), "what it hangs on"] = None
    ) -> None:
        super().__init__()
        self.link = link


def test_a_function_may_make_what_is_chosen() -> None:
    options = class_options(Tuned)
    assert list(options) == ["link", "radio", "length", "band"]
    assert options["band"].help == "link=tuned: of the radio"
    assert options["length"].help == "of the wave"  # of all of them
    device = setups([parse_device("tuned,link=tuned,band=7,length=8")._replace(device_class=Tuned)])[0].make()
    assert isinstance(device, Tuned)
    assert device.link is not None
    assert (device.link.radio, device.link.length) == ("band 7", 8)


class Sharing(Device):
    device_id = 42

    def __init__(
        self,
        *,
        link: Annotated[
            Cable | Radio | None, OneOf({"cable": Cable, "radio": Radio}, shares=("length", "broken")), "its link"
        ] = None,
        length: Annotated[int, "of all of it"] = 7,
        broken: bool = False,
    ) -> None:
        super().__init__()
        self.link, self.length = link, length


@pytest.mark.parametrize(("text", "lengths"), [("link=cable,addr.path=x,length=5", (5, 5)), ("radio=fm", (7, 3))])
def test_a_parameter_that_the_device_shares_with_what_is_chosen(text: str, lengths: tuple[int, int]) -> None:
    """Where the user gives it: each has its own default; ``broken`` neither of the two classes knows."""
    assert class_options(Sharing)["length"].help == "of all of it"
    device = setups([parse_device(f"sharing,{text},broken=on")._replace(device_class=Sharing)])[0].make()
    assert isinstance(device, Sharing)
    assert device.link is not None
    assert (device.length, device.link.length) == lengths


def test_a_tap_has_as_many_queues_as_its_device() -> None:
    [setup] = setups([parse_device("net,netdev=tap,ifname=tap7,queues=3,host_tunnel=on,host-tunnel-csum=on")])
    tap = setup.arguments["netdev"]
    assert isinstance(tap, Making)
    assert tap.arguments == {"ifname": "tap7", "queues": 3}
    del setup.arguments["netdev"]
    assert setup.arguments == {"queues": 3, "host_tunnel": True, "host_tunnel_csum": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("link=rope", "wired: link=rope: expected one of cable, radio"),
        ("length=3", "wired: length goes with link=cable or link=radio"),
        ("radio=fm,addr.path=x", "wired: addr.path goes with link=cable, not with radio"),
        ("link=cable", "wired: link=cable: addr.path=TEXT is missing (link=cable: where it goes)"),
        ("link=cable,addr.path=x,length=far", "wired: length=far: expected a whole number"),
        ("radio=fm,length=-1", "wired: no such wave"),
    ],
)
def test_mistakes_with_a_class_that_is_chosen(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        wired(text)
    assert str(caught.value).startswith(message)


def test_what_was_made_for_a_device_is_closed_when_there_is_no_device() -> None:
    with pytest.raises(DeviceError, match="it is broken"):
        wired("link=cable,addr.path=/x,broken")
    assert Wired.made[-1].closed


def test_a_disk_is_made_in_a_thread_where_it_is_in_a_file() -> None:
    """The file's file system may hang; one in RAM waits for nothing."""
    in_ram, in_file, source = setups(map(parse_device, ("blk,size=1M", "blk,path=disk.img", "rng")))
    assert not in_ram.may_wait
    assert in_file.may_wait
    assert source.may_wait
    assert not in_file._replace(made=in_ram.create().device).may_wait


def test_names_are_unique() -> None:
    found = setups([parse_device(text) for text in ("rng", "blk,size=1M", "rng,id=rng1", "rng")])
    assert [setup.name for setup in found] == ["rng0", "blk0", "rng1", "rng2"]
    with pytest.raises(ConfigError, match="2 devices have id=a"):
        setups([parse_device("rng,id=a"), parse_device("rng,id=a")])
    with pytest.raises(ConfigError, match="2 devices have socket="):
        setups([parse_device("rng,socket=a"), parse_device("rng,socket=a")])


@pytest.mark.parametrize("written", ["rng,fault=used-never,fault-log", "net,netdev=null,dump"])
def test_two_devices_do_not_write_over_each_other(written: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    option = written.rpartition(",")[2]
    with pytest.raises(ConfigError, match=f"2 devices have {option}=.*/file: each needs one of its own"):
        setups([parse_device(f"{written}={tmp_path}/{name}") for name in ("file", "link/file")])
    setups([parse_device(f"{written}={name}") for name in ("/dev/null", "/dev/null")])


@pytest.mark.parametrize(
    "text", ["rng,id=0x", "rng,id=a b", "rng,vectors=-1", "rng,vectors=2049", "rng,ids=1999", "rng,revision=x"]
)
def test_common_mistakes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^rng: "):
        only(text)


def test_identity() -> None:
    shown = only("blk,size=1M,ids=2007,subsystem-vendor-id=0x1234,class-code=0x010000").identity("qemu")
    assert (shown.vendor, shown.device) == (0x5000, 0x1042)
    assert (shown.subsystem_vendor, shown.subsystem) == (0x1234, 0x1042)
    assert (shown.class_code, shown.revision) == (0x010000, 1)
    assert only("rng").identity("qemu").subsystem == 0x1100
    with pytest.raises(ConfigError, match=r"rng0: .*0x10000"):
        only("rng,vendor-id=0x10000").identity()


def test_create_names_the_device_at_fault(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"^blk: "):
        only(f"blk,path={tmp_path}/none").create()


def test_no_device_hides_a_common_option() -> None:
    for options in (limit_options(), offer_options(), *map(class_options, shipped_classes())):
        assert not options.keys() & common_options().keys()
    for options in (limit_options(), *map(class_options, shipped_classes())):
        assert not options.keys() & offer_options().keys()
    for options in map(class_options, shipped_classes()):
        assert not options.keys() & limit_options().keys()


def test_every_option_has_a_help_text() -> None:
    for device_class in shipped_classes():
        assert all(option.help for option in class_options(device_class).values()), device_class
    assert all(option.help for option in {**common_options(), **limit_options(), **offer_options()}.values())


# ---- how much a device does ----------------------------------------------------------------------------------------


def made(setup: DeviceSetup) -> VirtioPci:
    function = setup.create()
    assert isinstance(function, VirtioPci)
    return function


def test_limits() -> None:
    setup = only("rng,iops=500,iops-burst=7,bps=20M,packed=on")
    assert setup.limits == Limits(iops=500, iops_burst=7, bps=20 << 20)
    assert setup.offer.packed
    assert all(queue.meter is not None for queue in made(setup).core.queues)
    assert not only("rng").limits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iops-burst=5", "rng: iops-burst=5 goes with iops, and there is none"),
        ("bps=0", "rng: bps=0: expected 1 or more; without bps there is no limit"),
        ("iops=many", "rng: iops=many"),
    ],
)
def test_limits_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        only(f"rng,{text}")
    assert str(caught.value).startswith(message)


# ---- what a device offers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["rng", "blk,size=1M", "console,chardev=null", "blk,size=1M,num-queues=3"])
def test_every_device_has_every_switch(driver: str) -> None:
    switches = "packed=on,event-idx=off,indirect_desc=off,in-order,queue-reset=off,notification-data=yes,suspend"
    setup = only(f"{driver},{switches},notif-config-data=on,iommu-platform=true,queue-size=100,poll=on")
    assert setup.offer == Offer(
        packed=True,
        event_idx=False,
        indirect_desc=False,
        in_order=True,
        queue_reset=False,
        notification_data=True,
        notif_config_data=True,
        suspend=True,
        iommu_platform=True,
        queue_size=100,
        poll="on",
    )
    core = made(setup).core
    own = made(setup).device.features
    reserved: tuple[Feature, ...] = (
        Feature.VERSION_1,
        Feature.RING_PACKED,
        Feature.IN_ORDER,
        Feature.NOTIFICATION_DATA,
        Feature.SUSPEND,
    )
    reserved += (Feature.NOTIF_CONFIG_DATA, Feature.ACCESS_PLATFORM)
    assert core.device_features == own | mask_of(reserved)
    assert core.offer.poll == "on"
    assert {queue.max_size for queue in core.queues} == {64}  # until RING_PACKED is negotiated (CC8)


def test_what_is_offered_if_nobody_says_anything() -> None:
    core = made(only("rng")).core
    usual = (Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.RING_RESET)
    assert core.device_features == mask_of(usual)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("queue-size=0", "queue-size=0: expected 1 to 32768"),
        ("queue-size=32769,packed=on", "queue-size=32769: expected 1 to 32768"),
        ("queue-size=100", "queue-size=100 is no power of two"),
        ("queue-size=big", "queue-size=big: expected a whole number"),
        ("packed=maybe", "packed=maybe: expected on or off"),
        ("poll=sometimes", "poll=sometimes: expected one of on, adaptive, off"),
        ("packd=on", 'no option "packd"; did you mean "packed"?'),
    ],
)
def test_offers_that_cannot_be(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        only(f"rng,{option}")
    assert str(caught.value).startswith(f"rng: {message}")


def test_what_a_device_says_while_it_is_made_begins_with_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "image").write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    served = only(f"blk,id=root,path={tmp_path}/image").create()
    served.device.close()
    [record] = caplog.records
    assert vars(record)["device"] == "root"
    assert record.getMessage().startswith(f"root: {tmp_path}/image looks like qcow2")


@pytest.mark.parametrize("text", ["4", "rng", '{"driver": 4}', '{"driver": "4"}'])
def test_a_type_is_named_or_numbered(text: str) -> None:
    setup = only(text)
    assert setup.device_class.name == "rng"
    assert setup.name == "rng0"


def test_a_number_that_no_device_has() -> None:
    with pytest.raises(ConfigError, match=r'no device "63" \(devices: .*rng'):
        only("63")


def test_a_file_puts_what_it_registers_on_the_bus(tmp_path: Path) -> None:
    path = tmp_path / "gauge.py"
    path.write_text(
        "from vfiouser_virtio.virtio import Device, register\n@register\nclass Gauge(Device):\n    device_id = 61\n"
    )
    by_file, by_number, by_name = setups([parse_device(text) for text in (f"{path}:Gauge", "61", "gauge")])
    assert issubclass(by_file.device_class, Device)
    bus.unregister(by_file.device_class)
    assert by_file.device_class is by_number.device_class is by_name.device_class
    assert [each.name for each in (by_file, by_number, by_name)] == ["gauge0", "gauge1", "gauge2"]
