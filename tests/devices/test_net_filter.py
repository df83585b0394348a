"""Receive filter of the network device: each mode, table and VLAN, alone and together."""

import pytest

from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.devices.net_filter import BROADCAST, ReceiveFilter
from vfiouser_virtio.protocols.virtio.net import CtrlRx

OWN = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400abcdef")
GROUP = bytes.fromhex("01005e000001")
OTHER_GROUP = bytes.fromhex("3333ff123456")
ALL = {"own": OWN, "other": OTHER, "group": GROUP, "other group": OTHER_GROUP, "broadcast": BROADCAST}


def frame(to: bytes, vlan: int | None = None, kind: bytes = b"\x81\x00") -> Frame:
    tag = b"" if vlan is None else kind + (vlan | 0x6000).to_bytes(2, "big")  # a priority beside the identifier
    return frame_of(to + OTHER + tag + b"\x08\x00" + bytes(46))


def in_pieces(whole: Frame, sizes: tuple[int, ...]) -> Frame:
    data = memoryview(whole.tobytes())
    segments = []
    for size in sizes:
        segments.append(data[:size])
        data = data[size:]
    return Frame([*segments, data], whole.length)


def seen(filter_: ReceiveFilter) -> set[str]:
    return {name for name, to in ALL.items() if filter_.accepts(frame(to))}


@pytest.fixture
def by_address() -> ReceiveFilter:
    made = ReceiveFilter()
    made.begin(OWN, by_address=True, by_vlan=False)
    return made


def test_without_a_driver_that_filters_everything_is_seen() -> None:
    made = ReceiveFilter()
    assert made.everything
    made.begin(OWN, by_address=False, by_vlan=False)
    assert made.everything
    assert seen(made) == set(ALL)
    assert made.accepts(frame(OTHER, vlan=5))


def test_commands_that_were_not_negotiated_change_nothing() -> None:
    made = ReceiveFilter()
    made.begin(OWN, by_address=False, by_vlan=False)
    made.set_mode(CtrlRx.NOUNI, True)
    made.add_vlan(5)
    assert seen(made) == set(ALL)
    assert made.accepts(frame(OWN, vlan=6))


def test_at_first_only_what_is_for_it_and_for_all(by_address: ReceiveFilter) -> None:
    assert not by_address.everything
    assert seen(by_address) == {"own", "broadcast"}


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ((CtrlRx.PROMISC,), set(ALL)),
        ((CtrlRx.ALLMULTI,), {"own", "broadcast", "group", "other group"}),
        ((CtrlRx.ALLUNI,), {"own", "broadcast", "other"}),
        ((CtrlRx.ALLUNI, CtrlRx.ALLMULTI), set(ALL)),
        ((CtrlRx.NOUNI,), {"broadcast"}),
        ((CtrlRx.NOBCAST,), {"own"}),
        ((CtrlRx.NOMULTI,), {"own", "broadcast"}),
        # The stronger one wins (5.1.9.5.1.1), and promiscuous over all.
        ((CtrlRx.ALLUNI, CtrlRx.NOUNI), {"broadcast"}),
        ((CtrlRx.ALLMULTI, CtrlRx.NOMULTI), {"own", "broadcast"}),
        ((CtrlRx.ALLMULTI, CtrlRx.NOBCAST), {"own", "group", "other group"}),
        ((CtrlRx.NOUNI, CtrlRx.NOMULTI, CtrlRx.NOBCAST), set()),
        ((CtrlRx.NOUNI, CtrlRx.NOMULTI, CtrlRx.NOBCAST, CtrlRx.PROMISC), set(ALL)),
    ],
)
def test_modes(by_address: ReceiveFilter, modes: tuple[CtrlRx, ...], expected: set[str]) -> None:
    for mode in modes:
        by_address.set_mode(mode, True)
    assert seen(by_address) == expected
    for mode in modes:
        by_address.set_mode(mode, False)
    assert seen(by_address) == {"own", "broadcast"}


