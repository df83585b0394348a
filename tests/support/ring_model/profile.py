"""How much the ring machines do: a second or two each in the suite, minutes with ``--long``."""

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

EXAMPLES = 50
STEPS = 50
# `--long`: as many times more, and other ones each time.
LONG = 100


def run(machine: type[RuleBasedStateMachine], *, long: bool) -> None:
    """Always the same runs of the machine, or many random ones. Raises what goes wrong in the shortest one found."""
    _run(machine, settings(max_examples=EXAMPLES * LONG if long else EXAMPLES, derandomize=not long))


def fails(machine: type[RuleBasedStateMachine]) -> bool:
    """Whether some more runs than those of the suite find something; without making it shorter."""
    try:
        _run(machine, settings(max_examples=4 * EXAMPLES, derandomize=True, phases=[Phase.generate]))
    except Exception:  # whatever it is that was broken
        return True
    return False


def _run(machine: type[RuleBasedStateMachine], how: settings) -> None:
    everything = settings(how, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=everything)
