"""Broken network devices (see `support.broken`), for the checks of one that is alone."""

from typing import Any

from support.broken import breaks
from support.faithful import answering
from support.spoilt_net import ERR, OK, Kind, SpoiltNet, SpoiltTransmitter

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.devices.net_commands import COMMANDS
from vfiouser_virtio.devices.net_transmit import TransmitQueue
from vfiouser_virtio.protocols.virtio.net import (
    CtrlAnnounce,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlNotfCoal,
    CtrlRx,
    CtrlStats,
    CtrlVlan,
    NetFeature,
    Status,
)
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.virtio import Chain, GuestError, Queue

_REFUSED = "control queue: .* of the driver is refused: "
_BROKE = "broke virtio"

ALLMULTI, PROMISC = (CtrlClass.RX, CtrlRx.ALLMULTI), (CtrlClass.RX, CtrlRx.PROMISC)
TABLE_SET, ADDR_SET = (CtrlClass.MAC, CtrlMac.TABLE_SET), (CtrlClass.MAC, CtrlMac.ADDR_SET)
PAIRS_SET, RSS_CONFIG = (CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET), (CtrlClass.MQ, CtrlMq.RSS_CONFIG)
OFFLOADS_SET = (CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET)
RX_SET, TX_SET = (CtrlClass.NOTF_COAL, CtrlNotfCoal.RX_SET), (CtrlClass.NOTF_COAL, CtrlNotfCoal.TX_SET)
VQ_SET, VQ_GET = (CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_SET), (CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_GET)
QUERY, GET = (CtrlClass.STATS, CtrlStats.QUERY), (CtrlClass.STATS, CtrlStats.GET)

# ---- configuration -----------------------------------------------------------------------------------------------

_QUEUE_SELECT = COMMON_CFG_OFFSETS["queue_select"]
_SECOND_PAIR = tuple(f"virtio14/{name}" for name in ("NM1", "NM3", "NM4", "NM5", "NH5"))
# It says that there are two pairs, and its second transmit queue is not there.
breaks("virtio14/NC1", device="net", also=_SECOND_PAIR)(
    answering(queue_size=lambda cfg, original: 0 if cfg.read(*_QUEUE_SELECT) == b"\3\0" else original())
)


@breaks("virtio14/NC2", device="net")
class ShrinksItsMtu(SpoiltNet):
    def reset(self) -> None:
        super().reset()
        mtu = self.config["mtu"]
        assert isinstance(mtu, int)
        self.config.set(mtu=mtu - 1)


@breaks("virtio14/NC2-1280", device="net")
class HasAnMtuTooSmallForIpv6(SpoiltNet):
    def spoil(self) -> None:
        self.config.set(mtu=600)


@breaks("virtio14/NC3", device="net")
class HasAShortIndirectionTable(SpoiltNet):
    def spoil(self) -> None:
        self.config.set(rss_max_indirection_table_length=64)


@breaks("virtio14/NC4", device="net")
class HasAnUnheardOfDuplex(SpoiltNet):
    def spoil(self) -> None:
        self.config.set(duplex=2)


@breaks("virtio14/NC5", device="net")
class LetsItsMtuBeWritten(SpoiltNet):
    driver_writes = frozenset({"mtu"})


@breaks("virtio14/NC6", device="net")
class HasMoreStatusBits(SpoiltNet):
    def features_ok(self) -> bool:
        self.show(4)
        return super().features_ok()


# ---- transmission ------------------------------------------------------------------------------------------------


@breaks("virtio14/NX1", device="net", logs=_BROKE)
class RefusesUnknownFlags(SpoiltNet):
    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        if fields[0] & 0x80 and not self.negotiated(NetFeature.CSUM):
            raise GuestError("a bit of flags that nothing defines")
        return fields


class LooksAtCsumStart(SpoiltTransmitter):
    def _send(self, transmitq: TransmitQueue, burst: Any, *, whole: bool = False) -> Any:
        return super()._send(transmitq, (self._seen(chain) for chain in burst), whole=whole)

    @staticmethod
    def _seen(chain: Chain) -> Chain:
        header = bytes(chain.readable.segments[0][:12])
        if (len(header) == 12 and header[6:8] == b"\xff\xff") or header[8:10] == b"\xff\xff":
            raise GuestError("a checksum beyond the end of its packet")
        return chain


