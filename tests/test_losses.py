from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from umm import assets, losses
from umm.errors import ConfigError, MissingWeights, UmmError
from umm.rng import PictureRNG, seeded_init
from umm.settings import PerceptualSettings


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("law, mean", [("uniform", 0.4), ("half_normal", 0.8 * math.sqrt(2 / math.pi))])
def test_one_noise_level_a_picture_follows_its_law(law, mean):
    rng = PictureRNG(range(2000), 0, "noise")
    noise = losses.augment_noise(torch.zeros(2000, 16, 4, 4), 0.8, rng, law)
    sigma = noise.flatten(1).std(1)
    assert sigma.mean().item() == pytest.approx(mean, abs=0.03)
    assert (sigma.max() < 0.95) == (law == "uniform")


def test_noise_belongs_to_the_picture_and_not_to_the_batch():
    raw = draw(3, 2, 4, 4)
    whole = losses.augment_noise(raw, 0.8, PictureRNG([5, 6, 7], 1))
    alone = losses.augment_noise(raw[2:], 0.8, PictureRNG([7], 1))
    assert torch.equal(whole[2:], alone)
    assert losses.augment_noise(raw, 0.0, PictureRNG([5, 6, 7], 1)) is raw


def test_pixel_losses_have_their_textbook_values():
    fake, real = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
    assert losses.l1(fake, real).item() == 0.75
    assert losses.l2(fake, real).item() == 0.625


def test_feature_distance_is_twice_one_minus_the_cosine():
    f, g = draw(2, 5, 7, seed=1) - 0.5, draw(2, 5, 7, seed=2) - 0.5
    want = 2 * (1 - torch.cosine_similarity(f, g, dim=-1)).mean()
    torch.testing.assert_close(losses.feature_distance([f], [g], dim=-1), want)
    torch.testing.assert_close(losses.feature_distance([3 * f, f], [g, f], dim=-1), want / 2)


def test_feature_distance_has_finite_gradients_at_zero_features():
    f = torch.zeros(1, 4, 3, requires_grad=True)
    losses.feature_distance([f], [draw(1, 4, 3)], dim=-1).backward()
    assert f.grad.isfinite().all()


def test_the_judges_distance_grows_with_damage_and_trains_only_the_fake():
    with seeded_init("judge"):
        judge = losses.JudgeLoss(timm.create_model("tf_efficientnet_lite0")).train()
    assert not judge.network.training and judge.families == ("efficientnet",)
    real, noise = draw(2, 3, 64, 64), draw(2, 3, 64, 64, seed=1) - 0.5
    fake = (real + 0.1 * noise).requires_grad_(True)
    near, far = judge(fake, real), judge(real + 0.5 * noise, real)
    assert judge(real, real).item() == 0
    assert 0 < near < far
    near.backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters())


def test_the_pretrained_judge_recognises_a_photograph():
    data = pytest.importorskip("skimage.data")
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :, 60:360] / 255
    cat = nn.functional.interpolate(cat, (224, 224), mode="bilinear", antialias=True)
    network = losses.efficientnet_lite0()
    with torch.no_grad():
        best = network(2 * cat - 1).topk(3).indices[0].tolist()
    assert set(best) & {281, 282, 283, 284, 285}  # ImageNet's domestic cats


def test_encoder_distance_uses_the_named_blocks_and_refuses_an_encoder_without_gradients():
    seen = []

    def features(images, layers):
        seen.append(layers)
        return [SimpleNamespace(patches=2 * images.flatten(2).transpose(1, 2)) for _ in layers]

    loss = losses.EncoderLoss(features, [2, 5], ["dinov2"])
    real, fake = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1).requires_grad_(True)
    assert loss.families == ("dinov2",)
    want = losses.feature_distance([fake.flatten(2)], [real.flatten(2)], dim=1)
    torch.testing.assert_close(loss(fake, real), want)
    assert seen == [(2, 5), (2, 5)]
    blind = losses.EncoderLoss(torch.no_grad()(features), [2], ["dinov2"])
    with pytest.raises(UmmError, match="stops gradients"):
        blind(fake, real)


def test_lpips_without_weights_says_what_to_do_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"vgg16-.*put the file there"):
        losses.build_perceptual(PerceptualSettings(name="lpips-vgg"))
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.filterwarnings("ignore:.*weight.*")
def test_lpips_reads_torchvisions_weights_and_pictures_from_zero_to_one(tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips")
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    with seeded_init("alex"):
        alexnet = models.alexnet()
    weights = tmp_path / "hub" / "checkpoints" / models.AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(alexnet.state_dict(), weights)
    # torchvision compares the hash in the file's name only while downloading
    loss = losses.build_perceptual(PerceptualSettings(name="lpips-alex"))
    fake, real = draw(2, 3, 64, 64, seed=1), draw(2, 3, 64, 64)
    reference = lpips.LPIPS(net="alex", verbose=False)
    torch.testing.assert_close(loss(fake, real), reference(fake, real, normalize=True).mean())
    assert loss.families == ("alex",) and not any(p.requires_grad for p in loss.parameters())


def test_perceptual_settings_choose_the_loss():
    assert losses.build_perceptual(PerceptualSettings(name="none")) is None
    assert losses.build_perceptual(PerceptualSettings(name="judge", weight=0.0)) is None
    with pytest.raises(ConfigError, match="choose judge"):
        losses.build_perceptual(PerceptualSettings(name="encoder"))
    chosen = losses.build_perceptual(PerceptualSettings(name="encoder", layers=[1]), lambda x, layers: [], ["dinov2"])
    assert isinstance(chosen, losses.EncoderLoss) and chosen.layers == (1,)


def test_a_judge_file_of_another_network_is_refused(tmp_path, monkeypatch):
    torch.save({"one": torch.zeros(1)}, tmp_path / "weights.pth")
    monkeypatch.setattr(assets, "path", lambda name: tmp_path / "weights.pth")
    with pytest.raises(ValueError):
        losses.efficientnet_lite0()


def test_hinge_losses_have_their_textbook_values():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert losses.hinge_discriminator(real, fake).item() == 0.5 * (0.5 + 1.0)
    assert losses.hinge_generator(fake).item() == 1.0


def test_the_adaptive_weight_balances_gradients_at_the_last_layer():
    layer = nn.Linear(4, 4)
    out = layer(draw(3, 4))
    rec, gan = out.square().mean(), -0.01 * out.mean()
    grads = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in (rec, gan)]
    weight = losses.adaptive_weight(*grads)
    torch.testing.assert_close((weight * grads[1]).norm(), grads[0].norm(), rtol=1e-3, atol=0)
    assert not weight.requires_grad


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_adaptive_weight_stays_within_its_bounds(rec, gan):
    weight = losses.adaptive_weight(torch.tensor([rec]), torch.tensor([gan])).item()
    assert weight == pytest.approx(min(rec / (gan + 1e-6), 1e4), rel=1e-4, abs=1e-12)
