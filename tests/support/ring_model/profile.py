"""How much the ring machines do: a second or two each in the suite, minutes with ``--long``."""

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

# To find what is broken on purpose; most need a few dozen. Which runs come depends on the modules that are imported:
# hypothesis tries their constants, also where it is not to be random.
FINDING = 1000
STEPS = 50


def run(machine: type[RuleBasedStateMachine], examples: int, *, random: bool) -> None:
    """So many runs of the machine, always the same or random ones. Raises what goes wrong in the shortest one found."""
    _run(machine, settings(max_examples=examples, derandomize=not random))


def finding(machine: type[RuleBasedStateMachine]) -> list[BaseException]:
    """What some more runs than those of the suite find, without making it shorter: the exception and its contexts.

    The last of them came first: a machine that has failed is torn down, and may then find more.
    """
    try:
        _run(machine, settings(max_examples=FINDING, derandomize=True, phases=[Phase.generate]))
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
