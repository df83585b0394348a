"""The public test kit: a driver for tests of a device (`testing.driver`), and the fuzzer (`testing.fuzz`)."""
