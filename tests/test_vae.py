"""Convolutional VAEs as a latent space, against diffusers, and trained from scratch."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import umm
from umm.config import load
from umm.errors import ConfigError, MissingWeights, UmmError
from umm.latents.vae import VAE, build, picture_noise, published
from umm.losses import kl_normal
from umm.rng import PictureRNG, generator, seeded_init
from umm.runs import Run
from umm.settings import VAESettings
from umm.train import train

diffusers = pytest.importorskip("diffusers")

KINDS = {  # what the published ones say of their latents' scale
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}
every = pytest.mark.parametrize("kind", KINDS)


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=generator("images"))


def network(kind: str = "sd", **changes) -> torch.nn.Module:
    quant = {} if kind in ("sd", "sdxl") else {"use_quant_conv": False, "use_post_quant_conv": False}
    levels = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
    levels |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with seeded_init("vae", kind):
        net = diffusers.AutoencoderKL(**levels, **quant, **KINDS[kind], **changes)
    return net.requires_grad_(False).eval()  # some kernels round otherwise for weights with gradients


def space_of(net: torch.nn.Module, **changes) -> VAE:
    return VAE(VAESettings(image_size=32, **changes), net)


def saved(folder, kind: str = "sd"):
    network(kind).save_pretrained(folder)
    return folder


def from_folder(folder, **changes) -> VAE:
    return VAE.from_config(VAESettings(weights=str(folder), image_size=32, **changes))


# --------------------------------------------------------------------------------------------------- equal to diffusers


@every
@torch.no_grad()
def test_latents_are_what_diffusers_gives(kind):
    """Bit for bit in the VAE's units; standardised as its pipelines do it."""
    net, space = network(kind), space_of(network(kind))
    dist = net.encode(2 * images() - 1).latent_dist
    assert space.spec.shape == (KINDS[kind]["latent_channels"], 4, 4) and space.spec.patch == 8
    assert torch.equal(space.raw(images()), dist.mode())
    assert torch.equal(space.posterior(images())[1], dist.logvar)
    expected = (dist.mode() - (net.config.shift_factor or 0)) * net.config.scaling_factor
    assert_close(space.encode(images()), expected, rtol=1e-6, atol=1e-7)


