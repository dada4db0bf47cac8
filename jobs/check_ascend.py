"""Checks of Ascend cards: devices asked for and present, who is on them, CANN, driver.

None of it was seen on a card: the forms of files and tools are those of their
documentation and of users' reports.
"""

from __future__ import annotations

from jobs.devices import VARIABLE
from jobs.machine import Machine
from jobs.npu_smi import Process
from jobs.verdict import Asked, Verdict, failure, ok, warning

SET_ENV = "`source /usr/local/Ascend/ascend-toolkit/set_env.sh`"
# MindSpore 2.8.0's own list (mindspore/run_check/_check_version.py).
CANN_VERSIONS = ("8.2", "8.3", "8.5")
BUSY_MB = 8_192  # an idle 910B shows 3 to 4 GB in use
SLOW_SETTINGS = {
    "ASCEND_LAUNCH_BLOCKING": ("1",),
    "ASCEND_GLOBAL_LOG_LEVEL": ("0", "1"),
    "ASCEND_SLOG_PRINT_TO_STDOUT": ("1",),
    "MS_DEV_SAVE_GRAPHS": ("1", "2", "3"),
}


def devices(machine: Machine, asked: Asked) -> Verdict:
    """Tell which devices a run would take, and of how many."""
    if not machine.nodes:
        return failure(
            "devices",
            "no /dev/davinci*: the driver is not loaded, or the container has none",
            "`npu-smi info` on the host; `docker run --device /dev/davinci0 …`",
        )
    within = machine.environ.get(VARIABLE)
    bound = f", within {VARIABLE}={within}" if within else ""
    ids = ", ".join(map(str, asked.devices))
    return ok("devices", f"{ids} of {len(machine.nodes)} present{bound}")


def nodes(machine: Machine, asked: Asked) -> Verdict:
    """Tell whether the driver's files may be opened."""
    if machine.unusable_nodes:
        return failure(
            "device files",
            f"missing or not yours to open: {', '.join(machine.unusable_nodes)}",
            "join the group HwHiAiUser; in a container, `--device` each of them",
        )
    return ok("device files", "all can be opened")


def smi(machine: Machine, asked: Asked) -> Verdict:
    """Judge the health of the devices asked for, as the driver's tool tells it."""
    if machine.smi is None:
        return warning(
            "npu-smi",
            machine.smi_trouble,
            "mount /usr/local/bin/npu-smi and /usr/local/dcmi, or ask the host",
        )
    sick = [
        f"device {device} ({chip.name}) is {chip.health}"
        for device in asked.devices
        if (chip := machine.smi.of(device)) and chip.health != "OK"
    ]
    if sick:
        return failure(
            "npu-smi",
            ", ".join(sick),
            "`npu-smi info -t health -i N` says why; leave it out with `--devices`",
        )
    names = sorted({chip.name for chip in machine.smi.chips})
    return ok("npu-smi", f"{len(machine.smi.chips)} healthy: {', '.join(names)}")


def device_memory(machine: Machine, asked: Asked) -> Verdict:
    """Tell who else is on the devices asked for, and whether the weights still fit."""
    what, least = "device memory", None
    remedy = "end what is on it, or leave the device out with `--devices`"
    for device in asked.devices:
        chip = machine.smi.of(device) if machine.smi else None
        if machine.smi is None or chip is None or not chip.total_mb:
            continue
        free = chip.total_mb - chip.used_mb
        least = free if least is None else min(least, free)
        others = machine.smi.on(chip)
        found = f"device {device}: {free} of {chip.total_mb} MB free; {_who(others)}"
        if asked.weights and free * 2**20 < asked.weights:
            need = asked.weights // 2**20
            return failure(what, f"{found}; the weights take {need} MB", remedy)
        if others or chip.used_mb > BUSY_MB:
            return warning(what, found, remedy)
    return ok(what, "not told" if least is None else f"at least {least} MB free")


def _who(processes: list[Process]) -> str:
    """Name the processes on a device."""
    names = [f"process {p.pid} {p.name}".strip() for p in processes]
    return ", ".join(names) or "no process is told"


def cann(machine: Machine, asked: Asked) -> Verdict:
    """Judge CANN's version, and whether its environment is set."""
    if not machine.environ.get("ASCEND_HOME_PATH"):
        return failure("CANN", "its environment is not set (ASCEND_HOME_PATH)", SET_ENV)
    if machine.cann is None:
        return failure(
            "CANN",
            f"no version file in {machine.environ['ASCEND_HOME_PATH']}",
            f"install the toolkit and the kernels of your card, then {SET_ENV}",
        )
    if ".".join(machine.cann.split(".")[:2]) not in CANN_VERSIONS:
        return warning(
            "CANN",
            f"{machine.cann}; MindSpore 2.8.0 names {', '.join(CANN_VERSIONS)}",
            "install one of those, toolkit and kernels",
        )
    return ok("CANN", machine.cann)


def libraries(machine: Machine, asked: Asked) -> Verdict:
    """Tell whether the paths that CANN's set_env.sh sets are set."""
    wanted = {
        "LD_LIBRARY_PATH": "/lib64",
        "ASCEND_OPP_PATH": "/opp",
        "PYTHONPATH": "/python/site-packages",
    }
    unset = [n for n, part in wanted.items() if part not in machine.environ.get(n, "")]
    if unset:
        return warning(
            "CANN's paths", f"CANN is not in {', '.join(unset)}", f"{SET_ENV}"
        )
    return ok("CANN's paths", "set")


def driver(machine: Machine, asked: Asked) -> Verdict:
    version = machine.driver or (machine.smi.driver if machine.smi else "")
    if not version:
        return warning(
            "driver",
            "no version in /usr/local/Ascend/driver/version.info, nor from npu-smi",
            "in a container, mount that file and …/driver/lib64",
        )
    return ok("driver", version)


def slow_settings(machine: Machine, asked: Asked) -> Verdict:
    """Notice debug settings left behind, which make every launch slow."""
    found = [n for n, bad in SLOW_SETTINGS.items() if machine.environ.get(n) in bad]
    if found:
        return warning(
            "debug settings",
            f"set for debugging, and slow: {', '.join(found)}",
            f"`unset {' '.join(found)}`",
        )
    return ok("debug settings", "none")


CHECKS = (
    devices,
    nodes,
    smi,
    device_memory,
    cann,
    libraries,
    driver,
    slow_settings,
)
