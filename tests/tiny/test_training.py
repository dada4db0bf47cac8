"""Training must be able to start over: each stage lowers its loss from nothing."""

import copy
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 50
TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"


@pytest.fixture
def work(tmp_path):
    """A folder for the state, and one thread for each kernel."""
    torch.set_num_threads(1)
    return tmp_path


def falls(losses):
    return np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])


def learns(work, nets, loss_of, **how):
    """Train for `STEPS` and tell whether the loss falls."""
    from training import Stage, run_stage

    state_file = work / "stage.pt"
    return falls(
        run_stage(Stage(nets, loss_of, steps=STEPS, state_file=state_file, **how))
    )


def test_networks_have_the_geometry_of_the_presets():
    """Oracle: the names and shapes that `sdxl.layouts` lists for them."""
    from networks import SCALE_FACTOR, make_refiner_unet, make_unet, make_vae

    from sdxl.config import TINY, TINY_REFINER
    from sdxl.layouts import tensor_specs

    networks = {"unet": make_unet(), "vae": make_vae()}
    for config in (TINY, TINY_REFINER):
        for component, network in networks.items():
            shapes = {
                name: spec.shape_in("diffusers")
                for spec in tensor_specs(config)
                if spec.component == component
                for name in spec.diffusers
            }
            ours = network.state_dict()
            assert {name: tuple(p.shape) for name, p in ours.items()} == shapes
        networks["unet"] = make_refiner_unet()
    assert networks["vae"].config.scaling_factor == SCALE_FACTOR


@torch.no_grad()
def test_a_refiner_begins_as_the_bases_upper_levels():
    """Its way down is the base's, told no first context and no target size, exactly.

    Neither the score nor what lies between its halves changes anything.
    """
    from networks import SIZE_EMBED_DIM, TEXT_WIDTH, make_unet, upper_levels

    torch.manual_seed(1)
    base = make_unet().eval()
    refiner = upper_levels(base).eval()
    base.add_embedding.linear_1.weight[:, TEXT_WIDTH + 4 * SIZE_EMBED_DIM :] = 0
    x, context, pooled = (torch.randn(2, *n) for n in ((4, 8, 8), (77, 32), (32,)))
    sizes = torch.tensor([[96.0, 128, 16, 0], [128, 192, 0, 8]])
    deepest = []
    for net in (base, refiner):
        keep = net.down_blocks[1].attentions[-1]
        keep.register_forward_hook(lambda _, __, out: deepest.append(out[0]))

    def noise(net, context, rest):
        ids = torch.cat((sizes, torch.tensor(rest)), 1)
        told = {"text_embeds": pooled, "time_ids": ids}
        return net(x, torch.tensor([99, 49]), context, added_cond_kwargs=told).sample

    noise(base, torch.cat((torch.zeros(2, 77, 32), context), -1), [[128.0, 128]] * 2)
    first = noise(refiner, context, [[6.0]] * 2)
    assert torch.equal(*deepest)
    refiner.mid_block.resnets[0].conv2.weight *= 3
    assert torch.equal(noise(refiner, context, [[1.0], [2.5]]), first)
    refiner.up_blocks[0].resnets[0].conv1.weight[:, 0] += 0.1
    assert not torch.equal(noise(refiner, context, [[6.0]] * 2), first)


def test_the_mean_is_of_denoisers_and_the_rest_is_the_firsts(tmp_path):
    from click.testing import CliRunner
    from safetensors.torch import load_file, save_file
    from train import main

    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    names = ("model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias")
    for value, file in zip((1.0, 2.5), files, strict=False):
        save_file({name: torch.full((3,), value).half() for name in names}, file)
    arguments = ["mean", *map(str, files[:2]), "--to", str(files[2])]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = {name: value.tolist() for name, value in load_file(files[2]).items()}
    assert found == dict(zip(names, ([1.75] * 3, [1.0] * 3), strict=True))


def test_whitening_changes_latents_and_leaves_pictures_alone():
    """Oracle: the autoencoder before; float32 rounding, largest seen 2e-6."""
    from autoencoder import whiten
    from drawing import pixels
    from networks import make_vae
    from scenes import draw_scene

    torch.manual_seed(0)
    vae = make_vae().eval()
    x = torch.from_numpy(pixels(draw_scene(1)))[None]
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        whiten(vae, pictures=16)
        latents = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
        after = vae.decode(latents / vae.config.scaling_factor).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert 0.1 < latents.std() < 10


