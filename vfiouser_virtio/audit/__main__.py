"""``python -m vfiouser_virtio.audit`` prints docs/audit.md."""

import sys

from vfiouser_virtio.audit.document import document

sys.stdout.write(document())
