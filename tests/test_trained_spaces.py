"""Spaces that train networks of their own: SVG, VFM-VAE, AlignTok, and the stages they are trained in."""

from __future__ import annotations

import json

import pytest
import torch
from fakes.interrupting import interrupted_after
from fakes.launching import launch
from safetensors.torch import load_file
from torch.testing import assert_close

import umm
from umm import losses
from umm.build import cache_command, settings_of
from umm.config import load
from umm.errors import ConfigError, MissingWeights
from umm.latents._conv import ConvDecoder, group_norm
from umm.latents._pyramid import Pyramid
from umm.latents._trained import Stage
from umm.latents.aligntok import AlignTok
from umm.latents.base import LatentSpec, RunningStats
from umm.latents.dinov2 import DINOv2
from umm.latents.svg import SVG, match, scalars_of
from umm.latents.vfm_vae import VFMVAE, coarse_l1, moved
from umm.pretrained import sha256_of
from umm.registry import find
from umm.rng import PictureRNG, generator
from umm.runs import Run
from umm.settings import ConvDecoderSettings, OptimSettings, PretrainedSettings, PyramidSettings
from umm.tasks._picture_loss import PictureLoss
from umm.tasks._tokenizer import Tokenizer, slowed, windows
from umm.tasks.recon import Recon
from umm.train import train

SPACES = {"svg": SVG, "aligntok": AlignTok, "vfm_vae": VFMVAE}
SMALL = {
    "svg": "latent.channels=4 latent.width=16 latent.depth=1 latent.heads=2 latent.mlp=32 latent.decoder.width=8 "
    "latent.decoder.multipliers=[1,1,1,1] latent.decoder.blocks=0",
    "aligntok": "latent.channels=8 latent.hidden=16 latent.decoder.width=8 latent.decoder.multipliers=[1,1,1,1] "
    "latent.decoder.blocks=0",
    "vfm_vae": "latent.channels=4 latent.levels=[0,-1] latent.level_width=8 latent.lengths=[1,1,1,1] "
    "latent.decoder.width=16 latent.decoder.style=8 latent.decoder.blocks=1 latent.decoder.attention=1",
}

GAN = """recon.adversarial.weight=0.75 recon.adversarial.backbone=fakes recon.adversarial.start_discriminator=16
recon.adversarial.start_generator=32 recon.adversarial.optim.warmup=0""".split()

SEEN = ["recon.perceptual.name=encoder", "recon.perceptual.layers=[0,1]"]


def pictures(count: int = 4, side: int = 64, seed: object = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=generator("pictures", seed))


def numbers(*shape: int, seed: object = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator("numbers", seed))


def hashes(space) -> dict[str, str]:
    return {name: sha256_of(part.state_dict()) for name, part in space.parts.items()}


def as_is(raw: torch.Tensor) -> torch.Tensor:
    return raw


def rng(count: int = 4, name: str = "test") -> PictureRNG:
    return PictureRNG(range(count), name)


# ------------------------------------------------------------------------------------------------------------- SVG


def test_svg_in_frozen_mode_encodes_a_picture_alone_as_in_a_batch():
    space = SVG.tiny(scalars="frozen")
    assert space.per_picture
    assert_close(space.raw(pictures())[:1], space.raw(pictures()[:1]), rtol=0, atol=1e-6)


def test_svg_in_batch_mode_encodes_a_picture_alone_differently_and_only_its_residual():
    space = SVG.tiny(scalars="batch")
    assert not space.per_picture
    together, alone = space.raw(pictures())[:1], space.raw(pictures()[:1])
    tokens = space.base.spec.channels
    assert_close(together[:, :tokens], alone[:, :tokens], rtol=0, atol=1e-6)
    assert (together[:, tokens:] - alone[:, tokens:]).abs().max() > 1e-3