def test_captions_name_what_is_drawn():
    from captions import caption, plain_caption
    from scenes import draw_scene

    for seed in range(300):
        scene = draw_scene(seed)
        text = caption(scene, random.Random(seed))
        plain = plain_caption(scene)
        for thing in scene.things:
            assert thing.shape in text
            assert f"{thing.color} {thing.shape}" in plain


def test_a_consistency_model_gets_what_the_base_has_learned_since(work):
    """Oracle: the sums by hand; its own input, which the base lacks, stays."""
    from consistency import Student, start_student
    from denoising import Model, start_model
    from networks import start_folder

    def filled(nets, value):
        with torch.no_grad():
            for parameter in nets.parameters():
                parameter.fill_(value)
        return nets

    base, folder = filled(Model(), 1.0), start_folder(work, "base")
    base.unet.save_pretrained(folder / "unet")
    base.language.first.save_pretrained(folder / "text_encoder")
    base.language.second.save_pretrained(folder / "text_encoder_2")
    filled(Student(), 0.25).unet.save_pretrained(start_folder(work, "lcm") / "unet")
    student = start_student(work, filled(start_model(work), 3.0))
    new = student.unet.time_embedding.cond_proj.weight
    assert (new == 0.25).all()
    assert all((p == 2.25).all() for p in student.parameters() if p is not new)


def test_training_starts_from_the_shipped_weights(work):
    """Oracle: the shipped files; exact, as they are read at fp16."""
    from click.testing import CliRunner
    from consistency import start_student
    from denoising import load_base
    from refining import start_refiner
    from safetensors.torch import load_file
    from train import MODELS, main

    files = {name: TINY / f"{name}.safetensors" for name in MODELS}
    words = ["start", "--work", work, *files.values()]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    base = load_base(work)
    nets = {"base": base, "lcm": start_student(work, base)}
    nets["refiner"] = start_refiner(work)
    for name, model in nets.items():
        shipped = load_file(files[name])
        first = shipped["model.diffusion_model.input_blocks.0.0.weight"].float()
        assert torch.equal(model.unet.conv_in.weight.data, first), name


def test_training_starts_from_no_file_whose_name_says_nothing(work):
    from click.testing import CliRunner
    from train import main

    other = work / "weights.safetensors"
    other.touch()
    done = CliRunner().invoke(main, ["start", "--work", str(work), str(other)])
    assert done.exit_code == 2
    assert "weights.safetensors is named for none of base, lcm" in done.output
    assert not (work / "start").exists()


@pytest.mark.slow
def test_autoencoder_learns_in_50_steps(work):
    from autoencoder import vae_loss
    from networks import make_vae
    from training import Stage, run_stage

    torch.manual_seed(0)
    vae = make_vae()
    loss_of = vae_loss(vae, steps=10_000)
    stage = Stage(vae, loss_of, steps=STEPS, rate=1e-3, state_file=work / "vae.pt")
    assert falls(run_stage(stage))


@pytest.mark.slow
def test_language_learns_in_50_steps_and_a_stopped_stage_goes_on_where_it_was(work):
    """Oracle: the unbroken stage; bit-equal, as every step's data are its number's."""
    from language import Language, Reader, language_loss
    from torch import nn
    from training import Stage, run_stage

    def stage(name):
        torch.manual_seed(0)
        nets = nn.ModuleDict({"language": Language(), "reader": Reader()})
        state_file = work / f"{name}.pt"
        loss_of = language_loss(nets)
        return Stage(nets, loss_of, steps=STEPS, rate=1e-3, state_file=state_file)

    whole = run_stage(stage("whole"))
    first = run_stage(stage("broken"), stop_at=0.0)
    rest = run_stage(stage("broken"))
    assert len(first) == 1
    assert first + rest == whole
    assert falls(whole)


@pytest.fixture
def latents(work):
    """Drawings as latents of an untrained autoencoder."""
    from autoencoder import whiten
    from latents import Latents, add_chunks
    from networks import make_vae

    torch.manual_seed(0)
    add_chunks(work, whiten(make_vae(), pictures=16), 1)
    return Latents(work)


@pytest.mark.slow
def test_base_learns_in_50_steps(work, latents):
    from denoising import PARTS, Model, base_loss

    model = Model()
    loss_of, groups = base_loss(model, latents, STEPS, count=16), model.groups(1e-3)
    assert learns(work, model, loss_of, rate=1e-3, groups=groups, threads=PARTS)