@every
@torch.no_grad()
def test_pictures_are_what_diffusers_draws(kind):
    net, space = network(kind), space_of(network(kind))
    z = torch.randn(2, *space.spec.shape, generator=generator("z"))
    assert torch.equal(space.draw(z), net.decode(z).sample / 2 + 0.5)
    raw = z / net.config.scaling_factor + (net.config.shift_factor or 0)
    assert_close(space.decode(z), net.decode(raw).sample / 2 + 0.5, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_published_numbers_a_channel_are_taken_where_a_network_has_them():
    mean, std = [0.5, -1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]
    net = network(latents_mean=mean, latents_std=std)
    space = space_of(net, normalizer="channel")
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
    expected = (net.encode(2 * images() - 1).latent_dist.mode() - mean) / std * 0.18215
    assert space.normalizer.fitted
    assert_close(space.encode(images()), expected, rtol=1e-5, atol=1e-6)
    assert published(network().config, "channel") is None
    assert not space_of(network(), normalizer="channel").normalizer.fitted, "to be measured"


@torch.no_grad()
def test_a_posterior_sample_is_asked_for_and_belongs_to_its_picture():
    space = space_of(network(), posterior="sample")
    mean, logvar = space.posterior(images())
    noise = picture_noise(images(), space.spec.shape)
    assert torch.equal(space.raw(images()), mean + (0.5 * logvar).exp() * noise)
    assert torch.equal(picture_noise(images().flip(0), space.spec.shape), noise.flip(0))
    many = picture_noise(images(200, side=4), (16,))
    assert abs(float(many.mean())) < 0.06 and float(many.std()) == pytest.approx(1, abs=0.05)
    assert space.identity() != space_of(network()).identity()


@torch.no_grad()
def test_features_are_the_last_hidden_grid_and_the_mean():
    net, space = network(), space_of(network())
    hidden, mean = space.features(images(), layers=(0, 1))
    x = net.encoder.conv_in(2 * images() - 1)
    for block in net.encoder.down_blocks:
        x = block(x)
    assert_close(hidden.patches, net.encoder.mid_block(x).flatten(2).transpose(1, 2))
    assert torch.equal(mean.patches, space.raw(images()).flatten(2).transpose(1, 2))
    assert mean.cls is None
    with pytest.raises(ConfigError, match="2: use 0 to 1"):
        space.features(images(), layers=(2, 5, 8, 11))


# -------------------------------------------------------------------------------------------------- loading, identity


@torch.no_grad()
def test_a_folder_is_loaded_also_as_a_part_of_a_pipeline(tmp_path):
    expected = space_of(network("sd3")).encode(images())
    assert torch.equal(from_folder(saved(tmp_path / "own", "sd3")).encode(images()), expected)
    saved(tmp_path / "pipeline" / "vae", "sd3")
    space = from_folder(tmp_path / "pipeline", subfolder="vae")
    assert torch.equal(space.encode(images()), expected)
    assert not space.stages and not any(p.requires_grad for p in space.parameters())
    with pytest.raises(MissingWeights, match=r"latent\.subfolder=vae"):
        from_folder(tmp_path / "pipeline")


def test_the_identity_is_the_encoders_and_not_the_decoders(tmp_path):
    base = space_of(network()).identity()
    other = network()
    other.decoder.conv_out.bias.data += 1
    assert space_of(other).identity() == base
    other = network()
    other.quant_conv.bias.data += 1
    assert space_of(other).identity()["weights"] != base["weights"]


def test_broken_folders_are_missing_weights_not_tracebacks(tmp_path):
    folder = saved(tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(MissingWeights, match="cannot be read"):
        from_folder(folder)
    save_file({k: v for k, v in tensors.items() if k != "quant_conv.bias"}, file, metadata={"format": "pt"})
    with pytest.raises(MissingWeights, match=r"quant_conv\.bias"):
        from_folder(folder)
    (folder / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(MissingWeights, match="AutoencoderDC, not an AutoencoderKL"):
        from_folder(folder)
    with pytest.raises(MissingWeights, match="cannot be had from the hub"):
        from_folder("no/such-repository")


def test_settings_that_would_not_be_heard_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"latent.widths is for a VAE trained here"):
        from_folder(saved(tmp_path), widths=[8, 8])
    with pytest.raises(ConfigError, match="no multiple of the 8 pixels"):
        VAE.tiny(image_size=36)


def test_without_diffusers_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UmmError, match="pip install diffusers"):
        build(4, [8], 1)


# ----------------------------------------------------------------------------------------------------------- training


def test_in_training_the_latent_is_a_draw_and_the_kl_is_that_of_the_posterior():
    student = VAE.tiny(image_size=32).student(0)
    rng, seen = PictureRNG(range(2), "test"), []
    lesson = student.lesson(student.stages[0], images(), rng, lambda z: seen.append(z) or z)
    mean, logvar = student.posterior(images())
    assert_close(seen[0], mean + (logvar / 2).exp() * rng.fork("posterior").randn(*student.spec.shape))
    weight, kl = lesson.terms["kl"]
    assert weight == 1e-6
    assert_close(kl, kl_normal(mean, logvar))
    expected = student.network.encode(2 * images() - 1).latent_dist.kl().mean()
    assert_close(kl, expected)
    lesson.pictures.sum().backward()
    assert all(p.grad is not None for p in student.network.decoder.parameters())


SETTINGS = """
    data.name=fakes.pictures latent.name=vae latent.image_size=16 latent.widths=[8,16] recon.noise=0
    recon.perceptual.name=none recon.adversarial.weight=0 recon.optim.warmup=0 recon.optim.lr=3e-3 recon.ema=0.9
    train.images=960 train.batch_size=16 train.workers=0 train.log_every=10 train.save_every=960
    train.sample_every=960 train.device=cpu
""".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "run"
    return train(load("recon", None, [*SETTINGS, f"run={folder}"])).parent


@pytest.mark.parametrize(("widths", "groups"), [((32, 64), 8), ((128, 256, 512), 32), ((18, 18), 2), ((2, 4), 1)])
def test_norms_are_over_groups_of_channels(widths, groups):
    """With a group for each channel, training stayed at the mean picture."""
    norms = [m for m in build(4, widths, 1).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}


def test_a_small_vae_learns_from_scratch_and_is_loaded_as_a_latent_space(trained):
    model, log = umm.load(trained), Run(trained).read_log()
    space = VAE.from_config(VAESettings(weights=str(trained), image_size=16))
    x = images(4, side=16)
    assert not space.stages and space.normalizer.fitted
    assert torch.equal(space.encode(x), model.encode(x))
    l1 = [row[key] for row in (log[0], log[-1]) for key in row if key.endswith(".l1")]
    assert l1[-1] < 0.85 * l1[0]
    assert space.identity() != VAE.tiny(image_size=16, widths=[8, 16]).identity()


def test_a_vae_in_training_is_no_encoder_to_compare_pictures_by(tmp_path):
    overrides = [f"run={tmp_path}" if s == "recon.perceptual.name=none" else s for s in SETTINGS]
    with pytest.raises(ConfigError, match="an encoder that stays as it is, and this space has none"):
        train(load("recon", None, [*overrides, "recon.perceptual.name=encoder", "recon.perceptual.layers=[0]"]))


def test_a_generator_reads_a_vae_that_was_trained_here(trained, tmp_path):
    dit = "gen.dit.size=custom gen.dit.width=32 gen.dit.depth=2 gen.dit.heads=2 gen.dit.head_depth=0 gen.dit.patch=2"
    text = f"""
        run={tmp_path / "gen"} data.name=fakes.pictures latent.name=vae latent.weights={trained} latent.image_size=16
        cache.dir={tmp_path / "cache"} {dit} gen.optim.warmup=0 train.images=32 train.batch_size=8 train.workers=0
        train.device=cpu eval.sampler.steps=2
    """
    run = train(load("gen", None, text.split())).parent
    assert umm.load(run).sample(num=2).shape == (2, 3, 16, 16)
