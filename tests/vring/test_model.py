"""Split and packed rings against a model written from the specification (virtio 1.4, 2.6 to 2.8).

`--long` makes it a run of some minutes, with other examples each time.
"""

import pytest
from hypothesis.stateful import RuleBasedStateMachine
from support.amounts import Amounts
from support.ring_model.device_machine import PackedMachine, SplitMachine
from support.ring_model.hostile_machine import HostilePacked, HostileSplit
from support.ring_model.pair_machine import PackedPair, SplitPair
from support.ring_model.profile import run

MACHINES = SplitMachine, PackedMachine, SplitPair, PackedPair, HostileSplit, HostilePacked


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_rings_do_what_the_specification_says(
    machine: type[RuleBasedStateMachine], long_run: bool, amounts: Amounts
) -> None:
    run(machine, amounts.ring_examples, random=long_run)
