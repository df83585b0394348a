"""Rings and buffers in memory without a file descriptor (QEMU without ``share=on``), by DMA_READ and DMA_WRITE.

This is all that is asynchronous about rings, which work on copies. `take` fetches the driver's side of the ring and the
buffers of each chain; `flush` delivers what the device wrote, then the used entries, in the order that the ring says,
then looks whether an interrupt is due. Whatever happens during an await is looked for afterwards: a reset
(`BoundRing.alive`), another memory map, a client that has left.
"""

from collections import deque
from collections.abc import Callable
from time import perf_counter

from vfiouser_virtio.errors import ClientGone, GuestError, PeerError, Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.turns import turns
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.vring import Chain, NoRoom


async def take(
    bound: BoundRing, burst: "deque[Chain]", limit: int, wanted: Callable[[], bool], *, notified: bool
) -> None:
    """Move chains from the ring to ``burst``, up to ``limit`` and while they are ``wanted``.

    ``notified``: the driver has notified the device since the reset; else what it cannot have meant is passed over: see
    `Ring.offers_buffer`.

    Raises GuestError for a broken ring, and for memory that its client refuses to hand over.
    """
    memory, shadow = bound.memory, bound.shadow
    generation = memory.generation

    def same_ring() -> bool:
        # When the map has changed, the ring may be bound to other copies, in which nothing has been fetched.
        return bound.alive() and memory.generation == generation

    bound.fetching = True
    try:
        ring = bound.ring
        # What is offered again is not looked for in the ring, of which there is no copy then.
        retakes = bool(ring.again)
        if bound.by_message and not retakes:
            if not await _fetch_ring(bound, same_ring):
                return
            if not notified and not ring.offers_buffer():
                return
        shadow.begin()
        slice_end, bound.round = turns().woken(bound.round)
        while same_ring() and (ring.again if retakes else ring.has_available()) and len(burst) < limit and wanted():
            try:
                [chain] = (ring.retake if retakes else ring.pop)(1, shadow)
            except NeedsMessages as missing:
                shadow.make_room(missing.length)
                shadow.supply(missing.address, await memory.read(missing.address, missing.length))
                continue
            shadow.claim(chain.head)
            burst.append(chain)
            if perf_counter() >= slice_end:
                slice_end = await turns().wait()
    except NoRoom:
        shadow.room.call_when_freed(bound.wake)
    except (PeerError, Unmapped) as error:
        # The client refused, or the memory has gone (RAM is being remapped), or the client: wait what comes next.
        if same_ring() and not _has_left(memory, error):
            raise GuestError(f"{bound.name}: {error}") from error
    finally:
        bound.fetching = False
        shadow.begin()  # what was fetched in vain takes no room of other queues


async def _fetch_ring(bound: BoundRing, same_ring: Callable[[], bool]) -> bool:
    """Copy the driver's side of the ring here; False when it has nothing new and will notify us."""
    ring = bound.ring

    async def fetch(part: int) -> bool:
        """Copy one part; whether that has changed the copy."""
        data = await bound.memory.read(bound.areas[part].address, bound.areas[part].length)
        if not same_ring() or ring.parts[part] == data:
            return False
        ring.parts[part][:] = data
        return True

    first, *others = ring.fetch_order
    asked = False
    while True:
        await fetch(first)
        if not same_ring():
            return False
        if ring.has_available():
            break
        if asked:
            return False
        ring.request_notification()
        part, offset, length = ring.notification_word
        await bound.memory.write(bound.areas[part].address + offset, bytes(ring.parts[part][offset : offset + length]))
        asked = True
    for part in others:
        await fetch(part)
    if not others:
        # What makes a list of descriptors available is in the same part as the list, and a list may go round the end of
        # it: read before its first descriptor, its end may be older. What two reads agree about is whole.
        while await fetch(first):
            pass
    return same_ring()


async def flush(bound: BoundRing, ready: Callable[[], bool], interrupt: Callable[[], None]) -> None:
    """Show the driver what was used, and ``interrupt`` it if it wants that; returns when nothing is left to be shown.

    Also returns when the ring is not ``ready`` to be touched. Raises GuestError when the client refuses.
    """
    ring, shadow, memory = bound.ring, bound.shadow, bound.memory
    delivered = False
    slice_end, _ = turns().woken(0)
    try:
        while bound.alive() and bound.has_unpublished:
            delivered = False
            chains = ring.unpublished_chains
            for chain in chains:
                for address, data in shadow.written(chain):
                    await memory.write(address, data)
                shadow.forget([chain.head])  # only now: what is not delivered yet is not done
                if perf_counter() >= slice_end:  # nothing need be delivered of a chain, and it has 1024 buffers
                    slice_end = await turns().wait()
            delivered = True
            if not bound.alive() or not ready():
                return
            bound.unsent += [
                (part, offset, bytes(ring.parts[part][offset : offset + length]))
                for part, offset, length in ring.store_used(len(chains))
            ]
            while bound.unsent:
                await _send(bound, *bound.unsent[0])
                if not bound.alive():
                    return
                del bound.unsent[0]
            if bound.by_message:
                part, offset, length = ring.interrupt_word
                try:
                    wish = await memory.read(bound.areas[part].address + offset, length)
                    if bound.by_message:  # still
                        ring.parts[part][offset : offset + length] = wish
                except (PeerError, Unmapped):
                    pass  # its memory is unmapped already: what it asked for before stands
            if bound.alive() and ring.interrupt_due():
                interrupt()
    except (PeerError, Unmapped) as error:
        # What could not be put into the buffers is lost, but a used ring that is being remapped comes back.
        lost = not delivered or bound.is_current
        if bound.alive() and lost and not _has_left(memory, error):
            raise GuestError(f"{bound.name}: {error}") from error


def _has_left(memory: GuestMemory, error: Exception) -> bool:
    """Whether the reason is that the client is gone, and perhaps its memory as well: no fault."""
    return memory.client is None or isinstance(error, ClientGone)


async def _send(bound: BoundRing, part: int, offset: int, data: bytes) -> None:
    if bound.by_message:
        await bound.memory.write(bound.areas[part].address + offset, data)
    else:  # it has come back with a file descriptor
        bound.ring.parts[part][offset : offset + len(data)] = data
