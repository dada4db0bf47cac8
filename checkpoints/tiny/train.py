"""Train the small SDXL, stage by stage; every stage goes on from where it stopped.

    python checkpoints/tiny/train.py vae      --work FOLDER   # the autoencoder
    python checkpoints/tiny/train.py decoder  --work FOLDER   # its decoder alone
    python checkpoints/tiny/train.py language --work FOLDER   # what captions say
    python checkpoints/tiny/train.py latents  --work FOLDER   # drawings, encoded
    python checkpoints/tiny/train.py base     --work FOLDER   # denoiser and encoders
    python checkpoints/tiny/train.py calibrate --work FOLDER  # the base's guidance
    python checkpoints/tiny/train.py mend     --work FOLDER   # the base's colours
    python checkpoints/tiny/train.py lcm      --work FOLDER   # distilled from base
    python checkpoints/tiny/train.py pictures --work FOLDER   # drawn by the base
    python checkpoints/tiny/train.py refiner  --work FOLDER   # the last steps
    python checkpoints/tiny/train.py sharpen  --work FOLDER   # the refiner's decoder
    python checkpoints/tiny/train.py export   --work FOLDER base   # base.safetensors
    python checkpoints/tiny/train.py mean A B --to FILE            # of exported files

To train shipped weights on, `start` with them, then `latents`, then what is made from
the base: `lcm`, `pictures`, `refiner` and `sharpen`.

Development only: needs torch, diffusers and transformers. Seeds are fixed; FOLDER holds
the state of all stages (about 600 MB). The package itself must be importable (`sdxl`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import click
import torch
from autoencoder import load_vae, train_decoder, train_vae
from calibrating import train_calibrated
from consistency import load_lcm, train_lcm
from denoising import load_base, train_base
from language import train_language
from latents import Latents, add_chunks
from mending import train_mended
from networks import start_folder
from pictures import Painter, add_pictures
from refining import load_refiner, train_refiner
from safetensors.torch import load_file, save_file
from sharpening import load_sharp_vae, train_sharp_vae

from sdxl.convert import convert

HERE = Path(__file__).parent
MODELS = ("base", "lcm", "refiner")
DENOISER = "model.diffusion_model."


@click.group(help=__doc__)
def main() -> None:
    torch.set_num_threads(1)


def _options(command: click.Command) -> click.Command:
    work = click.Path(file_okay=False, path_type=Path)
    return click.option(
        "--work", type=work, required=True, help="Folder of the state."
    )(command)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _training(*, steps: int, rate: float | None = None) -> Callable:
    """Give a command the options of training, and them to its function as a stage's."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(work: Path, minutes: float | None, **running: object) -> None:
            work.mkdir(parents=True, exist_ok=True)
            function(work, stop_at=_in(minutes), say=_say, **running)

        until = "Stop after so long (resumable)."
        command = click.option("--minutes", type=float, help=until)(command)
        if rate is not None:
            command = click.option("--rate", default=rate, show_default=True)(command)
        command = click.option("--steps", default=steps, show_default=True)(command)
        return _options(command)

    return add


@main.command()
@_options
@click.argument(
    "checkpoints",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, path_type=Path),
)
def start(work: Path, checkpoints: tuple[Path, ...]) -> None:
    """Begin from CHECKPOINTS, named for what they are, instead of from nothing."""
    for checkpoint in checkpoints:
        if checkpoint.stem not in MODELS:
            names = ", ".join(MODELS)
            raise click.BadParameter(f"{checkpoint} is named for none of {names}")
    for checkpoint in checkpoints:
        folder = start_folder(work, checkpoint.stem)
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(checkpoint, folder, layout="diffusers")


@main.command()
@_training(steps=3000, rate=1e-3)
def vae(work: Path, **running: object) -> None:
    """Train the autoencoder."""
    train_vae(work, **running)


@main.command()
@_training(steps=3000)
def decoder(work: Path, **running: object) -> None:
    """Train the decoder on, for the same latents."""
    train_decoder(work, **running)


