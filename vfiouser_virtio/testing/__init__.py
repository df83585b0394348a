"""The public test kit.

- `pytest_plugin`: fixtures that put a device on a carrier and a guest in front of it (docs/testing-your-device.md)
- `carriers`: the same without pytest; `qtest_machine`: a real QEMU without a guest's CPU as one of them
- `driver`: a split-ring driver that can also do wrong; `fuzz`: mutations of everything a client and a guest can say
- `conformance`: is this server a virtio device?
"""
