from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file

from umm import assets
from umm.discriminator import (
    AUGMENTS,
    Dinov2ViT,
    Discriminator,
    TimmViT,
    diff_augment,
    families_of,
    frozen_vit,
    quantize,
    translate,
)
from umm.errors import ConfigError, MissingWeights, UnknownName
from umm.rng import PictureRNG, seeded_init
from umm.settings import AdversarialSettings


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def tiny_vit(**changes) -> torch.nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 1, "num_classes": 0} | changes
    with seeded_init("vit"):
        return timm.create_model("vit_small_patch8_224.dino", act_layer="gelu_tanh", **sizes)


def tiny(**changes) -> Discriminator:
    with seeded_init("discriminator"):
        return Discriminator(TimmViT(tiny_vit(**changes), [0, 2], ["dino"]), input_size=32)


@pytest.fixture(scope="module")
def published() -> Discriminator:
    """The published layout on random weights."""
    with seeded_init("discriminator"):
        vit = timm.create_model("vit_small_patch8_224.dino", num_classes=0, act_layer="gelu_tanh")
        return Discriminator(TimmViT(vit, [2, 5, 8, 11], ["dino"]), input_size=224).eval()


def test_the_published_layout_has_the_published_counts(published):
    assert sum(p.numel() for p in published.parameters()) == 7_386_245
    assert len(published.state_dict()) == 80
    assert published.families == ("dino",)


def test_the_published_layout_gives_3920_logits_and_repeats_the_final_block(published):
    with torch.no_grad():
        maps = published.features(draw(2, 3, 256, 256))
        logits = published(draw(2, 3, 256, 256))
    assert logits.shape == (2, 3920)
    assert [tuple(m.shape) for m in maps] == [(2, 784, 384)] * 5
    assert torch.equal(maps[0], maps[-1]) and not torch.equal(maps[1], maps[2])


def test_logits_of_a_picture_do_not_depend_on_its_batch():
    network, images = tiny().eval().double(), draw(4, 3, 48, 48).double()
    torch.testing.assert_close(network(images)[2:3], network(images[2:3]))


def test_taps_are_the_outputs_of_their_blocks():
    vit, images = tiny_vit(), draw(2, 3, 32, 32)
    seen = {}
    for index, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out[:, 1:]}))
    maps = TimmViT(vit, [0, 1])(images)
    for got, want in zip(maps, (seen[2], seen[0], seen[1]), strict=True):
        assert torch.equal(got, want)


def test_the_bias_of_the_keys_does_not_matter():
    """The published code zeroes it: that would change nothing."""
    vit, images = tiny_vit(), draw(1, 3, 32, 32)
    torch.nn.init.normal_(vit.blocks[0].attn.qkv.bias, generator=torch.Generator().manual_seed(0))
    zeroed = copy.deepcopy(vit)
    with torch.no_grad():
        zeroed.blocks[0].attn.qkv.bias[64:128] = 0
        got, want = TimmViT(vit, [0])(images), TimmViT(zeroed, [0])(images)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_vit_is_frozen_and_unsaved_but_moves_along():
    network = tiny().train()
    images = draw(2, 3, 32, 32).requires_grad_(True)
    network(images).sum().backward()
    vit = network._vit[0]
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in vit.parameters()) and not vit.network.training
    assert all(p.grad is not None for p in network.parameters())
    assert all(name.startswith("heads.") for name in network.state_dict())
    network.double()
    assert {p.dtype for p in vit.parameters()} == {torch.float64}


def test_a_saved_state_gives_the_same_logits():
    first, second = tiny(), tiny()
    first.train()(draw(2, 3, 32, 32))  # a power iteration moves the buffers
    second.load_state_dict(first.state_dict())
    images = draw(2, 3, 32, 32, seed=1)
    assert torch.equal(first.eval()(images), second.eval()(images))


