"""Removal of DMA mappings from this process: in small steps, and what can be done where the kernel refuses."""

from vfiouser_virtio.address_space import Places, Region
from vfiouser_virtio.vfio_device import Hold

STEP = 256
"""Regions that are unmapped at once, which takes some 2 ms. All of 28,000 pages would stop every device for 150 ms."""


class Removal:
    """Regions to unmap, in order of their addresses; with ``whole``, all there are, and their windows go with them."""

    def __init__(self, places: Places, regions: list[Region], *, whole: bool = False) -> None:
        self.regions = regions
        self.whole = whole
        self.hold: Hold | None = None
        """What ends when it is done."""
        self.error: OSError | None = None
        """Why something is still mapped; without its traceback, of which a frame has this object."""
        self._places = places
        self._position = 0
        self._failed: list[Region] = []

    @property
    def is_short(self) -> bool:
        """Whether it takes one step."""
        return len(self.regions) <= STEP

    @property
    def still_mapped(self) -> list[Region]:
        """After it has ended: what could not be unmapped. Otherwise also what it has not come to."""
        return self._failed + self.regions[self._position :]

    def touches(self, address: int, end: int) -> bool:
        """Whether a range has something of what is being unmapped, or of what lies in between."""
        return self.regions[0].address < end and self.regions[-1].end > address

    def run(self) -> None:
        """Do all of it at once."""
        while self.step():
            pass

    def step(self) -> bool:
        """Do a part of it; whether there is more. Look at ``error`` after the last one."""
        first = self._position
        self._position = last = min(first + STEP, len(self.regions))
        try:
            self._places.take_out(self.regions, first, last)
        except OSError as error:
            self._failed += self.regions[first:last]
            self.error = error.with_traceback(None)
        if last < len(self.regions):
            return True
        if self.whole:
            self._finish()
        return False

    def _finish(self) -> None:
        """Nothing of a client may be left. A window as a whole can be covered where its middle could not."""
        failed, self._failed, self.error = self._failed, [], None
        try:
            self._places.cover_windows()
        except OSError as error:
            self.error = error.with_traceback(None)
        for region in failed:
            if self.error is None and self._places.covered(region):
                continue
            try:
                self._places.take_out([region], 0, 1)
            except OSError as error:
                self._failed.append(region)
                self.error = error.with_traceback(None)
        if self.error is None:
            self._places.forget()
