"""``python -m vfiouser_virtio.testing.conformance`` prints docs/conformance.md."""

import sys

from vfiouser_virtio.testing.conformance import document

sys.stdout.write(document())
