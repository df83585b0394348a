"""Binding of an enabled queue's ring to memory: mapped guest memory, or copies kept by messages.

::

    driver's addresses ──▶ BoundRing ──▶ views of guest memory ──────────────────────────────▶ Ring
                                    └──▶ copies, which `remote` keeps up to date ────────────▶ Ring

It lives from the queue's enabling to its reset. QEMU remaps RAM under live rings (SeaBIOS: 25 times in a boot): the
ring's state survives that, and it is bound to its new place at the next look.
"""

from collections.abc import Callable

from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.vring import Area, CopyRoom, Ring, Shadow

BURST = 64
"""Chains taken from the ring at once: enough to spread the cost of a look, few enough to be fair to other queues."""


class BoundRing:
    """Ring bound to memory; ``areas`` are its three parts where the driver put them, ``name`` is for errors.

    ``room`` is that of the device's copies.
    """

    def __init__(
        self,
        name: str,
        ring: Ring,
        memory: GuestMemory,
        areas: list[Area],
        room: CopyRoom,
        wake: Callable[[], None],
    ) -> None:
        self.name = name
        self.ring = ring
        self.memory = memory
        self.areas = areas
        self.shadow = Shadow(memory, room)
        """Copies of the buffers of chains in flight that have no file descriptor."""
        self.by_message = False
        """The ring itself has no file descriptor: its parts are bound to copies."""
        self.unmapped = False
        """A look at the ring has failed because its memory is not mapped: it must be looked at again when it is."""
        self.missed = False
        """A task waits for it to come back, to log it if it does not, or has done so."""
        self.lacks = ""
        """What the last look has failed of."""
        self._dead = False
        self.fetching = self.flushing = False
        """A task is awaiting messages to look at the ring, or to show what was used."""
        self.wake = wake
        """Have the ring looked at again."""
        self.unsent: list[tuple[int, int, bytes]] = []
        """(part, offset, bytes) that are stored in the copies, and that the driver does not have yet."""
        self.chunk = BURST
        """Chains to take from the ring at once; one, while the device takes most buffers as `Singles`."""
        self.round = 0
        """Of the loop, in which chains were last taken by messages (see `turns`)."""
        self.generation = -1
        """Of the memory map that the ring was bound with: see `GuestMemory.generation`."""

    def bind(self) -> bool:
        """Whether the ring can be looked at now; after a change of the memory map it is bound again first."""
        memory = self.memory
        if self.generation == memory.generation:
            return True
        try:
            views = [self._view(area) for area in self.areas]
        except Unmapped as error:
            self.unmapped = True
            self.lacks = str(error)
            return False
        self.by_message = None in views
        if self.by_message:
            # The used ring starts as the driver sees it: indexes where we left them.
            views = [memoryview(bytearray(area.length)) for area in self.areas]
        self.ring.bind(*(view for view in views if view is not None))
        self.generation = memory.generation
        self.unmapped = False
        return True

    def _view(self, area: Area) -> memoryview | None:
        look_up = self.memory.writable if area.write else self.memory.readable
        try:
            views = look_up(area.address, area.length)
        except NeedsMessages:
            return None
        # Parts that cross from one window into another are reached like memory without a file descriptor.
        return views[0] if len(views) == 1 else None

    def alive(self) -> bool:
        """Whether the queue has not been reset since, and so has still to do with this ring."""
        return not self._dead

    @property
    def is_current(self) -> bool:
        """Whether the memory map is still the one that the ring was bound with."""
        return self.generation == self.memory.generation

    @property
    def has_unpublished(self) -> bool:
        """Whether the driver has not been shown all that was used."""
        ring = self.ring
        # Asked four times for each request: without a call, unless what was completed must wait for others.
        if ring.in_order and not self.unsent:
            return ring.unpublished > 0
        return bool(ring.completed or self.unsent)

    @property
    def needs_messages(self) -> bool:
        """Whether showing it takes messages."""
        return bool(self.by_message or self.unsent or self.shadow.claims)

    def kill(self) -> None:
        """The queue was reset: nothing of this reaches guest memory any more."""
        self._dead = True
        self.ring.kill()
        self.shadow.drop()
        self.unsent.clear()