def test_power_iterations_happen_in_training_only():
    network = tiny().eval()
    before = copy.deepcopy(network.state_dict())
    network(draw(1, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.train()(draw(1, 3, 32, 32))
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_convolutions_have_spectral_norm_one():
    convolution = tiny().eval().heads[0][1].f[0]
    largest = torch.linalg.matrix_norm(convolution.weight.flatten(1), ord=2)
    assert largest.item() == pytest.approx(1, abs=0.05)


def test_tokens_are_normalised_over_one_picture():
    norm = tiny().heads[0][0][1]
    out = norm(5 * torch.randn(3, 64, 50, generator=torch.Generator().manual_seed(0)) + 2)
    torch.testing.assert_close(out.mean(2), torch.zeros(3, 64), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(2, correction=0), torch.ones(3, 64), rtol=0, atol=1e-4)


def test_impossible_settings_are_sentences(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="multiple of 8, not 30"):
        Discriminator(TimmViT(tiny_vit(), [0]), input_size=30)
    with pytest.raises(ConfigError, match="blocks 0 to 2"):
        TimmViT(tiny_vit(), [0, 3])
    with pytest.raises(UnknownName, match=r"timm has no model 'vit_smal_patch8_224.dino'"):
        frozen_vit("hub:vit_smal_patch8_224.dino", [0], 224)
    with pytest.raises(MissingWeights, match="no file"):
        frozen_vit(str(tmp_path / "none.pth"), [0], 32)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth"):
        with pytest.raises(MissingWeights, match="not the checkpoint of a plain timm ViT"):
            frozen_vit(str(tmp_path / name), [0], 32)


def test_weights_that_cannot_be_had_are_a_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(MissingWeights, match=r"no connection.*asset:dinov2-small-saliency"):
        frozen_vit("hub:vit_small_patch8_224.dino", [0], 224)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_local_checkpoint_loads_at_its_own_and_at_another_size(tmp_path, suffix):
    vit, file = tiny_vit(), tmp_path / f"dino_tiny.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(vit.state_dict(), file)
    images = draw(1, 3, 32, 32)
    loaded = frozen_vit(str(file), [0, 2], 32)
    torch.testing.assert_close(loaded(images), TimmViT(vit, [0, 2])(images))
    config = AdversarialSettings(backbone=str(file), taps=[0, 2], input_size=48)
    network = Discriminator.from_config(config)
    assert network(images).shape == (1, 3 * 36)
    assert network.families == ("dino",)


def test_families_tell_dino_from_dinov2():
    assert families_of("vit_small_patch8_224.dino") == ("dino",)
    assert families_of("dinov2-small-saliency") == ("dinov2",)
    assert families_of("my_net.pth") == ("my_net.pth",)


def test_a_transformers_dinov2_gives_its_blocks_without_cls():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14)
    with seeded_init("dinov2"):
        model = Dinov2Model(config).eval()
        network = Discriminator(Dinov2ViT(model, [0]), input_size=28)
    images = draw(2, 3, 28, 28)
    assert network.features(images)[1].shape == (2, 4, 32)
    x = (0.5 * images + 0.5 - network._vit[0].mean) / network._vit[0].std
    # the model's own final norm, applied to the final block, is its output
    torch.testing.assert_close(model.layernorm(network.features(images)[0]), model(x).last_hidden_state[:, 1:])


def test_the_offline_backbone_judges_pictures():
    assets.path("dinov2-small-saliency")
    config = AdversarialSettings(backbone="asset:dinov2-small-saliency", input_size=56)
    with seeded_init("discriminator"):
        network = Discriminator.from_config(config).eval()
    with torch.no_grad():
        assert network(draw(2, 3, 64, 64)).shape == (2, 5 * 16)
    assert network.families == ("dinov2",)


# --------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("policy", [["translation"], ["color"], ["translation", "color"]])
def test_augmentation_belongs_to_the_picture_and_lets_gradients_through(policy):
    images = draw(3, 3, 16, 16).requires_grad_(True)
    whole = diff_augment(images, PictureRNG([4, 5, 6], 0, "real"), policy)
    alone = diff_augment(images[2:], PictureRNG([6], 0, "real"), policy)
    other = diff_augment(images, PictureRNG([4, 5, 6], 0, "fake"), policy)
    torch.testing.assert_close(whole[2:], alone)
    assert not torch.allclose(whole, other)
    whole.sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_an_empty_policy_changes_nothing_and_an_unknown_one_is_refused():
    images = draw(2, 3, 8, 8)
    assert diff_augment(images, PictureRNG([0, 1]), []) is images
    with pytest.raises(ConfigError, match="no augmentation is called 'colour'"):
        diff_augment(images, PictureRNG([0, 1]), ["colour"])


def test_translation_moves_whole_pixels_up_to_an_eighth_and_fills_with_zeros():
    images = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(64, 3, 16, 16)
    moved = translate(images, PictureRNG(range(64)))
    shifts = set()
    for picture in moved[:, 0]:
        row, column = divmod(int(picture[8, 8]) - 1, 16)
        dy, dx = 8 - row, 8 - column
        shifts.add((dy, dx))
        want = torch.zeros(16, 16)
        want[max(dy, 0) : 16 + min(dy, 0), max(dx, 0) : 16 + min(dx, 0)] = images[0, 0][
            max(-dy, 0) : 16 - max(dy, 0), max(-dx, 0) : 16 - max(dx, 0)
        ]
        assert torch.equal(picture, want)
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == {-2, -1, 0, 1, 2}


def test_colour_jitter_keeps_to_its_ranges():
    images = draw(500, 3, 8, 8) + torch.tensor([0.3, 0.0, -0.3]).view(3, 1, 1)
    out = AUGMENTS["color"](images, PictureRNG(range(500)))
    brightness = out.mean((1, 2, 3)) - images.mean((1, 2, 3))  # saturation and contrast keep the mean
    assert -0.5 <= brightness.min() < -0.45 and 0.45 < brightness.max() <= 0.5

    def spread(x):
        gray = x.mean(1)
        return gray.flatten(1).std(1)

    contrast = spread(out) / spread(images)  # saturation keeps the grey picture
    assert 0.499 < contrast.min() < 0.55 and 1.45 < contrast.max() < 1.501
    color = (out - out.mean(1, keepdim=True)).flatten(1).norm(dim=1)
    saturation = color / (images - images.mean(1, keepdim=True)).flatten(1).norm(dim=1) / contrast
    assert saturation.min() < 0.1 and 1.9 < saturation.max() < 2.001


def test_quantized_images_are_bytes_between_minus_one_and_one():
    images = 1.5 * draw(2, 3, 8, 8)
    out = quantize(images)
    levels = (out + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert out.min() == -1 and out.max() == 1
    assert (out - images.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6
