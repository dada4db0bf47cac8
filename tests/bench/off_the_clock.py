"""What a worker does between two calls of its device, and which processors it takes.

    python tests/bench/off_the_clock.py --report docs/runner.md

The device is a sleep of as long as the reference's card takes for a picture; all else
is as in a job: 1024x1024 pictures encoded as PNG, hashed, written, synced and renamed,
rows committed, leases, eight workers, compaction. So what is measured is the runner,
not MindSpore. The pictures are noise of a photograph's spectrum.
"""

import argparse
import io
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 1024
DEVICE_SECONDS = 6.78  # a picture of SDXL-Base on the reference's card, 40 steps
LCM_SECONDS = DEVICE_SECONDS * 4 / 40 / 2  # four steps without a second half
LEVELS = (0, 1, 2, 3, 4, 6, 9)
START, END = "<!-- off the clock -->", "<!-- /off the clock -->"


class SleepingDevice:
    """A pipeline whose device sleeps; it notes when, and what its process has used."""

    def __init__(self, **options):
        self.seconds = float(os.environ["DEVICE_SECONDS"])
        self.notes = Path(os.environ["DEVICE_NOTES"]) / f"{os.getpid()}.jsonl"
        self.compiles, self.compile_ms = {}, {}
        self._picture = photograph(os.getpid())
        self._asked = 0

    def encode(self, pictures, batch_size):
        return None

    def sample(self, cond, pictures, batch_size):
        began, used = time.time(), time.process_time()
        time.sleep(self.seconds * len(pictures))
        with self.notes.open("a") as file:
            note = {"began": began, "ended": time.time(), "used": used}
            print(json.dumps(note | {"images": len(pictures)}), file=file)
        return np.zeros((len(pictures), 4, SIZE // 8, SIZE // 8), np.float32)

    def decode(self, latents, batch_size):
        self._asked += 1
        return np.stack([np.roll(self._picture, 31 * self._asked, axis=1)])


def photograph(seed, size=SIZE):
    """Make (size, size, 3) uint8: 1/f noise, its channels alike, a little grain."""
    random = np.random.RandomState(seed % 2**32)
    steps = np.fft.fftfreq(size)
    distance = np.hypot(steps[:, None], steps[None, :])
    distance[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(random.randn(size, size)) / distance**1.3
        plane = np.fft.ifft2(spectrum).real
        planes.append((plane - plane.mean()) / plane.std())
    pixels = np.stack([planes[0] + 0.15 * plane for plane in planes], axis=-1)
    grain = 0.7 * random.randn(size, size, 3)
    return (128 + 45 * pixels + grain).clip(0, 255).astype(np.uint8)


def png_levels(pictures):
    """Encode pictures at each level: processor ms of 1024x1024, bytes per pixel."""
    pixels = sum(picture.shape[0] * picture.shape[1] for picture in pictures)
    found = {}
    for level in LEVELS:
        seconds, size = 0.0, 0
        for picture in pictures:
            took = []
            for _ in range(3):
                file = io.BytesIO()
                before = time.thread_time()
                Image.fromarray(picture).save(file, "PNG", compress_level=level)
                took.append(time.thread_time() - before)
            seconds, size = seconds + min(took), size + file.tell()
        found[level] = (seconds * 1e3 / pixels * SIZE**2, size / pixels)
    return found


def run_job(folder, images, workers, seconds):
    """Run a job on sleeping devices; give wall, device and processor time."""
    from jobs.config import load
    from jobs.order import Order
    from jobs.run import run
    from sdxl.config import PRESETS
    from sdxl.random_weights import write_random

    notes = folder / "notes"
    notes.mkdir()
    os.environ["DEVICE_NOTES"], os.environ["DEVICE_SECONDS"] = str(notes), str(seconds)
    write_random(folder / "c.safetensors", PRESETS["tiny"], "fp16")
    rows = "".join(f"{i},a picture of number {i}\n" for i in range(images))
    (folder / "m.csv").write_text("id,prompt\n" + rows)
    settings = [f"model.checkpoint={folder / 'c.safetensors'}"]
    settings += [f"runtime.workers={workers}", f"sampling.width={SIZE}"]
    config = load(None, [*settings, f"sampling.height={SIZE}"])
    order = Order(config=config, manifest=folder / "m.csv", output=folder / "out")
    summary = run(order, pipeline=f"{Path(__file__).stem}:SleepingDevice")
    ended = time.time()
    assert summary.counts["ok"] == images, summary
    return summed_up([path.read_text() for path in notes.iterdir()], seconds, ended)


def summed_up(notes, seconds, ended):
    """Put the workers' notes together: per image, in seconds."""
    calls = [[json.loads(line) for line in text.splitlines()] for text in notes]
    many = [worker for worker in calls if len(worker) > 1]
    gaps = [
        later["began"] - earlier["ended"]
        for worker in many
        for earlier, later in itertools.pairwise(worker)
    ]
    used = sum(worker[-1]["used"] - worker[0]["used"] for worker in many)
    asleep = [c["ended"] - c["began"] for worker in calls for c in worker]
    began = min(worker[0]["began"] for worker in calls)
    last = max(worker[-1]["ended"] for worker in calls)
    print("gaps in s:", *(f"{gap:.3f}" for gap in gaps), file=sys.stderr)
    return {
        "between": sum(gaps) / len(gaps),
        "worst": max(gaps),
        "processor": used / len(gaps),
        "overslept": sum(asleep) / len(asleep) - seconds,
        "added": sum(gaps) / len(gaps) / seconds,
        "wall": last - began,
        "ideal": max(len(worker) for worker in calls) * seconds,
        "end": ended - last,
    }


def report(found, levels, drawn, images, workers, seconds):
    """Give the report's lines."""
    cores = workers * found["processor"] / DEVICE_SECONDS
    lcm = workers * found["processor"] / LCM_SECONDS
    lines = [
        f"{images} pictures of {SIZE}x{SIZE} on {workers} workers, {os.cpu_count()} "
        f"cores, a device that sleeps {seconds:g} s for each.",
        "",
        "| what | measured |",
        "|---|---|",
        f"| between two calls of a device, per image | {found['between'] * 1e3:.0f} ms "
        f"(largest {found['worst'] * 1e3:.0f} ms) |",
        f"| that is, added to the time of the device | {found['added']:.2%} |",
        f"| from the first call to the end of the last | {found['wall']:.2f} s, "
        f"{found['wall'] / found['ideal'] - 1:.2%} over the devices' own time |",
        "| from the last call to the end of the command | "
        f"{found['end']:.2f} s: files, rows, results.parquet, the workers' end |",
        f"| processor time of a worker per image | {found['processor'] * 1e3:.0f} ms |",
        f"| cores for {workers} cards at {DEVICE_SECONDS} s an image | {cores:.2f}, "
        "and what MindSpore's own threads take |",
        f"| the same at {LCM_SECONDS:.2f} s an image (4 steps, unguided) | {lcm:.1f} |",
        "",
        "| PNG level | photograph-like, ms | bytes per pixel | drawings, ms | "
        "bytes per pixel |",
        "|---|---|---|---|---|",
    ]
    for level, (ms, size) in levels.items():
        flat = [f"{drawn[level][0]:.0f}", f"{drawn[level][1]:.3f}"] if drawn else "--"
        lines.append(f"| {level} | {ms:.0f} | {size:.2f} | {flat[0]} | {flat[1]} |")
    return lines


def drawings(folder):
    """Load pictures of the small model from a job's folder, if there is one."""
    paths = sorted(folder.rglob("*.png"))[:16] if folder else []
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def put_into(path, lines):
    """Replace the part of a file between the two marks."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    path.write_text(before + "\n".join([START, *lines, END]) + after, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=DEVICE_SECONDS)
    parser.add_argument("--most", type=float, default=0.02, help="added, at most")
    parser.add_argument("--drawings", type=Path, help="a job's folder, for PNG sizes")
    parser.add_argument("--report", type=Path)
    asked = parser.parse_args()
    photographs = [photograph(seed) for seed in (1, 2)]
    levels, flat = png_levels(photographs), drawings(asked.drawings)
    with tempfile.TemporaryDirectory() as name:
        found = run_job(Path(name), asked.images, asked.workers, asked.seconds)
    drawn = png_levels(flat) if flat else None
    lines = report(found, levels, drawn, asked.images, asked.workers, asked.seconds)
    print("\n".join(lines))
    if asked.report:
        put_into(asked.report, lines)
    if found["added"] > asked.most:
        sys.exit(f"more than {asked.most:.0%} is added to the devices' time")


if __name__ == "__main__":
    main()
