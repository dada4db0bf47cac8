"""A dead worker's lease is given back whole, and only who died alone is given up."""

from hypothesis import given
from hypothesis import strategies as st

from jobs.leases import give_back
from jobs.records import Task

PLAIN = {
    field: None
    for field in Task.__dataclass_fields__
    if field not in ("image_id", "attempts", "earlier", "extras")
}


def task(number, attempts=0, earlier=0):
    return Task(**PLAIN, image_id=f"{number:016x}", attempts=attempts, earlier=earlier)


tries = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12)


@given(given_tries=tries, most=st.integers(1, 4), size=st.integers(1, 4))
def test_nothing_is_lost_doubled_or_given_up_in_company(given_tries, most, size):
    pending = [task(i, attempts) for i, (attempts, _) in enumerate(given_tries)]
    begun = {t.image_id for t, (_, b) in zip(pending, given_tries, strict=True) if b}
    back = give_back(pending, begun, most=most, batch_size=size)
    handed = [t for batch in back.batches for t in batch.tasks]
    gone = [back.given_up] if back.given_up else []
    assert sorted(t.image_id for t in handed + gone) == [t.image_id for t in pending]
    assert all(len(batch.tasks) <= size for batch in back.batches)
    before = {t.image_id: t.attempts for t in pending}
    for found in handed + gone:
        assert found.attempts - before[found.image_id] == (found.image_id in begun)
    if gone:
        assert begun == {gone[0].image_id} and gone[0].attempts >= most


@given(most=st.integers(1, 5), size=st.integers(1, 8), others=st.integers(0, 20))
def test_a_killer_is_found_in_a_bounded_number_of_deaths(most, size, others):
    # Oracle: a worker that dies whenever the killer's batch comes up, and makes others.
    killer = f"{7:016x}"
    queue = list(
        give_back(
            [task(i) for i in range(others + 8)],
            {f"{i:016x}" for i in range(others + 8)},
            most=most,
            batch_size=size,
        ).batches
    )
    deaths, made = 1, 0
    given_up = None
    while queue:
        batch = queue.pop(0)
        names = {t.image_id for t in batch.tasks}
        if killer not in names:
            made += len(names)
            continue
        deaths += 1
        back = give_back(batch.tasks, names, most=most, batch_size=size)
        queue += back.batches
        given_up = back.given_up
    assert given_up is not None and given_up.image_id == killer
    assert made == others + 7
    assert deaths <= max(3, most)


def test_attempts_of_earlier_runs_do_not_count_against_a_task():
    back = give_back(
        [task(1, attempts=9, earlier=9)], {f"{1:016x}"}, most=3, batch_size=1
    )
    assert back.given_up is None and back.batches[0].tasks[0].attempts == 10