@breaks("virtio14/NX2", device="net", logs=_BROKE)
class BelievesInCsumStart(SpoiltNet):
    transmitter_class = LooksAtCsumStart


@breaks("virtio14/NX3", device="net", logs=_BROKE, also=("virtio14/NX6",))
class BelievesInHdrLen(SpoiltNet):
    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        if fields[1] and fields[2] > frame.length:
            raise GuestError("headers that are longer than their packet")
        return fields


class Touchy(SpoiltTransmitter):
    def _drop_malformed(self, transmitq: TransmitQueue, chain: Chain, why: str) -> None:
        raise GuestError(why)


@breaks("virtio14/NX4", device="net", logs=_BROKE)
class BreaksAtAMalformedPacket(SpoiltNet):
    transmitter_class = Touchy


# ---- control queue -----------------------------------------------------------------------------------------------


@breaks("virtio14/NQ1", device="net")
class LooksForItsControlQueueAtMqOnly(SpoiltNet):
    @property
    def control_queue(self) -> Queue | None:
        found = super().control_queue
        return self.queues[2] if found is not None and not self.negotiated(NetFeature.MQ) else found


@breaks("virtio14/NQ2", device="net")
class StaysPromiscuous(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        return ERR if kind == PROMISC and data == b"\0" else super().perform(kind, data, room)


@breaks("virtio14/NQ3", device="net")
class CannotTurnAllUnicastOff(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == (CtrlClass.RX, CtrlRx.ALLUNI) and data == b"\0" and self.negotiated(NetFeature.CTRL_RX_EXTRA)
        return ERR if wrong else super().perform(kind, data, room)


@breaks("virtio14/NQ4", device="net")
class AgreesToWhatItDoesNotKnow(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        return super().perform(kind, data, room) if kind in COMMANDS or kind[1] < 0 else OK


@breaks("virtio14/NQ5", device="net")
class WantsItsHeaderByItself(SpoiltNet):
    def answers(self, chain: Chain) -> bool:
        if len(chain.readable.segments[0]) == 2:
            return False
        chain.writable.write(ERR)
        chain.complete()
        return True


@breaks("virtio14/NQ6", device="net")
class ForgetsWhatWasNegotiated(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        known = COMMANDS.get(kind)
        forgotten = known is not None and not self.driver_features & known.features
        return OK if forgotten else super().perform(kind, data, room)


@breaks("virtio14/NQ7", device="net", logs=_REFUSED)
class MakesUpWhatIsMissing(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        return super().perform(kind, b"\0" if kind == PROMISC and not data else data, room)


@breaks("virtio14/NA1", device="net")
class KeepsItsAddressInConfiguration(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        before = self.mac
        answer = super().perform(kind, data, room)
        self.config.set(mac=before)
        return answer


@breaks("virtio14/NA2", device="net")
class WantsAnAddress(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        return ERR if kind == TABLE_SET and not any(data) else super().perform(kind, data, room)


@breaks("virtio14/NV1", device="net")
class HasHalfOfTheVlans(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == (CtrlClass.VLAN, CtrlVlan.DEL) and data[1] > 7
        return ERR if wrong else super().perform(kind, data, room)


@breaks("virtio14/NG1", device="net")
class AsksForAnnouncementsForEver(SpoiltNet):
    def features_ok(self) -> bool:
        if self.negotiated(NetFeature.GUEST_ANNOUNCE):
            self.show(Status.ANNOUNCE)
        return super().features_ok()

    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        asked = self.negotiated(NetFeature.GUEST_ANNOUNCE)
        wrong = asked and kind == (CtrlClass.ANNOUNCE, CtrlAnnounce.ACK)
        return OK if wrong else super().perform(kind, data, room)


@breaks("virtio14/NO1", device="net")
class CannotTurnSegmentationOnAgain(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == OFFLOADS_SET and self.negotiated(NetFeature.GUEST_TSO4) and data[0] & 0x80
        return ERR if wrong else super().perform(kind, data, room)


@breaks("virtio14/NO2", device="net", logs=_REFUSED)
class AgreesToAnyOffload(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return OK if kind == OFFLOADS_SET and self.negotiated(NetFeature.CTRL_GUEST_OFFLOADS) else answer


# ---- queue pairs, hashes -----------------------------------------------------------------------------------------


@breaks("virtio14/NM1", device="net")
class WantsAChange(SpoiltNet):
    """It refuses what is set already."""

    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        same = kind == PAIRS_SET and int.from_bytes(data, "little") == self.control.settings.steering.pairs
        return ERR if same else super().perform(kind, data, room)


@breaks("virtio14/NM2", device="net", logs=_REFUSED)
class AgreesToAnyNumberOfPairs(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return OK if kind == PAIRS_SET and self.negotiated(NetFeature.MQ) else answer


@breaks("virtio14/NH1", device="net")
class HasNoRoomForItsOwnTable(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        return ERR if kind == RSS_CONFIG and data[4:6] == b"\x7f\0" else super().perform(kind, data, room)


@breaks("virtio14/NH2", device="net", logs=_REFUSED)
class AgreesToAnyRss(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return OK if kind == RSS_CONFIG else answer


# ---- coalescing --------------------------------------------------------------------------------------------------


@breaks("virtio14/NN1", device="net", logs=_REFUSED)
class CoalescesQueuesThatAreNot(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        agrees = kind in (VQ_SET, VQ_GET) and self.negotiated(NetFeature.VQ_NOTF_COAL)
        return OK + bytes(room) if agrees and answer == ERR else answer


@breaks("virtio14/NN2", device="net")
class ReadsWhatIsReserved(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        return ERR if kind in (VQ_SET, VQ_GET) and any(data[2:4]) else super().perform(kind, data, room)


class Remembers(SpoiltNet):
    """It knows what VQ_SET has said, by queue."""

    def spoil(self) -> None:
        self.said: dict[bytes, bytes] = {}

    def reset(self) -> None:
        super().reset()
        self.said = {}

    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        if kind == VQ_SET and answer == OK:
            self.said[data[:2]] = data[4:]
        return answer


@breaks("virtio14/NN3", device="net")
class KeepsCoalescingOverAReset(Remembers):
    def spoil(self) -> None:
        super().spoil()
        self.kept: dict[bytes, bytes] = {}

    def reset(self) -> None:
        self.kept = self.said
        super().reset()

    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return OK + self.kept.pop(data[:2]) if kind == VQ_GET and data[:2] in self.kept else answer


@breaks("virtio14/NN4", device="net")
class KeepsCoalescingOverAQueueReset(Remembers):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        if kind in (RX_SET, TX_SET):
            self.said = {}
        return OK + self.said[data[:2]] if kind == VQ_GET and data[:2] in self.said else answer


@breaks("virtio14/NN5", device="net")
class DoesNotOverrideAQueuesCoalescing(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        set_before = self.queues[0].coalescing != (0, 0)
        return OK if kind == RX_SET and set_before else super().perform(kind, data, room)


# ---- statistics --------------------------------------------------------------------------------------------------


@breaks("virtio14/NS1", device="net")
class HasUnknownStatistics(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return answer[:6] + b"\xff" + answer[7:] if kind == QUERY and len(answer) > 1 else answer


@breaks("virtio14/NS2", device="net", logs=_REFUSED)
class SkipsWrongEntries(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return super().perform(kind, data[:16], room) if kind == GET and answer == ERR and len(data) > 16 else answer


@breaks("virtio14/NS3", device="net")
class CountsItsHeadersNot(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return answer[:7] + bytes([answer[7] - 8]) + answer[8:] if kind == GET and len(answer) > 8 else answer


@breaks("virtio14/NS4", device="net")
class FillsAllTheRoom(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return answer.ljust(1 + room, b"\0") if kind == GET and answer != ERR else answer


@breaks("virtio14/NS5", device="net", logs=_REFUSED)
class DoesNotCountTheCurrentCommand(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return answer[:9] + bytes([answer[9] - 1]) + answer[10:] if answer[1:2] == b"\x20" else answer


@breaks("virtio14/NS6", device="net")
class DoesNotCountWhatItSends(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        answer = super().perform(kind, data, room)
        return answer[:17] + bytes(8) + answer[25:] if kind == GET and answer[1:2] == b"\x10" else answer