@main.command()
@_options
@click.option("--steps", default=1600, show_default=True)
def language(work: Path, steps: int) -> None:
    """Teach the text encoders what captions say."""
    work.mkdir(parents=True, exist_ok=True)
    train_language(work, steps=steps, say=_say)


@main.command()
@_options
@click.option("--chunks", default=160, show_default=True, help="Of 128 pictures each.")
@click.option("--hard", is_flag=True, help="Draw patterns and pairs alone.")
def latents(work: Path, chunks: int, hard: bool) -> None:
    """Draw pictures and encode them; more chunks can be added later."""
    add_chunks(work, load_vae(work), chunks, hard=hard, say=_say)


@main.command()
@_training(steps=8000, rate=1e-3)
def base(work: Path, **running: object) -> None:
    """Train the base denoiser together with the text encoders."""
    train_base(work, **running)


@main.command()
@_training(steps=1000, rate=3e-4)
def calibrate(work: Path, **running: object) -> None:
    """Have the base do at a guidance of 5 what is best for it as it was trained."""
    train_calibrated(work, **running)


@main.command()
@_training(steps=3700, rate=6e-5)
def mend(work: Path, **running: object) -> None:
    """Have the base give things the colours that were asked for."""
    train_mended(work, **running)


@main.command()
@_training(steps=2000, rate=2e-4)
def lcm(work: Path, **running: object) -> None:
    """Distil the base into the latent consistency model."""
    train_lcm(work, **running)


@main.command()
@_options
@click.option("--chunks", default=120, show_default=True, help="Of 36 pictures each.")
def pictures(work: Path, chunks: int) -> None:
    """Have the base draw what the refiner learns from; more can be added later."""
    base = load_base(work).eval().requires_grad_(requires_grad=False)
    vae = load_vae(work).eval().requires_grad_(requires_grad=False)
    add_pictures(work, Painter(base, vae, Latents(work)), chunks, say=_say)


@main.command()
@_training(steps=4000, rate=1e-3)
def refiner(work: Path, **running: object) -> None:
    """Train the refiner."""
    train_refiner(work, **running)


@main.command()
@_training(steps=400, rate=1e-4)
def sharpen(work: Path, **running: object) -> None:
    """Train the refiner's decoder."""
    train_sharp_vae(work, **running)


@main.command()
@_options
@click.argument("model", type=click.Choice(MODELS))
@click.option("--to", type=click.Path(path_type=Path), help="File to write.")
def export(work: Path, model: str, to: Path | None) -> None:
    """Write MODEL in the original layout, fp16."""
    to = to or HERE / f"{model}.safetensors"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_diffusers(work, model, folder / "diffusers")
        convert(folder / "diffusers", folder / to.name, layout="original", dtype="fp16")
        shutil.copyfile(folder / to.name, to)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), required=True)
def mean(files: tuple[Path, ...], to: Path) -> None:
    """Write the mean of the denoisers in exported FILES; the rest is the first's."""
    weights = [load_file(file) for file in files]
    for key, value in weights[0].items():
        if key.startswith(DENOISER):
            each = torch.stack([one[key].float() for one in weights])
            weights[0][key] = each.mean(0).to(value.dtype)
    save_file(weights[0], to, metadata={"format": "pt"})


def save_diffusers(work: Path, model: str, folder: Path) -> None:
    """Save a trained model's parts as a diffusers folder, float32."""
    language = load_base(work).language
    vae = load_sharp_vae(work) if model == "refiner" else load_vae(work)
    vae.save_pretrained(folder / "vae")
    language.second.save_pretrained(folder / "text_encoder_2")
    if model != "refiner":
        language.first.save_pretrained(folder / "text_encoder")
    nets = {"base": load_base, "lcm": load_lcm, "refiner": load_refiner}[model](work)
    nets.unet.save_pretrained(folder / "unet")


def _in(minutes: float | None) -> float | None:
    return None if minutes is None else time.time() + 60 * minutes


if __name__ == "__main__":
    main()
