"""The part of a product of parameters that the plain run has: see `support.diagonal`."""

import itertools

from support.amounts import LONG, QUICK, USUAL, amounts
from support.diagonal import beside_it


def test_each_value_is_on_the_diagonal() -> None:
    product = [dict(zip("abc", each, strict=True)) for each in itertools.product(range(2), range(5), range(3))]
    beside = beside_it((number, "test", params) for number, params in enumerate(product))
    on_it = [params for number, params in enumerate(product) if number not in beside]
    assert len(on_it) == 5
    assert {name: {each[name] for each in on_it} for name in "abc"} == {"a": {0, 1}, "b": set(range(5)), "c": {0, 1, 2}}


def test_each_test_has_its_own_and_params_may_be_missing() -> None:
    items = [(f"{a}{b}", "f", {"a": a, "b": b}) for a in (3, 4) for b in (0, 7)]
    assert beside_it([*items, ("other", "g", {"a": 4}), ("alone", "h", {"b": 7})]) == ["37", "40"]


def test_the_quick_run_does_less_of_each_and_nothing_not_at_all() -> None:
    assert amounts(long=False, quick=False) == USUAL
    assert amounts(long=True, quick=True) == LONG
    # The longer the stride, the fewer are met.
    assert QUICK.boot_stride > USUAL.boot_stride > LONG.boot_stride == 1
    assert QUICK.every_way is USUAL.every_way is False
    for name in USUAL.__dataclass_fields__.keys() - {"boot_stride", "every_way"}:
        assert 0 < getattr(QUICK, name) < getattr(USUAL, name) <= getattr(LONG, name), name
