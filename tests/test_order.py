"""`support.order`: no test is lost or run twice, and the long ones are dealt."""

import pytest
from support.order import dealt


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 10, 103])
def test_each_part_begins_with_its_share_of_the_long_ones(count: int, workers: int) -> None:
    def takes_long(item: int) -> bool:
        return item % 5 == 0

    order = dealt(range(count), workers, takes_long)
    assert sorted(order) == list(range(count))
    shares = []
    for left in range(workers, 0, -1):
        part, order = order[: len(order) // left], order[len(order) // left :]
        shares.append(sum(map(takes_long, part)))
        assert all(map(takes_long, part[: shares[-1]]))
    assert max(shares) - min(shares) <= 1
