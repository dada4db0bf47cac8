"""Planning: stable names and seeds; every task in exactly one batch and one shard."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_shared import write_csv

from jobs import plan
from jobs.config import load
from jobs.manifest import open_manifest
from jobs.records import Rejected, Request, derived_seed, image_id, image_path
from jobs.resolved import resolve
from jobs.survey import survey
from sdxl.noise import MAX_SEED


def resolved(*overrides):
    return resolve(load(None, ["runtime.workers=1", *overrides]), native_size=128)


def request(row=0, **fields):
    fields = {"prompt_id": f"r{row}", "prompt": f"p{row}"} | fields
    return Request(source_row=row, location=f"line {row}", content=row, **fields)


def planned(path, job=None, limit=None):
    """Give (tasks, rejected rows) of a manifest, as a run would."""
    job = job or resolved()
    manifest = open_manifest(path)
    found = survey(manifest, job, limit)
    rows = list(plan.checked(manifest, job, found.repeated, limit))
    tasks = [
        task
        for row in rows
        if isinstance(row, Request)
        for task in plan.tasks_of(row, job)
    ]
    return tasks, [row for row in rows if isinstance(row, Rejected)]


def test_names_and_derived_seeds_are_what_they_have_always_been():
    # Golden, by `printf 'a\x1f0' | b2sum -l 64`. Were they to change, every stored job
    # would be made again with other pictures.
    assert image_id("a", 0) == "86928644bd00fcbe"
    assert image_id("日本", 7) == "3453870de5735b70"
    assert derived_seed(42, "a", 0) == 0x54F2FB5E
    assert image_path("86928644bd00fcbe", "png") == "images/86/86928644bd00fcbe.png"


def test_ids_that_join_alike_have_names_of_their_own():
    assert image_id("a1", 1) != image_id("a", 11)
    assert derived_seed(1, "1", 1) != derived_seed(11, "", 1)
    seeds = {derived_seed(42, f"r{i}", 0) for i in range(20_000)}
    assert len(seeds) > 19_900
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_the_order_of_rows_changes_no_task(tmp_path):
    names = ("id", "prompt", "num_images", "seed")
    rows = [(f"r{i}", f"p{i % 3}", i % 3 + 1, i if i % 2 else None) for i in range(20)]
    rows += [(None, f"q{i // 2}", 1, None) for i in range(6)]  # equal rows without id
    tasks, _ = planned(write_csv(tmp_path / "a.csv", rows, names))
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    again, _ = planned(write_csv(tmp_path / "b.csv", shuffled, names))

    def told(tasks):
        return {(t.image_id, t.prompt, t.image_index, t.seed) for t in tasks}

    assert told(again) == told(tasks)
    assert len(told(tasks)) == len(tasks) == sum(i % 3 + 1 for i in range(20)) + 6


def test_images_of_a_row_count_their_seeds_up_and_around():
    given_seed = request(seed=MAX_SEED - 1, num_images=4)
    tasks = list(plan.tasks_of(given_seed, resolved()))
    assert [task.seed for task in tasks] == [MAX_SEED - 1, MAX_SEED, 0, 1]
    assert {task.seed_source for task in tasks} == {"manifest"}
    tasks = list(plan.tasks_of(request(num_images=3), resolved()))
    assert [task.seed for task in tasks] == [
        derived_seed(42, "r0", i) for i in (0, 1, 2)
    ]
    assert [task.image_index for task in tasks] == [0, 1, 2]
    assert {task.seed_source for task in tasks} == {"derived"}


def test_a_row_wins_over_the_job_and_the_job_over_the_defaults():
    job = resolved("sampling.guidance_scale=3", "sampling.negative_prompt=ugly")
    task = plan.task_of(request(), job, 0)
    assert (task.guidance_scale, task.negative_prompt) == (3.0, "ugly")
    assert (task.width, task.target_width, task.original_height) == (128, 128, 128)
    assert (task.crop_top, task.crop_left) == (0, 0)
    task = plan.task_of(request(guidance_scale=0.0, negative_prompt="", seed=0), job, 0)
    assert (task.guidance_scale, task.negative_prompt, task.seed) == (0.0, "", 0)
    task = plan.task_of(request(width=192, original_width=64, crop_left=5), job, 0)
    assert (task.width, task.height, task.target_width) == (192, 128, 192)
    assert (task.original_width, task.original_height) == (64, 128)
    assert task.crop_left == 5


def test_options_that_a_method_does_not_take_are_null_or_refused(tmp_path):
    task = plan.task_of(request(), resolved("sampling.eta=0.5"), 0)
    assert task.eta is None
    names = ("id", "prompt", "eta", "sampler", "discretization", "sigma_min", "steps")
    rows = [
        ("a", "p", 0.5, None, None, None, None),
        ("b", "p", 0.5, "EulerAncestralSampler", None, None, None),
        ("c", "p", None, None, None, 0.1, None),
        ("d", "p", None, None, "EDMDiscretization", 900, None),
        ("e", "p", None, None, "LegacyDDPMDiscretization", None, 1000),
    ]
    tasks, rejected = planned(write_csv(tmp_path / "m.csv", rows, names))
    assert [row.reason for row in rejected] == [
        "eta: does not apply to EulerEDMSampler",
        "sigma_min: does not apply to LegacyDDPMDiscretization",
        "sigma_min: 900 is not below sigma_max, 14.6146",
    ]
    assert [task.eta for task in tasks] == [0.5, None]


def test_a_repeated_id_rejects_all_rows_but_the_first(tmp_path):
    rows = [("a", "one"), ("b", "two"), ("a", "three"), ("a", "one")]
    tasks, rejected = planned(write_csv(tmp_path / "m.csv", rows))
    assert [task.prompt for task in tasks] == ["one", "two"]
    assert [row.location for row in rejected] == ["m.csv line 4", "m.csv line 5"]
    assert rejected[0].reason == "id: `a` stands already at m.csv line 2"


def test_equal_rows_without_an_id_are_pictures_of_their_own(tmp_path):
    rows = [(None, "one"), (None, "two"), (None, "one"), (None, "one")]
    tasks, rejected = planned(write_csv(tmp_path / "m.csv", rows))
    assert not rejected
    assert len({task.image_id for task in tasks}) == 4
    assert len({task.seed for task in tasks}) == 4
    assert tasks[2].prompt_id == f"{tasks[0].prompt_id}-2"


def test_the_survey_counts_what_the_tasks_are(tmp_path):
    # Oracle: the tasks themselves, counted one by one.
    names = ("id", "prompt", "num_images", "width", "steps")
    rows = [
        (f"r{i}", "p", i % 4 or None, 64 * (1 + i % 2), 2 + i % 3) for i in range(30)
    ]
    rows += [("bad", None, 1, 64, 2), ("r1", "again", 1, 64, 2), ("w", "p", 1, 65, 2)]
    path = write_csv(tmp_path / "m.csv", rows, names)
    job = resolved()
    found = survey(open_manifest(path), job)
    tasks, rejected = planned(path, job)
    assert (found.rows, found.requests, found.invalid) == (33, 30, 3)
    assert found.tasks == found.pending == len(tasks)
    assert found.invalid == len(rejected) == len(found.rejections)
    assert sum(found.graphs.values()) == len(tasks)
    for (width, height, guider), count in found.graphs.items():
        same = [
            t for t in tasks if (t.width, t.height, t.guider) == (width, height, guider)
        ]
        assert len(same) == count
    for (width, height, steps), count in found.image_steps.items():
        same = [
            t for t in tasks if (t.width, t.height, t.steps) == (width, height, steps)
        ]
        assert len(same) == count
    few = survey(open_manifest(path), job, limit=7)
    assert (few.rows, few.tasks) == (7, len(planned(path, job, limit=7)[0]))


settings_of_rows = st.tuples(
    st.sampled_from([64, 128]),
    st.sampled_from([2, 3]),
    st.sampled_from([None, "HeunEDMSampler"]),
    st.sampled_from([None, 1.5]),
    st.integers(1, 3),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(settings_of_rows, max_size=30),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_every_task_is_in_one_batch_of_one_shard(rows, batch_size, size):
    job = resolved()
    tasks = [
        task
        for i, (width, steps, sampler, scale, images) in enumerate(rows)
        for task in plan.tasks_of(
            request(
                i,
                width=width,
                steps=steps,
                sampler=sampler,
                guidance_scale=scale,
                num_images=images,
            ),
            job,
        )
    ]
    batches = list(plan.batches(tasks, batch_size))
    shards = list(plan.shards(batches, size))
    covered = [task.image_id for shard in shards for task in shard.tasks]
    assert sorted(covered) == sorted(task.image_id for task in tasks)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    for shard in shards:
        assert 1 <= len(shard.batches) <= size
        assert len({task.graph for task in shard.tasks}) == 1
    for batch in batches:
        assert 1 <= len(batch.tasks) <= batch_size
        assert len({task.schedule for task in batch.tasks}) == 1
    # No more short batches than there are schedules: padding is never wasted.
    short = [batch for batch in batches if len(batch.tasks) < batch_size]
    assert len(short) <= len({task.schedule for task in tasks})


def test_guidance_scales_and_seeds_share_a_batch_and_steps_do_not():
    job = resolved()
    tasks = [plan.task_of(request(i, guidance_scale=i, seed=i), job, 0) for i in (1, 2)]
    assert len(list(plan.batches(tasks, 4))) == 1
    tasks = [plan.task_of(request(i, steps=i), job, 0) for i in (1, 2)]
    assert len(list(plan.batches(tasks, 4))) == 2


def test_planning_is_lazy_and_holds_a_bounded_number_of_tasks(monkeypatch):
    monkeypatch.setattr(plan, "OPEN_TASKS", 50)
    job = resolved()
    drawn = 0

    def endless():
        nonlocal drawn
        for i in itertools.count():
            drawn += 1
            yield plan.task_of(request(i, steps=1 + i % 997), job, 0)

    for _ in itertools.islice(plan.batches(endless(), 4), 100):
        pass
    assert drawn <= 150


@pytest.mark.parametrize(
    ("tasks", "batch_size", "workers", "asked", "size"),
    [(10_000, 4, 2, None, 8), (20, 4, 2, None, 1), (3, 4, 2, None, 1), (9, 1, 1, 5, 5)],
)
def test_leases_are_small_enough_for_all_workers_to_end_together(
    tasks, batch_size, workers, asked, size
):
    assert plan.shard_size(tasks, batch_size, workers, asked) == size
