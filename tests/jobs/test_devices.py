"""Which cards a job gets, with fake device nodes and environments: no card needed."""

from types import SimpleNamespace

import pytest
from jobs_shared import FAKE, order, rows_of, write_csv

from jobs import devices, process
from jobs.config import load
from jobs.devices import VARIABLE, choose_devices, find_devices, parse_devices
from jobs.errors import ConfigError
from jobs.resolved import resolve
from jobs.run import run


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Give a function that makes a machine: its davinci nodes and its environment."""

    def make(cards, visible=None):
        nodes = tmp_path / "dev"
        nodes.mkdir()
        for name in [*cards, "_manager", "x0"]:  # neither of the last is a card
            (nodes / f"davinci{name}").touch()
        monkeypatch.setattr(devices, "NODES", nodes)
        monkeypatch.delenv(VARIABLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(VARIABLE, visible)

    return make


def resolved(*overrides):
    return resolve(load(None, overrides), native_size=128)


def ids(asked="auto"):
    return choose_devices(asked, find_devices())


def test_every_card_of_the_machine_is_used_unless_some_are_asked_for(machine):
    machine(range(8))

    assert ids() == tuple(range(8))
    assert ids("0-7") == tuple(range(8))
    assert ids("6,2-3") == (6, 2, 3)


def test_cards_of_a_container_count_from_0_whatever_the_host_calls_them(machine):
    machine([4, 5, 6, 7])

    assert ids() == ids("0-3") == (0, 1, 2, 3)


def test_what_a_scheduler_chose_is_all_there_is_and_is_counted_from_0(machine):
    machine(range(8), visible="4,5,6,7")

    assert ids() == ids("0-3") == (4, 5, 6, 7)
    assert ids("2,0") == (6, 4)


@pytest.mark.parametrize(
    ("visible", "asked", "said"),
    [
        (None, "7-9", "devices: 8, 9 not there: only 0-7 are"),
        ("4,5", "4-5", "devices: 4, 5 not there: .* is `4,5`, so 0-1 are"),
        ("6", "1", "so 0 is"),
        ("4,5", "0,0", "names a device twice"),
        ("4,4", "auto", "names a device twice or one that is not there"),
        ("6,7,8", "auto", "names a device twice or one that is not there"),
        ("1, 2", "auto", "is `1, 2`, of which CANN reads only a part"),
        ("0-3", "auto", "is `0-3`, of which CANN reads only a part"),
    ],
)
def test_a_card_that_is_not_there_or_named_twice_is_one_line(
    visible, asked, said, machine
):
    machine(range(8), visible)
    with pytest.raises(ConfigError, match=said) as caught:
        ids(asked)

    assert "\n" not in f"{caught.value} {caught.value.hint}"


def test_a_machine_with_a_card_runs_on_it_in_half_precision(machine):
    machine([0], visible="")  # empty is as good as not set
    found = resolved()

    assert (found.device_target, found.devices) == ("Ascend", (0,))
    assert found.precision == "fp16"
    assert resolved("runtime.workers=2").device_target == "CPU"
    assert resolved("runtime.device_target=CPU").devices == (0,)


def test_a_machine_without_a_card_runs_on_the_cpu_whatever_is_set(machine):
    machine([], visible="0,1")

    assert resolved().device_target == "CPU"
    with pytest.raises(ConfigError, match="no Ascend device"):
        resolved("runtime.device_target=Ascend")


def test_a_job_for_the_cpu_does_not_ask_what_the_environment_lists(machine):
    machine([0], visible="nonsense")

    assert resolved("runtime.workers=1").device_target == "CPU"
    assert resolved("runtime.device_target=CPU").device_target == "CPU"
    with pytest.raises(ConfigError, match="CANN reads only a part"):
        resolved()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["runtime.devices=0-1"], "but this runs on the CPU"),
        (["runtime.device_target=Ascend", "runtime.workers=2"], "for the CPU"),
    ],
)
def test_cards_and_cpu_workers_exclude_each_other(overrides, said, machine):
    machine([])
    with pytest.raises(ConfigError, match=said):
        resolved(*overrides)


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-7", tuple(range(8))), ("3", (3,)), (" 0, 2-3", (0, 2, 3))]
)
def test_device_lists_read_as_numbers_and_ranges(text, numbers):
    assert parse_devices(text) == numbers


@pytest.mark.parametrize("text", ["", "0-", "a", "0,0", "1-3,2", "7-0", "-1", "99999"])
def test_device_lists_that_mean_nothing_are_refused(text):
    with pytest.raises(ConfigError):
        parse_devices(text)


def test_each_worker_sees_the_one_card_that_its_rows_name(
    machine, tmp_path, checkpoint
):
    """Three workers on the cards 5, 6 and 7 of a scheduler's four."""
    machine(range(8), visible="4,5,6,7")
    seen = {f"r{i}": tmp_path / f"seen{i}" for i in range(6)}
    rows = [(name, f"tell-device={path} sleep=0.3") for name, path in seen.items()]
    asked = order(
        write_csv(tmp_path / "m.csv", rows),
        tmp_path / "out",
        checkpoint,
        "runtime.device_target=Ascend",
        "runtime.devices=1-3",
        "runtime.shard_batches=1",
        workers="null",
    )
    run(asked, pipeline=FAKE)
    made = {row["prompt_id"]: row for row in rows_of(tmp_path / "out")}

    assert {row["status"] for row in made.values()} == {"ok"}
    assert {row["device_id"] for row in made.values()} <= {5, 6, 7}
    for name, path in seen.items():
        assert path.read_text() == str(made[name]["device_id"])


@pytest.mark.parametrize("visible", [0, 2, 8])
def test_a_worker_that_sees_other_than_one_card_does_not_start(visible):
    mindspore = SimpleNamespace(hal=SimpleNamespace(device_count=lambda _: visible))
    with pytest.raises(RuntimeError, match=f"{visible} devices are visible"):
        process._check_binding(mindspore)
