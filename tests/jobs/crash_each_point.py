"""Kill a small job at every named point of the commit protocol, once each; resume it.

The jobs run in forked processes of this one, with the worker's code inline, so that all
points take seconds. Prints one line per point; ends with 1 when a row is lost, doubled
or different, or when a point was not reached.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import inline_pool
import pytest
from jobs_shared import FAKE, order, write_csv
from soak import read_rows

from jobs import crash, store
from jobs.run import run
from jobs.verify import verify

SETTINGS = ("runtime.batch_size=2", "output.commit_every=2")
KILLED = -9


def job(folder, output, point=None):
    """Run the job in a forked process; give how it ended."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if point:
                crash.arm(f"{point}:1:KILL")
            asked = order(folder / "m.csv", output, folder / "c.safetensors", *SETTINGS)
            with pytest.MonkeyPatch.context() as patch:
                inline_pool.install(patch)
                patch.setattr(store, "MERGE_AT", 2)
                code = int(run(asked, pipeline=FAKE).exit_code)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    from sdxl.config import PRESETS
    from sdxl.random_weights import write_random

    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random(folder / "c.safetensors", PRESETS["tiny"], "fp16")
        rows = [(f"r{i}", f"a picture {i}") for i in range(8)]
        rows[2] = ("r2", "make-nan")
        write_csv(folder / "m.csv", rows)
        assert job(folder, folder / "reference") == 4
        expected = read_rows(folder / "reference")
        for point in crash.POINTS:
            output = folder / "out"
            ended = job(folder, output, point)
            again = job(folder, output)
            same = again == 4 and read_rows(output) == expected
            sound = verify(output).sound
            good = ended == KILLED and same and sound
            bad += not good
            print(point, "ok" if good else f"BAD {ended=} {again=} {same=} {sound=}")
            shutil.rmtree(output)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
