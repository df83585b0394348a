"""What QEMU prints does not grow without bound."""

import os
import subprocess

import pytest

from vfiouser_virtio.vm.kept_output import FIRST, LAST, KeptOutput


def test_a_little_is_kept_as_it_is() -> None:
    with KeptOutput() as output:
        subprocess.run("echo one; echo two >&2", shell=True, stdout=output.fd, stderr=output.fd, check=True)
        output.trim()
        assert output.text == "one\ntwo\n"


@pytest.mark.parametrize("trimmed", [True, False])
def test_of_much_the_first_and_the_last_part_are_kept(trimmed: bool) -> None:
    middle = 3 << 20
    with KeptOutput() as output:
        for part in (b"a" * FIRST, b"b" * middle, b"c" * LAST):
            os.write(output.fd, part)
            if trimmed:
                output.trim()
        assert output.text == f"{'a' * FIRST}\n[{middle} bytes left out]\n{'c' * LAST}"
        if trimmed:
            assert os.fstat(output.fd).st_blocks * 512 <= FIRST + LAST + 4096
