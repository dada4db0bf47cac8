"""Every system of the reference from manifest rows, with real, very small networks."""

from dataclasses import replace

import numpy as np
import pytest
from jobs_shared import ROOT, pixels_of, rows_of, write_csv
from PIL import Image

from jobs import plan
from jobs.config import load
from jobs.images import pixel_sha256
from jobs.manifest import open_manifest
from jobs.order import Order
from jobs.resolved import resolve
from jobs.run import run
from jobs.stages import load_pipeline, make, pipeline_name, pipeline_options
from jobs.status import read_status
from sdxl.config import PRESETS, TINY, TINY_REFINER
from sdxl.convert import convert
from sdxl.layouts import tensor_specs
from sdxl.random_weights import random_tensor
from sdxl.safetensors_file import SafetensorsWriter
from sdxl.samplers import SAMPLERS

BATCH = 2
ANCESTRAL = "EulerAncestralSampler"
COLUMNS = (
    *("id", "prompt", "sampler", "discretization", "width", "height", "init_image"),
    *("strength", "seed", "guidance_scale", "steps", "eta", "s_churn"),
)


def _micro(config):
    unet = replace(
        config.unet, channel_mult=(1, 2), transformer_depth=(0, 1), middle_depth=1
    )
    vae = replace(config.vae, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    return replace(config, unet=unet, vae=vae)


MICRO = {
    "base": _micro(TINY),
    "tiny-base": TINY,
    "tiny-refiner": TINY_REFINER,
    "tiny-lcm": replace(TINY, unet=replace(TINY.unet, time_cond_proj_dim=256)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of two levels; base, refiner and consistency model of `tiny`'s size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        for name, config in MICRO.items():
            patch.setitem(PRESETS, f"of-{name}", config)
            specs = tensor_specs(config)
            shapes = {spec.name: ("fp32", spec.shape) for spec in specs}
            with SafetensorsWriter(folder / f"{name}.safetensors", shapes) as writer:
                for spec in specs:
                    writer.add(spec.name, random_tensor(spec.name, spec.shape))
            convert(folder / f"{name}.safetensors", folder / name)
    return {name: folder / name for name in MICRO}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, models):
    """A job of all samplers, three sizes, two discretizations, some from an image."""
    folder = tmp_path_factory.mktemp("mixed")
    picture = np.random.RandomState(0).randint(0, 256, (70, 70, 3), np.uint8)
    Image.fromarray(picture).save(folder / "init.png")
    rows = []
    for number, sampler in enumerate(SAMPLERS):
        legacy = (sampler, "", 64, 64, "", "", number, 3 + number, 3, "", "")
        karras = (sampler, "EDMDiscretization", 128, 64, "", "", 9, 5, 3, "", "")
        rows += [(f"legacy{number}", "a", *legacy), (f"karras{number}", "b", *karras)]
    rows += [
        ("tall", "c", "", "", 64, 128, "", "", 1, "", 2, "", ""),
        ("image", "d", "", "", "", "", "init.png", 0.7, 2, "", 5, "", ""),
        ("edit", "e", ANCESTRAL, "", "", "", "init.png", 1, 3, "", 2, 1, ""),
        ("churn", "f", "HeunEDMSampler", "", 64, 64, "", "", 4, "", 3, "", 2),
        ("missing", "g", "", "", 64, 64, "none.png", 0.5, 5, "", 2, "", ""),
    ]
    write_csv(folder / "m.csv", rows, COLUMNS)
    asked = Order(
        config=_config(models["base"]), manifest=folder / "m.csv", output=folder / "out"
    )
    return asked, run(asked)


def _config(checkpoint, *settings, file=None):
    name = str(checkpoint)
    return load(
        file, [f"model.checkpoint={name}", f"runtime.batch_size={BATCH}", *settings]
    )


def test_all_systems_run_in_one_job_and_a_missing_image_fails_its_row_alone(mixed):
    asked, summary = mixed
    assert summary.counts == {"ok": 18, "failed": 1, "invalid": 0}
    (failed,) = [r for r in rows_of(asked.output) if r["status"] == "failed"]
    assert (failed["prompt_id"], failed["error_class"]) == ("missing", "io")
    assert "none.png" in failed["error_message"]


def test_a_graph_is_compiled_once_whatever_the_samplers(mixed):
    asked, _ = mixed
    (worker,) = read_status(asked.output)["workers"]
    stages = [name.split("-")[0] for name in worker["compiles"]]
    assert set(worker["compiles"].values()) == {1}
    assert {s: stages.count(s) for s in stages} == {
        "text": 1,
        "context": 1,
        "unet": 3,
        "decode": 3,
        "encode": 1,
    }


def test_samplers_scales_and_short_batches_compile_nothing_more(tmp_path, models):
    """Seven samplers, fifty guidance scales, batches of two where threes are short."""
    rows = [
        (f"r{i}", f"a lake {i % 5}", list(SAMPLERS)[i % 7], 0.5 + i / 4, 2 + i % 2)
        for i in range(50)
    ]
    columns = ("id", "prompt", "sampler", "guidance_scale", "steps")
    write_csv(tmp_path / "m.csv", rows, columns)
    size = ("sampling.width=64", "sampling.height=64", "runtime.workers=2")
    config = _config(models["base"], "runtime.batch_size=3", *size)
    asked = Order(config=config, manifest=tmp_path / "m.csv", output=tmp_path / "out")
    assert run(asked).counts == {"ok": 50, "failed": 0, "invalid": 0}
    made = rows_of(tmp_path / "out")
    assert len({row["guidance_scale"] for row in made}) == 50
    assert {row["sampler"] for row in made} == set(SAMPLERS) and len(SAMPLERS) == 7
    assert {row["batch_valid"] for row in made} >= {1, 3}
    workers = [w for w in read_status(tmp_path / "out")["workers"] if w["made"]]
    graphs = {key for worker in workers for key in worker["compiles"]}
    for worker in workers:
        assert worker["compiles"] == dict.fromkeys(graphs, 1)
    assert sum(key.startswith("unet-") for key in graphs) == 1


def test_rows_run_alone_give_the_pixels_they_have_in_company(mixed):
    asked, _ = mixed
    resolved = replace(
        resolve(asked.config, native_size=64), init_folder=asked.manifest.parent
    )
    pipeline = load_pipeline(pipeline_name(resolved), pipeline_options(resolved, 1))
    expected = pixels_of(asked.output)
    for request in open_manifest(asked.manifest).rows():
        (task,) = plan.tasks_of(request, resolved)
        if task.prompt_id == "missing":
            continue
        made = make(pipeline, [task], BATCH, resolved.init_folder)
        assert pixel_sha256(made.pixels[0]) == expected[task.image_id], task.prompt_id


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted((ROOT / "configs").glob("*.yaml"))]
)
def test_each_shipped_config_makes_pictures(tmp_path, models, name):
    """Checkpoints apart, the configs run as they are shipped."""
    kind = name.removeprefix("tiny_").split("_")[0]
    kind = "lcm4" if kind == "lcm" else kind
    model = models[
        {"lcm4": "tiny-lcm", "refiner": "tiny-refiner"}.get(kind, "tiny-base")
    ]
    settings = ["model.preset=null", "sampling.width=64", "sampling.height=64"]
    if kind == "pipeline":
        settings += [
            f"refiner.checkpoint={models['tiny-refiner']}",
            "refiner.keep_base=true",
        ]
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "init.png")
    image = "init.png" if kind == "refiner" else ""
    rows = [("a", "a lighthouse", image), ("b", "a fjord", image)]
    write_csv(tmp_path / "m.csv", rows, ("id", "prompt", "init_image"))
    config = _config(model, *settings, file=ROOT / "configs" / f"{name}.yaml")
    asked = Order(config=config, manifest=tmp_path / "m.csv", output=tmp_path / "out")
    assert run(asked).counts == {"ok": 2, "failed": 0, "invalid": 0}
    for row in rows_of(tmp_path / "out"):
        assert (row["base_image_path"] is not None) == (kind == "pipeline")
        assert (row["strength"] is not None) == (kind == "refiner")
        assert (row["aesthetic_score"] is not None) == (kind in ("refiner", "pipeline"))
        assert row["guider"] == ("IdentityGuider" if kind == "lcm4" else "VanillaCFG")
