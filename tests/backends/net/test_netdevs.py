"""What users choose from: every netdev, with the options that all of them have."""

from pathlib import Path
from typing import Annotated, Any

import pytest

from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.backends.net.netdevs import NETDEVS
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.pcap import PcapNetdev
from vfiouser_virtio.backends.net.pcap_file import packets
from vfiouser_virtio.backends.net.recording import RecordedNetdev
from vfiouser_virtio.backends.net.shaping import Shaped
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.options import class_options, convert_options
from vfiouser_virtio.virtio import Device
from vfiouser_virtio.virtio.options import Making, OneOf


class Card(Device):
    def __init__(self, *, netdev: Annotated[Netdev | None, OneOf(NETDEVS), "which network"] = None) -> None: ...


OPTIONS = class_options(Card)


def made(**given: Any) -> Netdev:
    making = convert_options(OPTIONS, given, label="net")["netdev"]
    assert isinstance(making, Making)
    netdev: Netdev = making()
    return netdev


def test_a_hub_is_named_by_its_option() -> None:
    netdev = made(hub="lan", isolated="on")
    assert isinstance(netdev, HubNetdev)
    assert netdev.describe() == "hub lan"
    assert netdev.isolated


def test_every_netdev_can_be_shaped() -> None:
    assert OPTIONS["loss"].of == tuple(NETDEVS)
    assert OPTIONS["loss"].help == "percentage of frames that are lost"
    netdev = made(**{"hub": "lan", "delay-ms": "10", "loss": "0.5", "seed": "3"})
    assert isinstance(netdev, Shaped)
    assert netdev.describe() == "hub lan with delay 10 ms, loss 0.5 %, seed 3"
    assert isinstance(made(netdev="null"), NullNetdev)


def test_every_netdev_can_be_recorded(tmp_path: Path) -> None:
    netdev = made(**{"hub": "lan", "loss": "1", "dump": str(tmp_path / "x"), "dump-limit": "5"})
    assert isinstance(netdev, RecordedNetdev)
    assert netdev.describe() == "hub lan with loss 1 %"
    netdev.close()
    assert list(packets([(tmp_path / "x").read_bytes()])) == []
    with pytest.raises(ConfigError, match="dump-maxlen and dump-limit go with dump=PATH"):
        made(**{"hub": "lan", "dump-limit": "5"})


def test_a_file_is_replayed_by_its_option(tmp_path: Path) -> None:
    made(netdev="null", dump=str(tmp_path / "x")).close()
    netdev = made(**{"pcap": str(tmp_path / "x"), "at-once": "on"})
    assert isinstance(netdev, PcapNetdev)
    netdev.close()


def test_every_option_has_a_help_text_that_says_whose_it_is() -> None:
    for option in OPTIONS.values():
        assert option.help
        assert not option.of or option.of == tuple(NETDEVS) or option.help.startswith("netdev=")


def test_a_netdev_whose_shape_is_wrong_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(HubNetdev, "close", lambda self: closed.append(self))
    with pytest.raises(ConfigError, match="loss=200: expected 0 to 100"):
        made(hub="lan", loss="200")
    assert len(closed) == 1
