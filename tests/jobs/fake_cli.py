"""The command line with the fake pipeline in the place of the model.

Tests start it as a process of its own where they kill, signal or look at what a process
imports or prints: `python tests/jobs/fake_cli.py run MANIFEST …`.
"""

from jobs import run
from jobs.cli import main

run.run.__kwdefaults__["pipeline"] = "fake_pipeline:FakePipeline"

if __name__ == "__main__":
    main()