def test_matching_has_the_values_of_a_hand_made_case():
    tokens = torch.tensor([[[[0.0, 2.0]], [[4.0, 8.0]]]])  # channel means 1, 6; unbiased deviations sqrt 2, sqrt 8
    residual = torch.tensor([[[[1.0, 3.0]]]])  # mean 2, deviation sqrt 2
    scalars = scalars_of(tokens, residual)
    assert_close(scalars, torch.tensor([3.5, 1.5 * 2**0.5, 2.0, 2**0.5]))
    assert_close(match(residual, scalars), torch.tensor([[[[2.0, 5.0]]]]), rtol=0, atol=1e-5)


def test_a_matched_residual_has_the_mean_and_spread_of_the_tokens():
    tokens, residual = 3 + 2 * numbers(8, 5, 4, 4), 7 * numbers(8, 3, 4, 4, seed=1) - 1
    scalars = scalars_of(tokens, residual)
    again = scalars_of(tokens, match(residual, scalars))
    assert_close(again[2:], again[:2], rtol=1e-5, atol=1e-5)


def test_running_scalars_are_the_mean_of_the_first_batches():
    detail = SVG.tiny().residual
    seen = [numbers(4, seed=i) for i in range(5)]
    for scalars in seen:
        detail.remember(scalars)
    assert_close(detail.scalars, torch.stack(seen).mean(0))


def test_svg_tokens_are_the_encoders_features_or_its_latents():
    base = DINOv2.tiny(normalizer="none")
    features = base.features(pictures()).patches.transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(SVG.tiny(tokens="features").raw(pictures())[:, :32], features)
    assert torch.equal(SVG.tiny(tokens="raw").raw(pictures())[:, :32], base.raw(pictures()))


def test_without_its_detail_a_picture_is_drawn_with_the_learned_stand_in():
    student = SVG.tiny(drop=1.0).student(0)
    stage = student.stages[0]
    lesson = student.lesson(stage, pictures(), rng(), as_is)
    tokens = student.tokens(pictures())
    absent = student.residual.absent.detach().view(1, -1, 1, 1).expand(4, -1, 4, 4)
    assert_close(lesson.pictures, student.draw(torch.cat([tokens, absent], 1)))
    lesson.pictures.sum().backward()
    assert student.residual.absent.grad.abs().max() > 0
    assert not any(p.grad is not None and p.grad.any() for p in student.residual.blocks.parameters())


def test_a_space_that_depends_on_its_batch_is_not_cached(tmp_path, encoder):
    run = train(load("recon", None, settings("svg", tmp_path, encoder, "latent.scalars=batch")))
    gen = [*gen_settings(tmp_path, "svg", run.parent), "latent.scalars=batch", f"cache.dir={tmp_path / 'cache'}"]
    for ask in (train, lambda config: cache_command(config, "train", verify=False)):
        with pytest.raises(ConfigError, match="cannot be cached, they depend on their batch"):
            ask(load("gen", None, gen))
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------------- AlignTok


def test_an_identity_adapter_is_rae():
    space, rae = AlignTok.tiny(adapter="identity"), DINOv2.tiny(normalizer="none")
    assert space.spec == rae.spec
    assert torch.equal(space.raw(pictures()), rae.raw(pictures()))


def test_the_anchor_and_its_gradient_are_exactly_zero_at_the_switch_and_not_later():
    student = AlignTok.tiny().student(0)
    align, tune, _ = student.stages
    student.begin_stage(align)
    assert not student.lesson(align, pictures(), rng(), as_is).terms
    student.begin_stage(tune)
    weight, anchor = student.lesson(tune, pictures(), rng(), as_is).terms["anchor"]
    gradients = torch.autograd.grad(anchor, student.adapter.parameters(), retain_graph=True)
    gradients += torch.autograd.grad(anchor, list(student.base.encoder.parameters()), allow_unused=True)
    assert weight == 1.0 and anchor.item() == 0.0
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    with torch.no_grad():
        student.base.encoder.embeddings.cls_token += 0.1
    assert student.lesson(tune, pictures(), rng(), as_is).terms["anchor"][1].item() > 0


