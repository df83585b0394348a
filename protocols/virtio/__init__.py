"""Wire formats of virtio 1.4: identifiers, feature bits, the PCI transport, rings, and one module per device type."""
