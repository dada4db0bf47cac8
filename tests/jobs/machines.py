"""Machines that there are not: facts for the checks, and folders to look at."""

from dataclasses import replace

from jobs import npu_smi
from jobs.machine import MANAGERS, Folder, Machine, Places

GB = 10**9

# The form that drivers 23 to 25 print, with numbers of our own.
TWO_CARDS = """\
+----------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                 |
+---------------------------+---------------+--------------------------------------+
| NPU   Name                | Health        | Power(W)  Temp(C)  Hugepages-Usage   |
| Chip                      | Bus-Id        | AICore(%) Memory-Usage(MB) HBM-Usage |
+===========================+===============+======================================+
| 4     910B3               | OK            | 97.9      34       0    / 0          |
| 0                         | 0000:C1:00.0  | 0         0    / 0      3408 / 65536 |
+===========================+===============+======================================+
| 5     910B3               | Warning       | 89.5      32       0    / 0          |
| 0                         | 0000:C2:00.0  | 0         0    / 0      41052/ 65536 |
+===========================+===============+======================================+
+---------------------------+---------------+--------------------------------------+
| NPU     Chip              | Process id    | Process name    | Process memory(MB) |
+===========================+===============+======================================+
| No running processes found in NPU 4                                              |
+===========================+===============+======================================+
| 5       0                 | 1333928       | python          | 37709              |
+===========================+===============+======================================+
"""

HEALTHY = Machine(
    python=(3, 11, 7),
    system="Linux",
    arch="aarch64",
    glibc=(2, 35),
    packages={
        "mindspore": "2.8.0",
        "numpy": "1.26.4",
        "pandas": "2.3.3",
        "pyarrow": "25.0.1",
        "pillow": "12.3.0",
    },
    environ={
        "ASCEND_HOME_PATH": "/usr/local/Ascend/latest",
        "LD_LIBRARY_PATH": "/usr/local/Ascend/latest/lib64",
        "ASCEND_OPP_PATH": "/usr/local/Ascend/latest/opp",
        "PYTHONPATH": "/usr/local/Ascend/latest/python/site-packages",
    },
    nodes=("davinci0", "davinci1"),
    unusable_nodes=(),
    smi=npu_smi.Table(
        driver="25.2.0",
        chips=tuple(
            npu_smi.Chip(
                npu=npu,
                chip=0,
                name="910B3",
                health="OK",
                used_mb=3400,
                total_mb=65536,
            )
            for npu in (0, 1)
        ),
        processes=(),
    ),
    smi_trouble="",
    driver="25.2.0",
    cann="8.3.RC2",
    cores=8,
    compiler="cc",
    open_files=4096,
    memory_total=64 * GB,
    memory_free=60 * GB,
    output=Folder(path="/data", free=900 * GB, kind="ext4", writable=True),
    cache=Folder(path="/data/cache", free=90 * GB, kind="ext4", writable=True),
    current=Folder(path="/data/jobs", free=900 * GB, kind="ext4", writable=True),
    temporary=Folder(path="/tmp", free=90 * GB, kind="ext4", writable=True),
)


def but(**changes):
    """The healthy machine, with these facts changed; dicts and folders in part."""
    for name, change in changes.items():
        before = getattr(HEALTHY, name)
        if isinstance(before, dict):
            changes[name] = {**before, **change}
        elif isinstance(before, Folder):
            changes[name] = replace(before, **change)
    return replace(HEALTHY, **changes)


def chip(**changes):
    """A healthy table whose first chip is changed."""
    first, second = HEALTHY.smi.chips
    return replace(HEALTHY.smi, chips=(replace(first, **changes), second))


def fake_places(tmp_path, *, cards=2, smi=TWO_CARDS, **environ):
    """Folders like a machine's with an npu-smi that prints `smi`."""
    for name in ("dev", "proc/self", "cgroup", "ascend/driver", "cann/compiler"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(cards):
        (tmp_path / "dev" / f"davinci{number + 4}").touch()
    for name in MANAGERS:
        (tmp_path / "dev" / name).touch()
    (tmp_path / "ascend/driver/version.info").write_text("Version=25.2.0\nother=1\n")
    (tmp_path / "cann/compiler/version.info").write_text("Version=8.3.0.1.200\n")
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:       64000000 kB\nMemFree:  1 kB\nMemAvailable:   60000000 kB\n"
    )
    (tmp_path / "proc/self/mounts").write_text(
        f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path}/shared nfs4 rw 0 0\n"
    )
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = info ] && cat <<'END'\n{smi}END\n")
    tool.chmod(0o755)
    return Places(
        environ={"ASCEND_HOME_PATH": str(tmp_path / "cann"), **environ},
        dev=tmp_path / "dev",
        proc=tmp_path / "proc",
        cgroup=tmp_path / "cgroup",
        ascend=tmp_path / "ascend",
        npu_smi=str(tool),
        current=tmp_path,
        temporary=tmp_path,
    )
