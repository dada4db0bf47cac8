"""Make the judge and the training script importable: neither is part of a package."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "checkpoints" / "tiny")]
