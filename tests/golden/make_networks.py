"""Make the golden files of the networks and the pipeline.

    python tests/golden/make_networks.py

See README.networks.md for versions and for what is in the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))


def main() -> None:
    from tests.golden.networks_cases import GEOMETRIES
    from tests.golden.networks_oracle import consistency_outputs, outputs, short_outputs

    made = {name: outputs(name, config) for name, config in GEOMETRIES.items()}
    made["consistency"] = consistency_outputs()
    made["short"] = short_outputs()
    for name, arrays in made.items():
        path = HERE / f"networks_{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