def test_tables(by_address: ReceiveFilter) -> None:
    by_address.set_macs([OTHER], [GROUP])
    assert seen(by_address) == {"own", "other", "group", "broadcast"}
    by_address.set_mode(CtrlRx.NOMULTI, True)
    assert seen(by_address) == {"own", "other", "broadcast"}
    by_address.set_mode(CtrlRx.NOUNI, True)
    assert seen(by_address) == {"broadcast"}
    by_address.set_mode(CtrlRx.NOMULTI, False)
    assert seen(by_address) == {"group", "broadcast"}
    by_address.set_mode(CtrlRx.NOUNI, False)
    by_address.set_macs([], [OTHER_GROUP])  # a table replaces the one before
    assert seen(by_address) == {"own", "other group", "broadcast"}


def test_too_many_of_one_kind_are_all_of_that_kind(by_address: ReceiveFilter) -> None:
    by_address.set_macs(None, [GROUP])
    assert seen(by_address) == {"own", "other", "group", "broadcast"}
    by_address.set_macs([], None)
    assert seen(by_address) == {"own", "group", "other group", "broadcast"}
    by_address.set_mode(CtrlRx.NOMULTI, True)
    assert seen(by_address) == {"own", "broadcast"}


def test_another_address_of_its_own(by_address: ReceiveFilter) -> None:
    by_address.set_mac(OTHER)
    assert seen(by_address) == {"other", "broadcast"}


def test_a_reset_forgets_all(by_address: ReceiveFilter) -> None:
    by_address.set_mode(CtrlRx.NOBCAST, True)
    by_address.set_macs([OTHER], None)
    by_address.reset()
    assert by_address.everything
    by_address.begin(OWN, by_address=True, by_vlan=True)
    assert seen(by_address) == {"own", "broadcast"}
    by_address.add_vlan(5)
    by_address.begin(OWN, by_address=True, by_vlan=True)
    assert not by_address.accepts(frame(OWN, vlan=5))


@pytest.mark.parametrize("with_addresses", [False, True])
def test_vlans(with_addresses: bool) -> None:
    made = ReceiveFilter()
    made.begin(OWN, by_address=with_addresses, by_vlan=True)
    assert made.accepts(frame(OWN))
    assert not made.accepts(frame(OWN, vlan=0))
    for vlan in (0, 5, 4095):
        made.add_vlan(vlan)
        made.add_vlan(vlan)
    assert all(made.accepts(frame(OWN, vlan=vlan)) for vlan in (0, 5, 4095))
    assert not made.accepts(frame(OWN, vlan=6))
    assert made.accepts(frame(OWN, vlan=6, kind=b"\x88\xa8"))  # 802.1ad: nobody filters it
    assert made.accepts(frame(OTHER, vlan=5)) != with_addresses
    made.remove_vlan(5)
    made.remove_vlan(77)
    assert not made.accepts(frame(OWN, vlan=5))
    assert made.accepts(frame(OWN, vlan=0))


def test_who_listens_to_all_hears_all_vlans() -> None:
    made = ReceiveFilter()
    made.begin(OWN, by_address=True, by_vlan=True)
    made.set_mode(CtrlRx.PROMISC, True)
    assert made.everything
    assert made.accepts(frame(OTHER, vlan=9))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 8, 2), (6,), (12, 2), (13, 1, 1), (15,), (0, 16)])
def test_frames_in_pieces(sizes: tuple[int, ...]) -> None:
    made = ReceiveFilter()
    for by_vlan in (False, True):
        made.begin(OWN, by_address=True, by_vlan=by_vlan)
        made.add_vlan(5)
        assert made.accepts(in_pieces(frame(OWN, vlan=5), sizes))
        assert made.accepts(in_pieces(frame(OWN, vlan=7), sizes)) != by_vlan
        assert not made.accepts(in_pieces(frame(OTHER, vlan=5), sizes))


@pytest.mark.parametrize(
    "data", [b"", OWN[:3], GROUP[:1], OWN + OTHER, OWN + OTHER + b"\x81\x00", OWN + OTHER + b"\x81\x00\x00"]
)
def test_frames_that_are_too_short_do_no_harm(data: bytes) -> None:
    made = ReceiveFilter()
    for by_address in (False, True):
        for by_vlan in (False, True):
            made.begin(OWN, by_address=by_address, by_vlan=by_vlan)
            expected = (data[:6] == OWN or not by_address) and (data[12:14] != b"\x81\x00" or not by_vlan)
            assert made.accepts(frame_of(data)) == expected
            assert made.accepts(Frame([], 0)) is not by_address
