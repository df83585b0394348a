"""AXI4-Lite master and AXI4 memory for cocotb, as small as a bridge needs them (ARM IHI 0022).

Signals are those of the design, as ``s_axil_awvalid``: ``PREFIX_`` and the specification's name in lower case. Packages
for cocotb that have all of AXI fit as well, as `RegisterBus` and `MemoryBus`.
"""

from typing import Any

import cocotb
from cocotb.triggers import RisingEdge

from vfiouser_virtio.rtl.client import DmaRefused
from vfiouser_virtio.rtl.cocotb_bridge import BridgedDesign, RegisterError

MAX_CLOCKS = 10_000
"""Clocks in which a design must answer a register: one that hangs must not hang the simulation."""
_RESPONSES = ("OKAY", "EXOKAY", "SLVERR", "DECERR")
_OKAY, _SLVERR = 0, 2
_INCR = 1


class _Channels:
    """Signals of one interface, as attributes."""

    def __init__(self, dut: Any, prefix: str, clock: Any) -> None:
        self._dut, self._prefix, self._clock = dut, prefix, clock

    def __getattr__(self, name: str) -> Any:
        signal = getattr(self._dut, f"{self._prefix}_{name}")
        setattr(self, name, signal)
        return signal

    async def clock(self) -> None:
        """The next rising edge: values are those of before it."""
        await RisingEdge(self._clock)


class AxiLiteMaster:
    """Master of a design's AXI4-Lite registers: a `RegisterBus`. One access at a time."""

    def __init__(self, dut: Any, prefix: str, clock: Any) -> None:
        self._axi = axi = _Channels(dut, prefix, clock)
        self._width = len(axi.wdata) // 8
        self._first = self._unknown = 0  # of the read under way: its first word, and bits that are X or Z
        for signal in (axi.awvalid, axi.wvalid, axi.bready, axi.arvalid, axi.rready):
            signal.value = 0

    async def read(self, offset: int, count: int) -> bytes:
        """See `RegisterBus`: narrow ones are cut out of a word, wide ones are several."""
        start = offset % self._width
        self._first, self._unknown = offset - start, 0
        words = [await self._read_word(each) for each in self._words(offset, count)]
        if self._unknown >> 8 * start & (1 << 8 * count) - 1:
            cocotb.log.warning("a read of %d bytes at %#x has bits that are X or Z: they read as 0", count, offset)
        return b"".join(words)[start : start + count]

    async def write(self, offset: int, data: bytes) -> None:
        """See `RegisterBus`: narrow ones have write strobes."""
        for word in self._words(offset, len(data)):
            first, last = max(offset, word), min(offset + len(data), word + self._width)
            strobes = ((1 << last - first) - 1) << first - word
            value = int.from_bytes(data[first - offset : last - offset], "little") << 8 * (first - word)
            await self._write_word(word, value, strobes)

    def _words(self, offset: int, count: int) -> range:
        return range(offset - offset % self._width, offset + count, self._width)

    async def _read_word(self, address: int) -> bytes:
        axi = self._axi
        axi.araddr.value, axi.arvalid.value, axi.rready.value = address, 1, 1
        for _ in range(MAX_CLOCKS):
            await axi.clock()
            if axi.arvalid.value == 1 and axi.arready.value == 1:
                axi.arvalid.value = 0
            if axi.rvalid.value == 1 and axi.rready.value == 1:
                axi.rready.value = 0
                _check(axi.rresp)
                value, unknown = known_bits(axi.rdata.value)
                self._unknown |= unknown << 8 * (address - self._first)
                return value.to_bytes(self._width, "little")
        raise self._no_answer()

    async def _write_word(self, address: int, value: int, strobes: int) -> None:
        axi = self._axi
        axi.awaddr.value, axi.awvalid.value = address, 1
        axi.wdata.value, axi.wstrb.value, axi.wvalid.value = value, strobes, 1
        axi.bready.value = 1
        for _ in range(MAX_CLOCKS):
            await axi.clock()
            if axi.awvalid.value == 1 and axi.awready.value == 1:
                axi.awvalid.value = 0
            if axi.wvalid.value == 1 and axi.wready.value == 1:
                axi.wvalid.value = 0
            if axi.bvalid.value == 1 and axi.bready.value == 1:
                axi.bready.value = 0
                _check(axi.bresp)
                return
        raise self._no_answer()

    def _no_answer(self) -> RegisterError:
        axi = self._axi
        for signal in (axi.arvalid, axi.awvalid, axi.wvalid):
            signal.value = 0
        return RegisterError(f"no answer for {MAX_CLOCKS} clocks")


