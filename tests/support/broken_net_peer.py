"""Broken network devices (see `support.broken`), for the checks of one with a peer on its network."""

from collections.abc import Sequence

import trio
from support.broken import breaks
from support.broken_net import ADDR_SET, ALLMULTI, OFFLOADS_SET, PAIRS_SET, RSS_CONFIG, TABLE_SET
from support.spoilt_net import OK, Kind, SpoiltNet, SpoiltReceiver

from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.devices.net_filter import ReceiveFilter
from vfiouser_virtio.devices.net_receive_queue import ReceiveQueue
from vfiouser_virtio.protocols.virtio.net import CtrlRx, HdrFlags, NetFeature
from vfiouser_virtio.virtio import Chain, GuestError

_LONG = 1514  # bytes of the longest frame of an Ethernet without jumbo frames
_HEADERS = 54

# ---- transmission ------------------------------------------------------------------------------------------------


@breaks("virtio14/NX5", device="net")
class TakesAnUnknownFlagForAChecksum(SpoiltNet):
    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        return (HdrFlags.NEEDS_CSUM, *fields[1:4], 14, 0, *fields[6:]) if fields[0] & 0x80 else fields


@breaks("virtio14/NX6", device="net")
class LosesWhatHasShortHeaders(SpoiltNet):
    short = False

    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        self.short = bool(fields[1]) and fields[2] < _HEADERS
        return fields

    def sends(self, frame: Frame) -> Frame | None:
        short, self.short = self.short, False
        return None if short else frame


@breaks("virtio14/NX7", device="net")
class SendsNothingLong(SpoiltNet):
    def sends(self, frame: Frame) -> Frame | None:
        return None if frame.length > _LONG and frame.offload is None else frame


@breaks("virtio14/NX8", device="net")
class LeavesChecksumsOpen(SpoiltNet):
    def sends(self, frame: Frame) -> Frame | None:
        left = frame.offload is not None and not frame.offload.gso_type
        return frame_of(frame.tobytes()) if left else frame


# ---- receive buffers ---------------------------------------------------------------------------------------------


@breaks("virtio14/NR1", device="net")
class ReceivesNothingLong(SpoiltNet):
    def receives(self, frame: Frame) -> Frame | None:
        return None if 1000 < frame.length <= _LONG and frame.offload is None else frame


@breaks("virtio14/NR2", device="net")
class CountsNoBuffers(SpoiltNet):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return numbers if self.negotiated(NetFeature.MRG_RXBUF) else (*numbers[:6], 0)


class WantsLargeBuffers(SpoiltReceiver):
    def _spread(self, receiveq: ReceiveQueue, first: Chain, frame: Frame, hashed: tuple[int, ...] | None) -> bool:
        if not self._mergeable:
            raise GuestError("a buffer that is too small")
        return super()._spread(receiveq, first, frame, hashed)


@breaks("virtio14/NR2-small", device="net", logs="broke virtio")
class BreaksAtASmallBuffer(SpoiltNet):
    receiver_class = WantsLargeBuffers


@breaks("virtio14/NR3", device="net")
class CountsOneBuffer(SpoiltNet):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*numbers[:6], 1)


class Spreads(SpoiltReceiver):
    """It spreads frames with a way of its own."""

    unused = 0
    """Bytes that stay unused of each buffer but the last."""

    def _spread(self, receiveq: ReceiveQueue, first: Chain, frame: Frame, hashed: tuple[int, ...] | None) -> bool:
        if not self._mergeable:
            return super()._spread(receiveq, first, frame, hashed)
        chains, rest = [first], frame.length + self._size
        while sum(chain.room - self.unused for chain in chains) < rest:
            chain = receiveq.queue.next_nowait()
            assert chain is not None
            chains.append(chain)
        data = self._header(None, hashed, len(chains)) + frame.tobytes()
        filled = []
        for chain in chains:
            part, data = data[: chain.room - self.unused], data[chain.room - self.unused :]
            chain.writable.write(part)
            filled.append((chain, len(part)))
        self.complete(receiveq, filled)
        return True

    def complete(self, receiveq: ReceiveQueue, filled: Sequence[tuple[Chain, int]]) -> None:
        receiveq.queue.complete_together(filled)


