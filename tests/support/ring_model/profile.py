"""How much the ring machines do: a second or two each in the suite, minutes with ``--long``."""

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

EXAMPLES = 50
STEPS = 50
# `--long`: as many times more, and other ones each time.
LONG = 100


def run(machine: type[RuleBasedStateMachine], *, long: bool) -> None:
    """Always the same runs of the machine, or many random ones. Raises what goes wrong in the shortest one found."""
    _run(machine, settings(max_examples=EXAMPLES * LONG if long else EXAMPLES, derandomize=not long))


def finding(machine: type[RuleBasedStateMachine]) -> list[BaseException]:
    """What some more runs than those of the suite find, without making it shorter: the exception and its contexts.

    The last of them came first: a machine that has failed is torn down, and may then find more.
    """
    try:
        _run(machine, settings(max_examples=4 * EXAMPLES, derandomize=True, phases=[Phase.generate]))
    except Exception as error:
        found: list[BaseException] = []
        each: BaseException | None = error
        while each is not None:
            found.append(each)
            each = each.__context__
        return found
    return []


def _run(machine: type[RuleBasedStateMachine], how: settings) -> None:
    suppressed: list[Any] = list(HealthCheck)  # Any: pyright takes its members for instances of its metaclass
    everything = settings(how, stateful_step_count=STEPS, deadline=None, suppress_health_check=suppressed)
    run_state_machine_as_test(machine, settings=everything)