class AxiMemory:
    """Guest memory behind a design's AXI4 master: a `MemoryBus`.

    One burst of each direction at a time, INCR and of the full width; others get SLVERR, as what the guest refuses.
    """

    def __init__(self, dut: Any, prefix: str, clock: Any, design: BridgedDesign) -> None:
        self._axi = axi = _Channels(dut, prefix, clock)
        self._width = len(axi.wdata) // 8
        self._design = design
        self._tasks: list[Any] = []

    def restart(self) -> None:
        """See `MemoryBus`."""
        for task in self._tasks:
            task.cancel()
        axi = self._axi
        for signal in (axi.arready, axi.rvalid, axi.rlast, axi.awready, axi.wready, axi.bvalid):
            signal.value = 0
        self._tasks = [cocotb.start_soon(self._reads()), cocotb.start_soon(self._writes())]

    async def _reads(self) -> None:
        axi = self._axi
        while True:
            await _taken(axi, axi.arvalid, axi.arready)
            address, beats, simple = self._burst(axi.araddr, axi.arlen, axi.arburst, axi.arsize)
            response, data = _SLVERR, bytes(beats * self._width)
            if simple:
                try:
                    data, response = await self._design.dma_read(address, len(data)), _OKAY
                except DmaRefused as refused:
                    cocotb.log.warning("%s", refused)
            for beat in range(beats):
                word = data[beat * self._width : (beat + 1) * self._width]
                axi.rdata.value, axi.rresp.value = int.from_bytes(word, "little"), response
                axi.rlast.value = int(beat == beats - 1)
                await _given(axi, axi.rvalid, axi.rready, last=beat == beats - 1)

    async def _writes(self) -> None:
        axi = self._axi
        while True:
            await _taken(axi, axi.awvalid, axi.awready)
            address, beats, simple = self._burst(axi.awaddr, axi.awlen, axi.awburst, axi.awsize)
            data, strobes, unknown = bytearray(), 0, 0
            axi.wready.value = 1
            for beat in range(beats):
                await axi.clock()
                while axi.wvalid.value != 1 or axi.wready.value != 1:
                    await axi.clock()
                word, word_unknown = known_bits(axi.wdata.value)
                data += word.to_bytes(self._width, "little")
                unknown |= word_unknown << 8 * beat * self._width
                strobes |= known_bits(axi.wstrb.value)[0] << beat * self._width
            axi.wready.value = 0
            runs = written_runs(strobes) if simple else []
            if any(unknown >> 8 * start & (1 << 8 * (end - start)) - 1 for start, end in runs):
                cocotb.log.warning("a write at %#x has bits that are X or Z: they are stored as 0", address)
            response = _OKAY if simple else _SLVERR
            try:
                for start, end in runs:
                    await self._design.dma_write(address + start, bytes(data[start:end]))
            except DmaRefused as refused:
                cocotb.log.warning("%s", refused)
                response = _SLVERR
            axi.bresp.value = response
            await _given(axi, axi.bvalid, axi.bready)

    def _burst(self, address: Any, length: Any, burst: Any, size: Any) -> tuple[int, int, bool]:
        """Address and beats of a burst, and whether it is one that can be carried out."""
        (at, vague), (beats, unknown) = known_bits(address.value), known_bits(length.value)
        if vague or unknown:
            cocotb.log.warning("a burst whose address (%s) or length (%s) is X or Z", address.value, length.value)
            return at, beats + 1, False
        simple = known_bits(burst.value) == (_INCR, 0) and known_bits(size.value) == (self._width.bit_length() - 1, 0)
        if not simple:
            cocotb.log.warning("a burst of another kind than INCR of %d bytes a beat", self._width)
        return at, beats + 1, simple


async def _taken(axi: _Channels, valid: Any, ready: Any) -> None:
    """Wait for an offer, and take it in that clock: its signals can be read then."""
    ready.value = 1
    await axi.clock()
    while valid.value != 1 or ready.value != 1:
        await axi.clock()
    ready.value = 0


async def _given(axi: _Channels, valid: Any, ready: Any, *, last: bool = True) -> None:
    """Offer what has been put on the signals until it is taken; without ``last``, another offer follows at once."""
    valid.value = 1
    await axi.clock()
    while ready.value != 1 or valid.value != 1:
        await axi.clock()
    if last:
        valid.value = 0


def written_runs(strobes: int) -> list[tuple[int, int]]:
    """Begin and end of each run of bytes that are written."""
    runs, start = [], 0
    while strobes >> start:
        start += (strobes >> start & -(strobes >> start)).bit_length() - 1
        end = start + ((~strobes >> start) & -(~strobes >> start)).bit_length() - 1
        runs.append((start, end))
        start = end
    return runs


def known_bits(value: Any) -> tuple[int, int]:
    """Value of a signal, in which bits that are X or Z are 0; and which bits those are.

    Registers that a design has not reset, and bytes of a bus that are not written, have such.
    """
    try:
        return int(value), 0
    except ValueError:
        bits = str(value)
        return int("".join("1" if bit in "1H" else "0" for bit in bits), 2), int(
            "".join("0" if bit in "01LH" else "1" for bit in bits), 2
        )


def _check(response: Any) -> None:
    number, unknown = known_bits(response.value)
    if unknown:
        raise RegisterError(f"the design answers {response.value}, which is no response")
    if number != _OKAY:
        raise RegisterError(f"the design answers {_RESPONSES[number]}")
