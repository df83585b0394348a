"""The guest's virtqueue and the device's ring on the same memory, both ours, in any order of their steps.

Where one side has a full barrier the other side may act: that is where races are decided. Whoever sleeps must have been
woken by the time there is something to do; that is checked after each step, so that a lost wake-up is found at once.
"""

import os
import random
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.ring_model.device_machine import start_at

from vfiouser_virtio.dma import DmaBuffer, SharedMemory
from vfiouser_virtio.guest import DriverVirtqueue, QueueFull, SplitVirtqueue, make_virtqueue
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.vring import Chain, RingFeatures, make_ring, ring_areas

RAM = 1 << 18
DRIVER_STEPS = ["add and kick", "kick", "get", "sleep"]
DEVICE_STEPS = ["pop", "complete", "complete and publish", "publish", "suppress", "sleep"]
# What the other side does at one's next full barrier; mostly nothing.
DRIVER_MEANWHILE = st.sampled_from(["", "", *DRIVER_STEPS])
DEVICE_MEANWHILE = st.sampled_from(["", "", *DEVICE_STEPS])
CUTS = st.lists(st.tuples(st.sampled_from([1, 2, 16, 100]), st.booleans()), min_size=1, max_size=4)

_BARRIERS = {
    "device": ("vfiouser_virtio.vring.split", "vfiouser_virtio.vring.packed"),
    "driver": ("vfiouser_virtio.guest.split_virtqueue", "vfiouser_virtio.guest.packed_virtqueue"),
}


def begun_at(index: int) -> type[SplitVirtqueue]:
    """Split rings as if so many buffers had been through them."""

    class BegunAt(SplitVirtqueue):
        first_index = index

    return BegunAt