@pytest.mark.slow
def test_calibration_nears_the_teacher_in_50_steps(work, latents):
    """A copy of the teacher is wrong by (c - u) three times over, guided."""
    from calibrating import PARTS, calibration_loss
    from denoising import Model

    teacher = Model().requires_grad_(requires_grad=False)
    student = copy.deepcopy(teacher)
    student.unet.requires_grad_(requires_grad=True)
    loss_of = calibration_loss(student, teacher, latents)
    assert learns(work, student, loss_of, rate=3e-4, threads=PARTS)


@pytest.mark.slow
def test_mending_nears_the_teacher_in_50_steps(work, latents):
    """From weights of its own: a copy would begin where it is to end, nearly."""
    from denoising import Model
    from mending import PARTS, mending_loss
    from networks import make_vae

    teacher = Model().requires_grad_(requires_grad=False)
    student, vae = Model(), make_vae().requires_grad_(requires_grad=False)
    student.language = teacher.language
    loss_of = mending_loss(student, teacher, vae, latents)
    assert learns(work, student, loss_of, rate=3e-4, threads=PARTS)


@pytest.mark.slow
def test_consistency_model_nears_the_ends_of_ways_in_50_steps(work, latents):
    """Of ways it was not taught: those that it is taught get longer at first."""
    from consistency import PARTS, Student, guided_noise, lcm_loss
    from denoising import Model
    from networks import make_vae
    from solving import Solving
    from training import Stage, run_stage

    teacher = Model().requires_grad_(requires_grad=False)
    student = Student()
    student.start_from(teacher)
    target = copy.deepcopy(student).requires_grad_(requires_grad=False)
    solving = Solving(latents, teacher, partial(guided_noise, teacher), target, 12)
    asked = solving.lessons(64, random.Random(1), torch.Generator().manual_seed(1))

    @torch.no_grad()
    def error():
        drawn = student(asked.x, asked.timesteps, *asked.told)
        return (drawn - asked.wanted).abs().mean()

    before = error()
    vae = make_vae().requires_grad_(requires_grad=False)
    loss_of = lcm_loss(student, target, teacher, vae, latents)
    state_file = work / "lcm.pt"
    how = {"steps": STEPS, "rate": 1e-3, "threads": PARTS, "state_file": state_file}
    run_stage(Stage(student, loss_of, **how))
    assert error() < 0.95 * before


@pytest.mark.slow
def test_refiner_learns_in_50_steps(work, latents):
    from denoising import Model
    from networks import make_vae
    from pictures import Painter, add_pictures, load_pictures
    from refining import PARTS, Refiner, refiner_loss

    base, refiner = Model().requires_grad_(requires_grad=False), Refiner()
    vae = make_vae().requires_grad_(requires_grad=False)
    add_pictures(work, Painter(base, vae, latents), 3)
    loss_of = refiner_loss(refiner, base.language, vae, load_pictures(work))
    assert learns(work, refiner, loss_of, rate=1e-3, threads=PARTS)


@pytest.mark.slow
def test_refiners_decoder_learns_in_50_steps(work, latents):
    from denoising import Model
    from networks import make_vae
    from pictures import Painter, add_pictures, load_pictures
    from sharpening import PARTS, sharpening_loss

    teacher = make_vae().requires_grad_(requires_grad=False)
    base = Model().requires_grad_(requires_grad=False)
    add_pictures(work, Painter(base, teacher, latents), 3)
    vae = make_vae()
    loss_of = sharpening_loss(vae, teacher, load_pictures(work))
    assert learns(work, vae, loss_of, rate=1e-3, threads=PARTS)


def test_the_refiner_alone_is_given_its_decoder(work):
    from autoencoder import load_vae
    from networks import make_vae, start_folder
    from sharpening import load_sharp_vae, start_sharp_vae
    from training import Stage

    def decoder(vae):
        return vae.decoder.conv_in.weight.data

    make_vae().save_pretrained(start_folder(work, "base") / "vae")
    begun = decoder(load_vae(work))
    assert torch.equal(decoder(load_sharp_vae(work)), begun)
    made = make_vae()
    made.save_pretrained(start_folder(work, "refiner") / "vae")
    assert torch.equal(decoder(start_sharp_vae(work)), decoder(made))
    trained = make_vae()
    Stage(trained, None, steps=0, rate=1e-3, state_file=work / "sharpen.pt").save()
    assert torch.equal(decoder(load_sharp_vae(work)), decoder(trained))
    assert torch.equal(decoder(start_sharp_vae(work)), decoder(made))
    assert torch.equal(decoder(load_vae(work)), begun)