class LeavesAByte(Spreads):
    unused = 1


@breaks("virtio14/NR3-full", device="net")
class DoesNotFillItsBuffers(SpoiltNet):
    receiver_class = LeavesAByte


class Dawdles(Spreads):
    """It shows all buffers but the first a while later, and takes what comes meanwhile after that."""

    held: list[Frame] | None = None

    def complete(self, receiveq: ReceiveQueue, filled: Sequence[tuple[Chain, int]]) -> None:
        receiveq.queue.complete_together(filled[:1])
        self.held = []
        trio.lowlevel.spawn_system_task(self._show, filled[1:])

    async def _show(self, filled: Sequence[tuple[Chain, int]]) -> None:
        await trio.sleep(0.3)  # long enough for a driver to see the first one alone
        for chain, written in filled:
            chain.complete(written)
        held, self.held = self.held or [], None
        for frame in held:
            self.put(frame)

    def put(self, frame: Frame) -> bool:
        if self.held is None:
            return super().put(frame)
        self.held.append(frame.copy())
        return True


@breaks("virtio14/NR3-together", device="net")
class ShowsItsBuffersOneAfterTheOther(SpoiltNet):
    receiver_class = Dawdles


class KnowsNoMtu(SpoiltReceiver):
    def begin(self, features: int, mtu: int | None) -> None:
        super().begin(features, None)


@breaks("virtio14/NR9", device="net")
class PassesOnWhatExceedsItsMtu(SpoiltNet):
    receiver_class = KnowsNoMtu


# ---- headers of received packets ---------------------------------------------------------------------------------


class SpoiltFlags(SpoiltNet):
    def flags(self, add: int, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (numbers[0] | add, *numbers[1:])


@breaks("virtio14/NR4", device="net")
class SaysThatDataIsValid(SpoiltFlags):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return numbers if self.negotiated(NetFeature.GUEST_CSUM) else self.flags(HdrFlags.DATA_VALID, numbers)


class TakesChecksums(SpoiltReceiver):
    def set_offloads(self, does: Does) -> None:
        super().set_offloads(does | Does.CSUM)


@breaks("virtio14/NR4-sum", device="net")
class PassesOnOpenChecksums(SpoiltNet):
    receiver_class = TakesChecksums

    def receives(self, frame: Frame) -> Frame | None:
        left = frame.offload is not None and not frame.offload.gso_type
        return frame_of(frame.tobytes()) if left and not self.negotiated(NetFeature.GUEST_CSUM) else frame


class Trusts(SpoiltReceiver):
    def set_offloads(self, does: Does) -> None:
        super().set_offloads(does | Does.TSO4 if does & Does.CSUM else does)


@breaks("virtio14/NR5", device="net")
class LeavesSegmentationToAnyDriver(SpoiltNet):
    receiver_class = Trusts


@breaks("virtio14/NR6", device="net")
class ForgetsTheSizeOfSegments(SpoiltNet):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*numbers[:3], 0, *numbers[4:])


@breaks("virtio14/NR6-hdr-len", device="net")
class ForgetsTheLengthOfHeaders(SpoiltNet):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*numbers[:2], 0, *numbers[3:])


@breaks("virtio14/NR7", device="net")
class SumsFromElsewhere(SpoiltNet):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*numbers[:4], numbers[4] and numbers[4] + 2, *numbers[5:])


@breaks("virtio14/NR8", device="net")
class TellsOfCoalescedSegments(SpoiltFlags):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return self.flags(HdrFlags.RSC_INFO, numbers) if self.negotiated(NetFeature.GUEST_CSUM) else numbers