class PairMachine(RuleBasedStateMachine):
    """One queue. Subclasses choose the kind."""

    packed = False

    vq: DriverVirtqueue

    @initialize(
        size=st.integers(0, 3),
        odd=st.integers(1, 9),
        indirect=st.booleans(),
        event_idx=st.booleans(),
        in_order=st.booleans(),
        weak=st.booleans(),
        first=st.sampled_from([0, 0xFFFD, 0xFFFF]),
        seed=st.integers(0, 1 << 32),
    )
    def start(
        self, size: int, odd: int, indirect: bool, event_idx: bool, in_order: bool, weak: bool, first: int, seed: int
    ) -> None:
        wanted = {
            Feature.RING_PACKED: self.packed,
            Feature.INDIRECT_DESC: indirect,
            Feature.EVENT_IDX: event_idx,
            Feature.IN_ORDER: in_order,
        }
        features = mask_of(feature for feature, on in wanted.items() if on)
        self.in_order = in_order
        self.rng = random.Random(seed)
        self.ram = SharedMemory(RAM)
        assert self.ram.fd is not None
        memory = self.memory = GuestMemory()
        memory.map(self.ram.address, RAM, readable=True, writable=True, fd=os.dup(self.ram.fd), offset=0)
        length = odd if self.packed else 1 << size
        self.kicked = self.interrupted = False
        self.keep_on = True
        make: Callable[..., DriverVirtqueue] = partial(make_virtqueue, features=features)
        if not self.packed:
            make = partial(begun_at(first), indirect=indirect, event_idx=event_idx, in_order=in_order)
        self.vq = make(self.ram, 0, length, self._on_kick, lambda _vq: self.keep_on)
        self.ring = make_ring(length, memory, RingFeatures.of(features))
        areas = ring_areas(length, RingFeatures.of(features), self.vq.desc, self.vq.driver, self.vq.device)
        self.ring.bind(*(memory.writable(area.address, area.length)[0] for area in areas))
        if not self.packed:
            start_at(self.ring, first)
            self.ring.request_notification()
        self.number = 0
        self.added: list[int] = []
        self.shown: deque[int] = deque()
        self.in_flight: list[tuple[int, Chain]] = []
        self.buffers: dict[int, tuple[list[DmaBuffer], list[DmaBuffer]]] = {}
        self.written: dict[int, bytes] = {}
        self.published = 0
        self.device_asleep = self.driver_asleep = False
        self._meanwhile: dict[str, str] = {}
        self._patched: list[tuple[ModuleType, str, Any]] = []
        for side, names in _BARRIERS.items():
            for name in names:
                self._patch(import_module(name), "full_barrier", lambda side=side: self._at_barrier(side))
                if weak:  # as on a machine that reorders more: there are more barriers then
                    self._patch(import_module(name), "TSO", False)

    def teardown(self) -> None:
        if not hasattr(self, "vq"):
            return
        try:
            self._come_to_rest()
        finally:
            for module, name, original in reversed(self._patched):
                setattr(module, name, original)
            self.memory.clear()
            self.ram.close()

    def _come_to_rest(self) -> None:
        """Nothing new: each side does what it is woken for, and every buffer comes back."""
        for _ in range(200):
            self._device("pop")
            while self.in_flight:
                self._device("complete and publish")
            self._device("publish")
            self._device("sleep")
            self._driver("kick")
            self._driver("get")
            self._driver("sleep")
            if not (self.buffers or self.added):
                break
        assert not self.buffers, f"{len(self.buffers)} buffers did not come back"
        assert self.vq.num_free == self.vq.size
        assert self.vq.num_in_flight == 0

    # ---- rules ---------------------------------------------------------------------------------------------------

    @rule(
        add=st.tuples(CUTS, st.integers(0, 3)),
        driver=st.sampled_from(DRIVER_STEPS),
        device_meanwhile=DEVICE_MEANWHILE,
        device=st.sampled_from(DEVICE_STEPS),
        driver_meanwhile=DRIVER_MEANWHILE,
        interrupt=st.booleans(),
        keep_on=st.booleans(),
    )
    def work(
        self,
        add: tuple[list[tuple[int, bool]], int],
        driver: str,
        device_meanwhile: str,
        device: str,
        driver_meanwhile: str,
        interrupt: bool,
        keep_on: bool,
    ) -> None:
        """A step of each side, perhaps one of the other in the middle of it; then the driver's interrupt handler."""
        cut, repeat = add
        for _ in range(repeat):
            self._add(cut)
        with self._during("driver", device_meanwhile):
            self._driver(driver)
        self.nobody_sleeps_in_vain()
        with self._during("device", driver_meanwhile):
            self._device(device)
        self.nobody_sleeps_in_vain()
        if interrupt and self.interrupted:
            self.interrupted, self.keep_on = False, keep_on
            with self._during("driver", device_meanwhile):
                self.vq.interrupt()
            self.driver_asleep = False
            if self.vq.callbacks_on:
                # It has taken nothing, but knows that there is something: it goes on until there is nothing.
                self._driver("get")

    @invariant()
    def nobody_sleeps_in_vain(self) -> None:
        if not hasattr(self, "vq"):
            return
        assert not (self.device_asleep and self.shown and not self.kicked), "the device sleeps and was not notified"
        assert not (self.driver_asleep and self.published and not self.interrupted), (
            "the driver sleeps and was not interrupted"
        )

    # ---- the driver ----------------------------------------------------------------------------------------------

    def _driver(self, step: str) -> None:
        if step == "add and kick":
            self._add([(16, False), (16, True)])
            step = "kick"
        if step == "kick":
            # From here on the device may see them.
            self.shown += self.added
            self.added = []
            self.vq.kick()
            return
        if self.driver_asleep and not self.interrupted:
            return
        self.driver_asleep = self.interrupted = False
        if step == "get":
            self._get_all()
        else:
            self.driver_asleep = self.vq.restart()

    def _add(self, cut: list[tuple[int, bool]]) -> None:
        cut = sorted(cut[: self.vq.size], key=lambda piece: piece[1])
        out_num = sum(not writable for _, writable in cut)
        pieces = [self.ram.alloc(length, 1) for length, _ in cut]
        readable, writable = pieces[:out_num], pieces[out_num:]
        for piece in pieces:
            piece.view[:] = self.rng.randbytes(len(piece.view))
        sg = [(piece.address, len(piece.view)) for piece in pieces]
        try:
            self.vq.add_buf(sg, len(readable), len(writable), self.number)
        except QueueFull:
            for piece in pieces:
                self.ram.free(piece)
            return
        self.buffers[self.number] = readable, writable
        self.added.append(self.number)
        self.number += 1

    def _get_all(self) -> None:
        while (used := self.vq.get_buf()) is not None:
            token, written = used
            content = self.written.pop(token)
            assert written == len(content)
            if self.in_order:
                assert token == min(self.buffers), "used out of order"
            readable, writable = self.buffers.pop(token)
            assert b"".join(bytes(piece.view) for piece in writable)[:written] == content
            for piece in (*readable, *writable):
                self.ram.free(piece)
            self.published -= 1

    def _on_kick(self) -> None:
        self.kicked = True

    # ---- the device ----------------------------------------------------------------------------------------------

    def _device(self, step: str) -> None:
        if step in ("complete", "complete and publish", "publish"):
            if self.in_flight and step != "publish":
                self._complete()
            if step != "complete":
                self._publish()
        elif not self.device_asleep or self.kicked:
            self.device_asleep = self.kicked = False
            if step == "pop":
                for chain in self.ring.pop(64):
                    number = self.shown.popleft()
                    assert chain.readable.read() == b"".join(bytes(part.view) for part in self.buffers[number][0])
                    self.in_flight.append((number, chain))
            elif step == "suppress":
                self.ring.suppress_notifications()
            else:
                self.device_asleep = not self.ring.request_notification()

    def _complete(self) -> None:
        number, chain = self.in_flight.pop(self.rng.randrange(len(self.in_flight)))
        content = self.rng.randbytes(self.rng.choice([0, chain.room]))
        chain.writable.write(content)
        self.written[number] = content
        chain.complete()

    def _publish(self) -> None:
        # From here on the driver may see them.
        count = self.ring.unpublished
        self.published += count
        if self.ring.publish():
            self.interrupted = True

    # ---- barriers ------------------------------------------------------------------------------------------------

    @contextmanager
    def _during(self, side: str, other_does: str) -> Any:
        self._meanwhile = {side: other_does} if other_does else {}
        yield
        self._meanwhile = {}

    def _at_barrier(self, side: str) -> None:
        step = self._meanwhile.pop(side, "")
        if step:
            (self._device if side == "driver" else self._driver)(step)

    def _patch(self, module: ModuleType, name: str, value: Any) -> None:
        self._patched.append((module, name, getattr(module, name)))
        setattr(module, name, value)


class SplitPair(PairMachine):
    packed = False


class PackedPair(PairMachine):
    packed = True
