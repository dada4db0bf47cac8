"""A fake pipeline that the first process to ask for it can't load."""

import os

from fake_pipeline import FakePipeline


class LoadsOnce(FakePipeline):
    def __init__(self, **options):
        super().__init__(**options)
        try:
            os.close(os.open(os.environ["LOADS_ONCE"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        raise RuntimeError("this device is taken")