def test_the_anchor_is_the_latent_behind_the_adapter_of_the_stage_before():
    student = AlignTok.tiny().student(0)
    tune = student.stages[1]
    student.begin_stage(tune)
    before = student.raw(pictures()).detach()
    with torch.no_grad():
        for parameter in student.adapter.parameters():
            parameter.mul_(1.5)
    _, anchor = student.lesson(tune, pictures(), rng(), as_is).terms["anchor"]
    assert_close(anchor, (student.raw(pictures()) - before).square().mean())


def test_a_wrong_number_of_lengths_is_one_sentence():
    with pytest.raises(ConfigError, match=r"lengths=\[1.0\] must be three"):
        AlignTok.tiny(lengths=[1.0])
    with pytest.raises(ConfigError, match="must be four"):
        VFMVAE.tiny(lengths=[0.0] * 4)


# --------------------------------------------------------------------------------------------------------- VFM-VAE


def test_the_kl_has_its_closed_form():
    mean, std = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.5]])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    ).sum()
    assert_close(losses.kl_normal(mean, 2 * std.log()), expected)
    assert losses.kl_normal(torch.zeros(3, 4), torch.zeros(3, 4)) == 0


def test_alignment_losses_have_the_values_of_hand_made_tokens():
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # at right angles
    turned = torch.tensor([[[0.0, 3.0], [-2.0, 0.0]]])  # each turned by 90 degrees and scaled
    same = torch.tensor([[[1.0, 0.0], [5.0, 0.0]]])  # both along the first axis
    assert_close(losses.misaligned_cosine(turned, features), torch.tensor(1.0))
    assert_close(losses.misaligned_distances(turned, features), torch.tensor(0.0))
    assert_close(losses.misaligned_cosine(same, features), torch.tensor(0.5))
    assert_close(losses.misaligned_distances(same, features), torch.tensor(0.5))  # 0 and 1, each in half of the pairs
    assert_close(losses.misaligned_cosine(same, features, margin=0.25), torch.tensor(0.375))
    assert_close(losses.misaligned_distances(same, features, margin=0.25), torch.tensor(0.375))


def test_in_use_the_latent_is_the_mean_and_in_training_a_draw_around_it():
    student = VFMVAE.tiny(equivariance=0.0).student(0)
    mean, logvar = student.posterior(student.levels(pictures()))
    assert torch.equal(student.raw(pictures()), mean)
    seen = []
    student.lesson(student.stages[1], pictures(), rng(), lambda z: seen.append(z) or z)
    expected = mean + (logvar / 2).exp() * rng().fork("posterior").randn(*student.spec.shape)
    assert_close(seen[0], expected)


def test_merged_positions_halve_the_grid():
    space = VFMVAE.tiny(merge=2, decoder=PyramidSettings(budget=512, width=16, style=8, blocks=1, attention=1))
    assert space.spec.shape == (4, 2, 2) and space.spec.patch == 32
    assert space.draw(space.raw(pictures())).shape == (4, 3, 64, 64)
    with pytest.raises(ConfigError, match="merge=3 does not divide"):
        VFMVAE.tiny(merge=3)


def test_the_decoder_draws_at_every_scale_and_of_any_grid():
    decoder = Pyramid(LatentSpec(4, 4, 4, 64), PyramidSettings(width=8, style=8, blocks=1))
    assert [p.shape[-1] for p in decoder.scales(numbers(2, 4, 4, 4))] == [4, 8, 16, 32, 64]
    assert decoder(numbers(2, 4, 2, 3)).shape == (2, 3, 32, 48)


def test_latents_and_pictures_are_moved_alike():
    """With one pixel a place the picture is the latent, so both must stay equal whatever the draw."""
    picture, kinds = numbers(2, 3, 8, 8), set()
    for n in range(40):
        z, target = moved(picture, picture, rng(2, f"move {n}"), 0.5)
        assert_close(z, target)
        kinds.add((z.shape[-1], torch.equal(z, picture)))
    assert {size for size, _ in kinds} == {2, 4, 6, 8} and (8, True) in kinds and (8, False) in kinds


