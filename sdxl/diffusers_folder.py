"""Find the weight files of a diffusers folder and read their table and geometry.

    unet/ vae/ text_encoder/ text_encoder_2/     each config.json and *.safetensors

Of each network the plain weights are taken, in one file or in shards; where there are
none, the `fp16` variant. Pickled weights are never read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sdxl.config import ModelConfig
from sdxl.diffusers_config import read_config, read_json
from sdxl.safetensors_file import read_safetensors
from sdxl.stored import CheckpointError, Stored

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
# Older files' names, as diffusers and transformers accept them.
_VAE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_VAE_OLD = re.compile(r"(mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.")
_TEXT_BARE = re.compile(r"^(?=embeddings\.|encoder\.|final_layer_norm\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What a folder holds; the table's names are `network/name`."""

    config: ModelConfig
    table: dict[str, Stored]
    metadata: dict[str, str]
    config_files: tuple[Path, ...]


def read_folder(path: Path) -> Folder:
    """Read the geometry and the table of tensors of a folder; no data."""
    present = [name for name in NETWORKS if (path / name / "config.json").is_file()]
    absent = {*NETWORKS} - {*present, "text_encoder"}
    if absent:
        raise _incomplete(path, sorted(absent))
    configs = {name: path / name / "config.json" for name in present}
    config = read_config(configs)
    table: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    sources = [*configs.values()]
    for name in present:
        index, files = _weight_files(path / name, STEMS[name])
        sources += [index] if index else []
        for file, expected in files.items():
            found, notes = read_safetensors(file)
            _check_shard(file, found, expected)
            for key, stored in found.items():
                _put(table, f"{name}/{_modern_name(name, key)}", stored)
            metadata |= notes
    return Folder(
        config=config, table=table, metadata=metadata, config_files=tuple(sources)
    )


def _incomplete(path: Path, absent: list[str]) -> CheckpointError:
    if (path / "config.json").is_file():
        hint = "one network alone: put it in its place in a folder with the others"
    else:
        hint = f"a diffusers SDXL folder has {', '.join(NETWORKS)}"
    return CheckpointError(f"{path}: no `{absent[0]}/config.json`; hint: {hint}")


def _weight_files(
    folder: Path, stem: str
) -> tuple[Path | None, dict[Path, set[str] | None]]:
    """Choose the weights: index, if any, and each file with the names it must have."""
    for variant in ("", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if single.is_file():
            return None, {single: None}
        if index.is_file():
            return index, _shards(index)
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: only pickled weights (*.bin), which could run any code when "
            "loaded; hint: save it with safe_serialization=True"
        )
    raise CheckpointError(f"{folder}: no `{stem}.safetensors` nor its fp16 variant")


def _shards(index: Path) -> dict[Path, set[str] | None]:
    """Read which shard has which tensors; a shard lies beside its index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no `weight_map`")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and not {"/", "\\", "\0"} & {*file}
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: `{name}` is in `{file}`, which is no file beside the index"
            )
        shards.setdefault(index.parent / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{index}: shard `{shard.name}` is missing")
    return shards


def _check_shard(
    file: Path, found: dict[str, Stored], expected: set[str] | None
) -> None:
    if expected is not None and (unlike := expected ^ found.keys()):
        name = min(unlike)
        where = "index" if name in expected else "shard"
        raise CheckpointError(
            f"{file}: `{name}` is in the {where} only; {len(unlike)} such tensors"
        )


def _put(table: dict[str, Stored], name: str, stored: Stored) -> None:
    if name in table:
        raise CheckpointError(f"{stored.path}: `{name}` is there twice")
    table[name] = stored


def _modern_name(network: str, name: str) -> str:
    """Give an older or shorter spelling of a name as the layout has it."""
    if network == "vae":
        return _VAE_OLD.sub(lambda m: f"{m[1]}.{_VAE_ATTENTION[m[2]]}.", name)
    if network.startswith("text_encoder"):
        return _TEXT_BARE.sub("text_model.", name)
    return name
