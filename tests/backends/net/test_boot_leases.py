"""Leases of the boot server: who has which address, and until when."""

from ipaddress import IPv4Address

from vfiouser_virtio.backends.net.boot.leases import DECLINE_TIME, LEASE_TIME, MAX_ADDRESSES, OFFER_TIME, Leases

POOL = [IPv4Address(f"10.0.2.{number}") for number in (15, 16, 17)]
ONE, TWO, THREE, FOUR = (bytes((0x52, 0, 0, 0, 0, number)) for number in range(1, 5))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def leases(clock: Clock | None = None) -> Leases:
    return Leases(POOL, clock or Clock())


def test_a_station_is_offered_the_same_address_again_and_can_take_it() -> None:
    pool = leases()
    assert [pool.offer(mac, None) for mac in (ONE, TWO, ONE)] == [POOL[0], POOL[1], POOL[0]]
    assert pool.take(ONE, POOL[0])
    assert not pool.take(ONE, POOL[2]), "it has another one"
    assert not pool.take(THREE, POOL[1]), "it is another's"
    assert not pool.take(THREE, IPv4Address("10.0.2.99")), "it is not in the pool"
    assert pool.take(THREE, POOL[2]), "free, as after a restart of the server"
    assert len(pool) == 3


def test_a_wish_counts_where_the_address_is_free() -> None:
    pool = leases()
    assert pool.offer(ONE, POOL[2]) == POOL[2]
    assert pool.offer(TWO, POOL[2]) == POOL[0]
    assert pool.offer(THREE, IPv4Address("192.0.2.1")) == POOL[1]


def test_stations_that_are_made_up_take_nobody_s_lease_away() -> None:
    clock = Clock()
    pool = leases(clock)
    pool.offer(ONE, None)
    assert pool.take(ONE, POOL[0])
    assert [pool.offer(mac, None) for mac in (TWO, THREE, FOUR)] == [POOL[1], POOL[2], None]
    clock.now += OFFER_TIME
    assert len(pool) == 1
    assert pool.offer(FOUR, None) == POOL[1]
    assert pool.offer(ONE, None) == POOL[0]
    clock.now += LEASE_TIME
    assert len(pool) == 0
    assert pool.offer(FOUR, None) == POOL[0]


def test_a_lease_lasts_from_its_renewal_on() -> None:
    clock = Clock()
    pool = leases(clock)
    for _ in range(3):
        assert pool.take(ONE, POOL[0])
        clock.now += LEASE_TIME - 1
    assert len(pool) == 1


def test_an_address_is_given_back_by_its_station_only() -> None:
    pool = leases()
    pool.take(ONE, POOL[0])
    pool.release(TWO, POOL[0])
    pool.decline(TWO, POOL[0])
    pool.withdraw(TWO)
    assert not pool.take(TWO, POOL[0])
    pool.release(ONE, POOL[0])
    assert pool.take(TWO, POOL[0])


def test_an_address_that_is_in_use_is_not_given_out_for_a_while() -> None:
    clock = Clock()
    pool = leases(clock)
    for expected in POOL:
        address = pool.offer(ONE, POOL[0])
        assert address is not None
        assert address == expected
        pool.decline(ONE, address)
    assert pool.offer(ONE, None) is None
    assert not pool.take(ONE, POOL[0])
    clock.now += DECLINE_TIME
    assert pool.offer(ONE, None) == POOL[0]


def test_the_pool_is_bounded() -> None:
    pool = Leases([IPv4Address(number) for number in range(1 << 24, (1 << 24) + 2 * MAX_ADDRESSES)], Clock())
    given = [pool.offer(number.to_bytes(6, "big"), None) for number in range(2 * MAX_ADDRESSES)]
    assert sum(address is not None for address in given) == len(pool) == MAX_ADDRESSES