def test_without_equivariance_nothing_moves():
    z = numbers(2, 3, 4, 4)
    assert all(moved(z, z, rng(2, f"stay {n}"), 0.0)[0] is z for n in range(10))


def test_coarse_pictures_are_compared_with_averages():
    target = torch.arange(16.0).view(1, 1, 4, 4)
    assert_close(coarse_l1([torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 4, 4)], target), torch.tensor(7.5 + 7.5))


def test_structure_is_asked_for_only_while_refining_and_alignment_only_before():
    student = VFMVAE.tiny().student(0)
    found = {stage.name: set(student.lesson(stage, pictures(), rng(), as_is).terms) for stage in student.stages}
    assert found == {
        "warm": {"kl", "vf", "scales"},
        "align": {"kl", "vf"},
        "relax": {"kl", "vf"},
        "refine": {"ssim"},
    }
    weights = [student.lesson(stage, pictures(), rng(), as_is).terms["vf"][0] for stage in student.stages[:3]]
    assert weights == [5.0, 5.0, 1.0]


# -------------------------------------------------------------------------------------------------------- decoders


def test_the_convolutional_decoder_has_the_published_shape():
    """VA-VAE's and SVG's: base 128, multipliers 1 1 2 2 4, from a 16 x 16 grid to 256 pixels."""
    theirs = pytest.importorskip("diffusers.models.autoencoders.vae").Decoder
    with torch.device("meta"):
        decoder = ConvDecoder(LatentSpec(392, 16, 16, 256), ConvDecoderSettings())
        assert decoder(torch.empty(1, 392, 16, 16)).shape == (1, 3, 256, 256)
        levels = ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4)
        reference = theirs(392, 3, levels, block_out_channels=(128, 128, 256, 256, 512), layers_per_block=2)
    counts = [sum(p.numel() for p in network.parameters()) for network in (decoder, reference)]
    assert counts == [43_076_483] * 2


