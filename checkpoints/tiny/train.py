"""Train the small SDXL, stage by stage; every stage goes on from where it stopped.

    python checkpoints/tiny/train.py vae      --work FOLDER   # the autoencoder
    python checkpoints/tiny/train.py language --work FOLDER   # what captions say
    python checkpoints/tiny/train.py latents  --work FOLDER   # drawings, encoded
    python checkpoints/tiny/train.py base     --work FOLDER   # denoiser and encoders
    python checkpoints/tiny/train.py export   --work FOLDER   # base.safetensors

Development only: needs torch, diffusers and transformers. Seeds are fixed; FOLDER holds
the state of all stages (about 300 MB). The package itself must be importable (`sdxl`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click
import torch
from autoencoder import load_vae, train_vae
from denoising import load_base, train_base
from language import train_language
from latents import add_chunks

HERE = Path(__file__).parent


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


@main.command()
@_options
@click.option("--steps", default=3000, show_default=True)
def vae(work: Path, steps: int) -> None:
    """Train the autoencoder."""
    work.mkdir(parents=True, exist_ok=True)
    train_vae(work, steps=steps, say=_say)


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
def latents(work: Path, chunks: int) -> None:
    """Draw pictures and encode them; more chunks can be added later."""
    add_chunks(work, load_vae(work), chunks, say=_say)


@main.command()
@_options
@click.option("--steps", default=8000, show_default=True)
@click.option("--rate", default=1e-3, show_default=True)
@click.option("--minutes", type=float, help="Stop after so long (resumable).")
@click.option("--bf16/--fp32", default=False, show_default=True)
def base(
    work: Path, steps: int, rate: float, minutes: float | None, bf16: bool
) -> None:
    """Train the base denoiser together with the text encoders."""
    stop_at = None if minutes is None else time.time() + 60 * minutes
    train_base(work, steps=steps, rate=rate, bf16=bf16, stop_at=stop_at, say=_say)


@main.command()
@_options
@click.option(
    "--to", default=HERE / "base.safetensors", type=click.Path(path_type=Path)
)
def export(work: Path, to: Path) -> None:
    """Write the base model in the original layout, fp16."""
    from sdxl.convert import convert

    model, autoencoder = load_base(work), load_vae(work)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.unet.save_pretrained(folder / "unet")
        autoencoder.save_pretrained(folder / "vae")
        model.language.first.save_pretrained(folder / "text_encoder")
        model.language.second.save_pretrained(folder / "text_encoder_2")
        convert(folder, folder / to.name, layout="original", dtype="fp16")
        shutil.copyfile(folder / to.name, to)


if __name__ == "__main__":
    main()
