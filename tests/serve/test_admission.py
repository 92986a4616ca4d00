"""Who begins: never more than fits, in fair turns, with a queue that ends."""

from __future__ import annotations

import random

import pytest

from lorica.serve import admission
from lorica.serve.admission import Admission, Limits, Overloaded
from lorica.serve.engine import TooLong
from lorica.serve.keys import Tenant

from .loop import run_in_loop

A, B = Tenant("a"), Tenant("b")


def begun(turns):
    return [turn._ready.done() for turn in turns]


@run_in_loop
async def test_turns_begin_while_their_tokens_fit_and_go_on_when_some_end():
    queue = Admission(Limits(kv_tokens=100))
    first, second, third = queue.enter(A, None, [60, 40, 10])
    assert begun([first, second, third]) == [True, True, False]
    second.end(5)
    assert begun([third]) == [True]
    assert sum(turn.tokens for turn in queue.running) <= 100


@run_in_loop
async def test_what_can_never_fit_is_told_so_and_takes_no_place():
    queue = Admission(Limits(kv_tokens=100, waiting=4))
    with pytest.raises(TooLong, match="101 tokens"):
        queue.enter(A, None, [1, 101])
    with pytest.raises(TooLong, match="5 answers"):
        queue.enter(A, None, [1] * 5)
    assert not queue.running and not queue.waiting


@run_in_loop
async def test_memory_is_counted_in_whole_blocks():
    queue = Admission(Limits(kv_tokens=96, page=32))
    turns = queue.enter(A, None, [33, 1, 1])
    assert begun(turns) == [True, True, False]
    with pytest.raises(TooLong):
        queue.enter(A, None, [97])


@run_in_loop
async def test_a_flood_of_one_tenant_does_not_keep_another_waiting():
    queue = Admission(Limits(kv_tokens=1000, running=2, waiting=500))
    flood = [queue.enter(A, None, [10])[0] for _ in range(200)]
    other = [queue.enter(B, None, [10])[0] for _ in range(5)]
    ended = 0
    while not all(begun(other)):
        next(turn for turn in flood + other if turn in queue.running).end(10)
        ended += 1
    assert ended <= 12  # one of A's for each of B's, and those that ran before


@run_in_loop
async def test_tenants_share_by_tokens_and_not_by_requests():
    queue = Admission(Limits(kv_tokens=100, running=1, waiting=500))
    long = [queue.enter(A, None, [90])[0] for _ in range(50)]
    short = [queue.enter(B, None, [10])[0] for _ in range(200)]
    for _ in range(100):
        (turn,) = queue.running
        turn.end(turn.tokens)
    done = sum(begun(long)) * 90, sum(begun(short)) * 10
    assert abs(done[0] - done[1]) <= 180


@run_in_loop
async def test_what_was_reserved_and_not_used_is_given_back():
    queue = Admission(Limits(kv_tokens=1000, running=1, waiting=50))
    for _ in range(10):  # asks for much, takes little
        queue.enter(A, None, [900])
    for _ in range(10):
        queue.enter(B, None, [10])
    order = []
    for _ in range(20):
        (turn,) = queue.running
        order.append(turn.tenant.name)
        turn.end(10)
    assert 4 <= order[:10].count("a") <= 6


@run_in_loop
async def test_idling_saves_nothing_up():
    queue = Admission(Limits(kv_tokens=1000, running=1, waiting=50))
    for _ in range(20):
        queue.enter(A, None, [10])
    for _ in range(15):
        next(iter(queue.running)).end(10)
    late = [queue.enter(B, None, [10])[0] for _ in range(10)]
    for _ in range(4):
        next(iter(queue.running)).end(10)
    assert sum(begun(late)) <= 3


@run_in_loop
async def test_a_large_one_is_not_passed_for_ever():
    queue = Admission(Limits(kv_tokens=100, waiting=500))
    first = queue.enter(A, None, [50])[0]
    large = queue.enter(A, None, [100])[0]
    smalls = [queue.enter(A, None, [50])[0] for _ in range(200)]
    passed = 0
    while not begun([large])[0]:
        turn = next(turn for turn in [first, *smalls] if turn in queue.running)
        turn.end(50)
        passed += 1
    assert passed <= admission._PASSES + 2


@run_in_loop
async def test_adapters_of_a_step_stay_below_their_bytes_and_one_may_be_larger():
    sizes = {"x": 60, "y": 60, "z": 30, "huge": 500}
    queue = Admission(Limits(kv_tokens=1000, adapter_bytes=100), nbytes=sizes.__getitem__)
    x, y, again, z, base = (queue.enter(A, name, [1])[0] for name in ("x", "y", "x", "z", None))
    assert begun([x, y, again, z, base]) == [True, False, True, True, True]
    for turn in (x, again):
        turn.end()
    assert begun([y]) == [True]
    huge = queue.enter(A, "huge", [1])[0]
    assert not begun([huge])[0]
    for turn in (y, z):
        turn.end()
    assert begun([huge]) == [True]


