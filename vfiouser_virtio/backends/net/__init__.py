"""Network back ends, by QEMU's name for them: netdevs. What carries frames between a network device and a network."""