def test_groups_divide_the_channels_and_published_widths_have_32():
    for channels in range(1, 1100):
        groups = group_norm(channels).num_groups
        assert channels % groups == 0 and (groups == 1 or channels // groups >= 4), channels
    assert {group_norm(channels).num_groups for channels in (128, 256, 512, 1024)} == {32}
    assert [group_norm(channels).num_groups for channels in (8, 16, 64, 18, 146, 73)] == [2, 4, 16, 2, 2, 1]


def test_levels_that_do_not_lead_to_the_picture_are_one_sentence():
    with pytest.raises(ConfigError, match="this latent has 12 px: no number draws that, choose another encoder_size"):
        ConvDecoder(LatentSpec(4, 4, 4, 48), ConvDecoderSettings())
    with pytest.raises(ConfigError, match="2 levels, which draw 2 px a token; this latent has 16 px: give 5 levels"):
        ConvDecoder(LatentSpec(4, 4, 4, 64), ConvDecoderSettings(multipliers=[1, 1]))


# ---------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("name", SPACES)
def test_a_stage_leaves_what_it_does_not_train_exactly_as_it_is(name):
    """With weight decay, and momentum from the stage before; buffers too."""
    student = SPACES[name].tiny().student(0)
    optimizer = torch.optim.AdamW([p for part in student.parts.values() for p in part.parameters()], 1e-2)
    frozen = {id(p): p.clone() for p in student.base.parameters()}
    for stage in student.stages:
        student.begin_stage(stage)
        before = hashes(student)
        for step in range(2):
            lesson = student.lesson(stage, pictures(seed=step), rng(), as_is)
            loss = (lesson.pictures - lesson.target).abs().mean() + sum(w * v for w, v in lesson.terms.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after = hashes(student)
        assert {name for name in before if before[name] != after[name]} == set(stage.trains), stage.name
    if "encoder" not in student.parts:
        assert all(torch.equal(p, frozen[id(p)]) for p in student.base.parameters())


def test_a_student_is_drawn_from_the_runs_seed_and_shares_only_what_stays_frozen():
    space = SVG.tiny()
    first, again, other = space.student(0), space.student(0), space.student(1)
    assert hashes(first) == hashes(again) != hashes(other)
    assert first.base is space.base
    tuned = AlignTok.tiny()
    assert tuned.student(0).base is not tuned.base
    assert hashes(tuned.student(0))["encoder"] == hashes(tuned)["encoder"]
    assert not any(p.requires_grad for p in [*space.parameters(), *tuned.parameters()])


def test_stages_cover_the_run_in_whole_steps():
    stages = (Stage("a", 1, ()), Stage("none", 0, ()), Stage("b", 2, ()), Stage("c", 1, ()))
    found = windows(stages, 1000, 32)  # 32 steps
    assert [(stage.name, window) for stage, window in found] == [("a", (0, 256)), ("b", (256, 768)), ("c", (768, None))]
    with pytest.raises(ConfigError, match="too short a run: stage 'a' would have no step of 32 pictures"):
        windows(stages, 32, 32)


def test_a_stages_rate_is_a_multiple_of_the_runs():
    assert slowed(OptimSettings(lr=2.0, final_lr=1.0, warmup=3), 0.5) == OptimSettings(lr=1.0, final_lr=0.5, warmup=3)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a random DINOv2 of two blocks."""
    folder = tmp_path_factory.mktemp("encoder")
    DINOv2.tiny(registers=0).encoder.save_pretrained(folder)
    return folder


def settings(name: str, folder, encoder, *more: str) -> list[str]:
    """A training run of a second: 16-pixel pictures, 2 x 2 tokens."""
    text = f"""
        run={folder / name} data.name=fakes.pictures latent.name={name} latent.image_size=16
        latent.encoder.weights={encoder} latent.encoder.encoder_size=28 {SMALL[name]}
        recon.perceptual.name=none recon.adversarial.weight=0 recon.noise=0 recon.optim.warmup=0 recon.optim.lr=1e-3
        recon.optim.weight_decay=0.1 recon.ema=0.9 train.images=96 train.batch_size=8 train.workers=0
        train.log_every=1 train.save_every=32 train.sample_every=96 train.device=cpu
    """
    return [*text.split(), *more]


def gen_settings(folder, name: str, run) -> list[str]:
    text = f"""
        run={folder / "gen"} data.name=fakes.pictures latent.name={name} latent.weights={run} latent.image_size=16
        gen.dit.size=custom gen.dit.width=64 gen.dit.depth=1 gen.dit.heads=2 gen.dit.head_depth=0 gen.optim.warmup=0
        train.images=32 train.batch_size=8 train.workers=0 train.save_every=32 train.sample_every=32 train.device=cpu
        eval.sampler.steps=2
    """
    return text.split()


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of the trained weights, their averages and the optimisers."""
    folder = run.latest()
    tensors = {f"{n}/{k}": v for n in ("model", "ema") for k, v in load_file(folder / f"{n}.safetensors").items()}
    state = torch.load(folder / "state.pt", weights_only=True)
    for name, optimizer in state["optimizers"].items():
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer/{name}/{index}/{k}": v for k, v in values.items()}
    return tensors


def assert_identical(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("name", SPACES)
def test_a_run_trains_the_space_and_its_folder_is_a_latent_space(name, tmp_path, encoder):
    overrides = settings(name, tmp_path, encoder, "train.images=960", "recon.optim.lr=3e-3")
    run = Run(train(load("recon", None, overrides)).parent)
    log = run.read_log()
    stages = [stage.name for stage in SPACES[name].tiny().stages]
    assert list(dict.fromkeys(key.split(".")[0] for r in log for key in r if key.endswith(".l1"))) == stages
    l1 = [value for r in log for key, value in r.items() if key.endswith(".l1")]
    assert sum(l1[-9:]) < 0.9 * sum(l1[:9]), (l1[:9], l1[-9:])
    assert (run.folder / "model" / "space.safetensors").exists() and list((run.folder / "samples").glob("*.png"))

    model = umm.load(run.folder)
    images = pictures(3, 16)
    assert model.space.stages == () and model.can_decode and model.reconstruct(images).shape == images.shape
    space = find("latents", name).from_config(load("gen", None, gen_settings(tmp_path, name, run.folder)).latent)
    assert torch.equal(space.encode(images), model.space.encode(images))
    assert space.identity() == model.space.identity() == json.loads(json.dumps(space.identity()))
    untrained = find("latents", name).from_config(load("recon", None, settings(name, tmp_path, encoder)).latent)
    assert untrained.stages and untrained.identity()["weights"] != space.identity()["weights"]


def test_statistics_are_those_of_the_trained_latents(tmp_path, encoder):
    run = train(load("recon", None, settings("aligntok", tmp_path, encoder)))
    model, source = umm.load(run), find("data", "fakes.pictures")
    source = source.from_config(source.Config(), "train")
    images = torch.stack([source[i]["image"] for i in range(len(source))]) / 255
    stats = RunningStats().update(model.space.raw(images))
    expected = DINOv2.tiny(image_size=64, normalizer="channel").normalizer
    expected = type(expected)(model.spec.shape, "channel").fit(stats)
    assert_close(model.space.normalizer.mean, expected.mean, rtol=1e-4, atol=1e-5)
    assert_close(model.space.normalizer.var, expected.var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name,steps", [("svg", 6), ("aligntok", 6), ("vfm_vae", 5)])
def test_an_interrupted_run_ends_bit_identical(name, steps, tmp_path, encoder, fake_discriminator):
    """AlignTok is stopped inside `tune`, whose anchor must survive, and VFM-VAE with its balance; all with a GAN."""
    whole = Run(train(load("recon", None, settings(name, tmp_path / "whole", encoder, *GAN))).parent)
    overrides = settings(name, tmp_path / "stopped", encoder, "train.save_every=8", *GAN)
    with interrupted_after(steps):
        train(load("recon", None, overrides))
    again = Run(train(load("recon", None, overrides)).parent)
    assert_identical(weights_of(whole), weights_of(again))
    own = [load_file(run.folder / "model" / "space.safetensors") for run in (whole, again)]
    assert_identical(*own)


def test_one_discriminator_accompanies_all_stages(tmp_path, encoder, fake_discriminator):
    log = Run(train(load("recon", None, settings("vfm_vae", tmp_path, encoder, *GAN))).parent).read_log()
    seen = [key.split(".")[0] for record in log for key in record if key.endswith("discriminator.loss")]
    assert seen == ["warm"] + ["align"] * 3 + ["relax"] * 3 + ["refine"] * 3


def test_the_balance_is_the_ratio_of_two_gradients():
    """Pictures a w above black: d rec / d w = mean of a = 1. The term 3 w: 3."""
    settings_ = load("recon", None, ["recon.perceptual.name=none", "recon.adversarial.weight=0"]).recon
    loss = PictureLoss(settings_of(settings_), 0, torch.device("cpu"), None, ())
    w, a = torch.nn.Parameter(torch.tensor([2.0])), torch.tensor([0.5, 1.5]).view(1, 2, 1, 1)
    drawn = w * a
    loss.begin("parts")
    loss.drawing(drawn, torch.zeros_like(drawn), rng(1), 0, w)
    assert loss.balance("vf", (3 * w).sum(), drawn, w) == 0, "the first step only measures"
    loss.end(lambda x: x)
    assert_close(loss.adaptive["vf"].double(), torch.tensor(1.0 / 3).double(), rtol=1e-5, atol=0)


def test_the_encoder_is_untouched_by_align_and_latents_by_refine(tmp_path, encoder):
    """Hashes of every checkpoint of a run with weight decay, twelve steps in three stages."""
    overrides = settings("aligntok", tmp_path, encoder, "train.save_every=8", "train.keep=20")
    run = Run(train(load("recon", None, overrides)).parent)
    found = []
    for folder in run.checkpoints():
        state = load_file(folder / "model.safetensors")
        parts = {part: {k: v for k, v in state.items() if f"tune.parts/{part}." in k} for part in
                 ("encoder", "adapter", "decoder")}  # fmt: skip
        found.append({part: sha256_of(tensors) for part, tensors in parts.items()})
    assert len(found) == 12
    assert len({step["encoder"] for step in found[:4]}) == 1 and len({step["adapter"] for step in found[:4]}) == 4
    pretrained = {f"tune.parts/encoder.{k}": v for k, v in DINOv2.tiny(registers=0).encoder.state_dict().items()}
    assert found[0]["encoder"] == sha256_of(pretrained)
    assert len({step["encoder"] for step in found[3:8]}) == 5
    assert len({(step["encoder"], step["adapter"]) for step in found[7:]}) == 1
    assert len({step["decoder"] for step in found}) == 12


def test_micro_batches_train_like_one_large_batch(tmp_path, encoder):
    """A step in every stage; more of them would measure how rounding grows."""
    one, two = (
        weights_of(Run(train(load("recon", None, settings("aligntok", tmp_path / str(n), encoder,
                                                          f"train.accumulate={n}", "train.images=24"))).parent))
        for n in (1, 2)
    )  # fmt: skip
    for key in (k for k in one if k.startswith("model/")):
        assert_close(one[key], two[key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, encoder):
    overrides = settings("aligntok", tmp_path / "one", encoder, "train.images=24")
    one = weights_of(Run(train(load("recon", None, overrides)).parent))
    overrides = settings("aligntok", tmp_path / "two", encoder, "train.images=24")
    done = launch(2, "train", "--task", "recon", *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    two = weights_of(Run(tmp_path / "two" / "aligntok"))
    for key in (k for k in one if k.startswith("model/")):
        assert_close(one[key], two[key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_a_generator_learns_on_a_trained_space_and_carries_it_along(tmp_path, encoder):
    run = train(load("recon", None, settings("svg", tmp_path, encoder))).parent
    gen = train(load("gen", None, [*gen_settings(tmp_path, "svg", run), f"cache.dir={tmp_path / 'cache'}"]))
    model, before = umm.load(gen), umm.load(run).space.encode(pictures(3, 16))
    assert torch.equal(model.space.encode(pictures(3, 16)), before)
    drawn = model.sample(num=3)
    assert drawn.shape == (3, 3, 16, 16)
    meta = json.loads((tmp_path / "cache" / "train" / "meta.json").read_text())
    assert model.space.identity()["weights"] in json.dumps(meta)
    for file in run.glob("model/*"):
        file.unlink()
    assert torch.equal(umm.load(gen).space.encode(pictures(3, 16)), before), "its folder needs no other"


def test_other_statistics_can_be_asked_of_a_trained_space(tmp_path, encoder):
    run = train(load("recon", None, settings("svg", tmp_path, encoder))).parent
    for mode, fitted in (("channel", True), ("position", False)):
        overrides = [*gen_settings(tmp_path, "svg", run), f"latent.normalizer={mode}"]
        space = find("latents", "svg").from_config(load("gen", None, overrides).latent)
        assert space.normalizer.mode == mode and bool(space.normalizer.fitted) is fitted


def test_an_untrained_space_can_do_nothing_but_be_trained(tmp_path, encoder):
    overrides = [s for s in settings("svg", tmp_path, encoder) if not s.startswith("recon.")]
    for task in ("gen", "und"):
        with pytest.raises(ConfigError, match=r"svg has networks to train: umm train --task recon latent.name=svg"):
            train(load(task, None, [*overrides, f"run={tmp_path / task}"]))
    cached = load("recon", None, settings("svg", tmp_path, encoder, f"cache.dir={tmp_path / 'cache'}"))
    for ask in (train, lambda config: cache_command(config, "train", verify=False)):
        with pytest.raises(ConfigError, match="cannot be cached, they are trained now"):
            ask(cached)
    assert not (tmp_path / "cache").exists()


def test_what_does_not_fit_is_one_sentence(tmp_path, encoder):
    with pytest.raises(MissingWeights, match=r"latent.weights=nowhere is no finished run"):
        train(load("gen", None, gen_settings(tmp_path, "svg", "nowhere")))
    run = train(load("recon", None, settings("svg", tmp_path, encoder))).parent
    with pytest.raises(ConfigError, match=r"holds latent.name=svg latent.image_size=16, asked for are aligntok and 16"):
        train(load("gen", None, gen_settings(tmp_path / "another", "aligntok", run)))
    for number, (setting, said) in enumerate({
        "recon.decoder.size=S": "set latent.decoder instead",
        "latent.encoder.name=svg": "is no frozen encoder",
    }.items()):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            train(load("recon", None, settings("svg", tmp_path / str(number), encoder, setting)))
    for name, said in (("aligntok", "an encoder that stays as it is"), ("vfm_vae", "set latent.equivariance=0, or")):
        with pytest.raises(ConfigError, match=said):
            train(load("recon", None, settings(name, tmp_path, encoder, *SEEN)))


def test_vfm_vae_is_compared_by_its_encoder_where_pictures_keep_their_size(tmp_path, encoder):
    run = train(load("recon", None, settings("vfm_vae", tmp_path, encoder, *SEEN, "latent.equivariance=0")))
    assert Run(run.parent).read_log()[-1]["refine.parts.perceptual"] > 0


def test_settings_that_would_not_be_heard_are_refused(tmp_path, encoder):
    some = PretrainedSettings(layers=[0])
    assert SVG.tiny(tokens="raw", encoder=some)
    for space in (SVG, VFMVAE):
        with pytest.raises(ConfigError, match=r"latent\.encoder\.layers=\[0\] would not be heard"):
            space.tiny(encoder=some)
    run = train(load("recon", None, settings("svg", tmp_path, encoder))).parent
    for setting in ("channels=5", "scalars=batch", "tokens=raw", "encoder.encoder_size=56", "decoder.width=4"):
        with pytest.raises(ConfigError, match=rf"latent\.{setting} is not what .* has, .*: leave it out"):
            train(load("gen", None, [*gen_settings(tmp_path, "svg", run), f"latent.{setting}"]))
    space = find("latents", "svg").from_config(
        load("gen", None, [*gen_settings(tmp_path, "svg", run), "latent.channels=4", "latent.encode_batch=3"]).latent
    )
    assert space.residual.head[-1].out_features == 4


# ------------------------------------------------------------------------------------------------------- the sphere


def test_on_the_sphere_a_space_learns_to_draw_what_it_is_given_in_use(tmp_path, encoder, monkeypatch):
    """Lengths are lost there: a decoder that learned with them would draw worse without."""
    config = load("recon", None, settings("aligntok", tmp_path, encoder, "latent.normalizer=sphere"))
    space, seen = find("latents", "aligntok").from_config(config.latent), []
    task, images = Tokenizer(config, space, None), pictures(4, 16)
    monkeypatch.setattr(AlignTok, "draw", lambda self, raw: seen.append(raw.detach()) or self.decoder(raw))
    for stage in task.stages:
        stage.begin("parts")
        stage.loss("parts", {"image": images}, rng(), 0)
    task.student.decode(task.student.encode(images))
    assert (task.student.raw(images) - seen[0]).abs().max() > 0.1
    for drawn_from in seen[:-1]:
        assert_close(drawn_from, seen[-1])


def test_a_frozen_space_still_trains_the_rae_decoder():
    space = find("latents", "fakes.space").tiny()
    overrides = ["recon.decoder.size=custom", "recon.decoder.width=16", "recon.decoder.depth=1"]
    overrides += ["recon.decoder.heads=2", "recon.decoder.mlp=32", "recon.perceptual.name=none"]
    overrides += ["recon.adversarial.weight=0", "latent.name=fakes.space", "data.name=fakes.pictures"]
    assert type(Recon(load("recon", None, overrides), space, None)) is Recon
