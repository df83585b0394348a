"""``python -m vfiouser_virtio.faults`` prints the tables of docs/evil.md."""

import sys

from vfiouser_virtio.faults.document import tables

if __name__ == "__main__":
    sys.stdout.write(tables())