@run_in_loop
async def test_adapters_of_those_who_wait_are_loaded_ahead():
    wanted = []
    queue = Admission(Limits(kv_tokens=10), prefetch=wanted.append)
    queue.enter(A, "x", [10])
    for name in "yyzvwuts":
        queue.enter(A, name, [10])
    assert set(wanted) == set("yzvw")


@run_in_loop
async def test_a_tenant_keeps_to_its_own_number_at_once():
    capped = Tenant("c", concurrency=2)
    queue = Admission(Limits(kv_tokens=1000))
    turns = [queue.enter(capped, None, [1])[0] for _ in range(4)]
    assert begun(turns) == [True, True, False, False]
    assert begun(queue.enter(A, None, [1])) == [True]
    turns[0].end()
    assert begun(turns) == [True, True, True, False]


@run_in_loop
async def test_a_rate_is_a_minute_s_worth_at_once_and_then_one_by_one():
    limited = Tenant("r", rate=30)
    queue = Admission(Limits(kv_tokens=1000, running=100))
    for _ in range(30):
        queue.enter(limited, None, [1])
    with pytest.raises(Overloaded, match="30 requests a minute") as refused:
        queue.enter(limited, None, [1])
    assert 1 <= refused.value.retry_after <= 2
    queue.enter(A, None, [1])


@run_in_loop
async def test_a_full_queue_refuses_and_says_when_to_come_again():
    queue = Admission(Limits(kv_tokens=10, waiting=2))
    queue.enter(A, None, [10])
    queue.enter(A, None, [10, 10])
    with pytest.raises(Overloaded) as refused:
        queue.enter(A, None, [10])
    assert refused.value.retry_after >= 1
    assert len(queue.waiting) == 2


@run_in_loop
async def test_in_a_full_queue_the_longest_gives_way_to_another_tenant():
    queue = Admission(Limits(kv_tokens=10, waiting=4))
    queue.enter(A, None, [10])
    flood = [queue.enter(A, None, [10])[0] for _ in range(4)]
    one, two = queue.enter(B, None, [10, 10])
    with pytest.raises(Overloaded, match="most of the queue"):
        await flood[-1].begun()
    with pytest.raises(Overloaded):
        await flood[-2].begun()
    assert [turn.tenant for turn in queue.waiting] == [A, A, B, B]
    with pytest.raises(Overloaded):
        queue.enter(B, None, [10])  # it would hold the most itself
    assert not begun([one, two])[0]


@run_in_loop
async def test_a_turn_may_be_ended_at_any_time_and_twice():
    queue = Admission(Limits(kv_tokens=10))
    running, waiting, last = queue.enter(A, None, [10, 10, 10])
    waiting.end()
    running.end()
    running.end()
    assert begun([last]) == [True]
    assert len(queue.running) == 1 and not queue.waiting


@run_in_loop
async def test_whatever_happens_memory_is_kept_and_all_are_served():
    random_ = random.Random(0)
    sizes = {name: random_.randint(1, 60) for name in "uvwxyz"}
    queue = Admission(Limits(kv_tokens=100, running=5, waiting=50, adapter_bytes=80), nbytes=sizes.__getitem__)
    tenants = [Tenant("p", concurrency=2), A, B]
    turns = []
    for _ in range(2000):
        if random_.random() < 0.5:
            try:
                name = random_.choice([None, *sizes])
                turns += queue.enter(random_.choice(tenants), name, [random_.randint(1, 100)])
            except Overloaded:
                assert len(queue.waiting) >= 25
        elif queue.running:
            random_.choice(list(queue.running)).end(random_.randint(0, 10))
        assert sum(turn.tokens for turn in queue.running) <= 100
        assert len(queue.running) <= 5 and len(queue.waiting) <= 50
        there = {turn.adapter for turn in queue.running if turn.adapter}
        assert len(there) == 1 or sum(sizes[name] for name in there) <= 80
    while queue.running:
        next(iter(queue.running)).end()
    assert not queue.waiting
    for turn in turns:
        if turn._ready.done():
            turn._ready.exception()


@run_in_loop
async def test_a_turn_that_was_called_off_is_passed_over_and_nobody_s_turns_are_lost():
    queue = Admission(Limits(kv_tokens=100))
    (first,) = queue.enter(B, None, [100])
    waiting = queue.enter(A, None, [50, 50])
    for turn in waiting:
        turn._ready.cancel()  # its task has not run yet
    first.end(100)
    (last,) = queue.enter(B, None, [90])
    assert begun([last]) == [True]
    for turn in (*waiting, last):
        turn.end(0)
    assert not queue.running and not queue.waiting