@breaks("virtio14/NO3", device="net")
class KeepsItsOffloads(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == OFFLOADS_SET and self.negotiated(NetFeature.CTRL_GUEST_OFFLOADS) and not any(data)
        return OK if wrong else super().perform(kind, data, room)


# ---- filter ------------------------------------------------------------------------------------------------------


class LetsStationsIn(ReceiveFilter):
    def _refresh(self) -> None:
        super()._refresh()
        self._unicast = self._modes is None or CtrlRx.NOUNI not in self._modes


@breaks("virtio14/NF1", device="net")
class ReceivesForOthers(SpoiltNet):
    filter_class = LetsStationsIn


@breaks("virtio14/NF2", device="net")
class ForgetsItsTable(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == TABLE_SET and self.negotiated(NetFeature.CTRL_RX)
        return OK if wrong else super().perform(kind, data, room)


@breaks("virtio14/NF3", device="net")
class KeepsItsTableOverAReset(SpoiltNet):
    said: bytes | None = None
    kept: bytes | None = None

    def reset(self) -> None:
        super().reset()
        self.kept, self.said = self.said, None

    def features_ok(self) -> bool:
        accepted = super().features_ok()
        if self.kept is not None:
            self.good(TABLE_SET, self.kept, 0)
        return accepted

    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        if kind == TABLE_SET:
            self.said = data
        return super().perform(kind, data, room)


class IsNeverPromiscuous(ReceiveFilter):
    def set_mode(self, mode: CtrlRx, on: bool) -> None:
        if mode is not CtrlRx.PROMISC:
            super().set_mode(mode, on)


@breaks("virtio14/NF4", device="net")
class IsDiscreet(SpoiltNet):
    filter_class = IsNeverPromiscuous


@breaks("virtio14/NF5", device="net", also=("virtio14/NF6",))
class IgnoresAllMulticast(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == ALLMULTI and self.negotiated(NetFeature.CTRL_RX)
        return OK if wrong else super().perform(kind, data, room)


class HearsBroadcasts(ReceiveFilter):
    def set_mode(self, mode: CtrlRx, on: bool) -> None:
        if mode is not CtrlRx.NOBCAST:
            super().set_mode(mode, on)


@breaks("virtio14/NF6", device="net")
class ReceivesAllBroadcasts(SpoiltNet):
    filter_class = HearsBroadcasts


@breaks("virtio14/NF7", device="net")
class ReceivesForItsOldAddress(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        if kind != ADDR_SET or not self.negotiated(NetFeature.CTRL_MAC_ADDR):
            return super().perform(kind, data, room)
        self.config.set(mac=data)
        return OK


@breaks("virtio14/NV2", device="net")
class WantsItsVlansNamed(SpoiltNet):
    def receives(self, frame: Frame) -> Frame | None:
        tagged = frame.head(14)[12:] == b"\x81\0"
        return None if tagged and not self.negotiated(NetFeature.CTRL_VLAN) else frame


class HasFewVlans(ReceiveFilter):
    def add_vlan(self, vlan: int) -> None:
        super().add_vlan(vlan & 0x7FF)


@breaks("virtio14/NV3", device="net")
class CutsVlansOff(SpoiltNet):
    filter_class = HasFewVlans


class KeepsVlans(ReceiveFilter):
    def remove_vlan(self, vlan: int) -> None:
        pass


@breaks("virtio14/NV3-absent", device="net")
class RemovesNoVlan(SpoiltNet):
    filter_class = KeepsVlans


# ---- steering ----------------------------------------------------------------------------------------------------


@breaks("virtio14/NM3", device="net")
class UsesAllPairsAtOnce(SpoiltNet):
    def features_ok(self) -> bool:
        if self.negotiated(NetFeature.MQ):
            self.control.settings.steering.set_pairs(2)
        return super().features_ok()


@breaks("virtio14/NM4", device="net")
class KeepsItsPairs(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == PAIRS_SET and data == b"\1\0" and self.negotiated(NetFeature.MQ)
        return OK if wrong else super().perform(kind, data, room)


@breaks("virtio14/NM5", device="net")
class AnswersElsewhere(SpoiltNet):
    def spoil(self) -> None:
        for each in self.transmitter.queues:
            each.pair ^= 1


@breaks("virtio14/NH3", device="net")
class HashesOtherwise(SpoiltNet):
    def hash(self, value: int, report: int) -> tuple[int, int]:
        return (value ^ 1 if report else 0), report


@breaks("virtio14/NH4", device="net")
class ReportsHashesOfAnything(SpoiltNet):
    def hash(self, value: int, report: int) -> tuple[int, int]:
        return value, report or 1


@breaks("virtio14/NH5", device="net")
class TakesTheFirstQueueForTheUnclassified(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        if kind == RSS_CONFIG and data[6:8] == b"\1\0":
            data = data[:6] + b"\0\0" + data[8:]
        return super().perform(kind, data, room)
