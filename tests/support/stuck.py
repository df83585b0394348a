"""A device that never yields, in one of several ways, and what is to be asked about it."""

# Its reset is what does not end.
DEVICE = """\
import collections, itertools, re, time
from vfiouser_virtio.virtio import Device, queue

class Stuck(Device):
    device_id = 42
    requestq = queue()
    def __init__(self, how: str):
        super().__init__()
        self.reset = getattr(self, how)
    def loops(self):
        while True:
            pass
    def sleeps(self):
        time.sleep(3600)
    def catches(self):
        while True:
            try:
                time.sleep(0.01)
            except BaseException:
                pass
    def searches(self):
        open("searching", "w").close()
        re.match("(a+)+$", "a" * 64 + "b")
    def holds_the_lock(self):
        collections.deque(itertools.repeat(0), 0)
    def comes_back(self):
        time.sleep(3)
"""
