"""``python -m vfiouser_virtio`` is the command ``vfiouser-virtio``."""

import sys

from vfiouser_virtio.cli import main

if __name__ == "__main__":
    sys.exit(main())
