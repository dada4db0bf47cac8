"""Make the golden pixels of every system.

    python tests/golden/make_pipelines.py [RUN …]

See README.pipelines.md for versions and for what is in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))


def main(names: list[str]) -> None:
    from tests.golden.pipelines_cases import RUNS
    from tests.golden.pipelines_oracle import pixels_of

    path = HERE / "pipelines_pixels.npz"
    made = dict(np.load(path)) if names and path.exists() else {}
    for name in names or RUNS:
        made[name] = pixels_of(name)
        print(f"{name}: mean {made[name].mean():.1f}, deviation {made[name].std():.1f}")
    np.savez_compressed(path, **{name: made[name] for name in RUNS if name in made})
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
