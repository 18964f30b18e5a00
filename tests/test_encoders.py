"""Frozen encoders as latent spaces, each against its own library's forward pass."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

import umm
from umm.errors import ConfigError, MissingWeights, UnknownName
from umm.latents._encoder import FrozenEncoder
from umm.latents.clip import CLIP
from umm.latents.dinov2 import DINOv2
from umm.latents.dinov3 import DINOv3
from umm.latents.mae import MAE
from umm.latents.siglip2 import SigLIP2
from umm.latents.timm import TimmViT
from umm.pretrained import families_of, sha256_of_values
from umm.rng import generator, seeded_init

SPACES = {"dinov2": DINOv2, "dinov3": DINOv3, "siglip2": SigLIP2, "clip": CLIP, "mae": MAE, "timm": TimmViT}
PREFIX = {"dinov2": 5, "dinov3": 5, "siglip2": 0, "clip": 1, "mae": 1, "timm": 1}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SMALL | {"patch_size": 16, "image_size": 32}
TEXT = SMALL | {"vocab_size": 20, "max_position_embeddings": 8}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
EXACT = {"rtol": 0, "atol": 1e-5}

every = pytest.mark.parametrize("name", SPACES)


def images(size: int = 64, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=generator("images"))


def pixels(space: FrozenEncoder, x: torch.Tensor) -> torch.Tensor:
    """Standardised by hand, for pictures of the size the encoder sees."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (space.spec.pixel_mean, space.spec.pixel_std))
    return (x - mean) / std


def blocks_of(space: FrozenEncoder) -> torch.nn.ModuleList:
    return space.encoder.blocks if isinstance(space, TimmViT) else space._stack


def seen_by_the_library(name: str, space: FrozenEncoder, x: torch.Tensor):
    """Outputs of all blocks and of the whole in the library's own forward pass."""
    hidden: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda m, i, output: hidden.append(output)) for block in blocks_of(space)]
    arguments = {"interpolate_pos_encoding": True} if name in ("siglip2", "clip", "mae") else {}
    if name == "mae":
        arguments["noise"] = torch.arange(space.spec.tokens).float().expand(len(x), -1)
    with torch.no_grad():
        whole = space.encoder(pixels(space, x), **arguments)
    for handle in handles:
        handle.remove()
    return hidden, whole


def as_grid(tokens: torch.Tensor) -> torch.Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def native(name: str, side: int = 64, **changes) -> FrozenEncoder:
    """A space that need not resize its pictures."""
    return SPACES[name].tiny(image_size=56 if name == "dinov2" else side, **changes)


# --------------------------------------------------------------------------------------------------------- latents


@every
@pytest.mark.parametrize("side", [32, 64])  # the position table's own size, and one it must be resized to
def test_one_layer_is_rae_the_normed_patch_tokens_of_the_librarys_last_block(name, side):
    space = native(name, side)
    hidden, _ = seen_by_the_library(name, space, images(space.encoder_size))
    tokens = hidden[-1][:, PREFIX[name] :]
    centred = tokens - tokens.mean(-1, keepdim=True)
    expected = centred / (tokens.var(-1, False, keepdim=True) + space.eps).sqrt()
    assert_close(space.raw(images(space.spec.image_size)), as_grid(expected), **EXACT)


@every
def test_several_layers_are_each_normed_and_averaged(name):
    space = native(name, layers=(0, 1))
    x = images(space.spec.image_size)
    hidden, _ = seen_by_the_library(name, space, x)
    normed = [F.layer_norm(h[:, PREFIX[name] :], (32,), eps=space.eps) for h in hidden]
    assert_close(space.raw(x), as_grid((normed[0] + normed[1]) / 2), **EXACT)


@every
def test_several_layers_of_which_there_is_one_are_rae(name):
    """RAEv2 with K = 1: the mean over one layer, without the mean token, is that layer bit for bit."""
    for layer in (0, 1):
        space = native(name, layers=(layer,))
        x = images(space.spec.image_size)
        tokens = space.blocks(space._pixels(x), [layer])[0][:, PREFIX[name] :]
        assert torch.equal(space.raw(x), as_grid(F.layer_norm(tokens, (32,), eps=space.eps)))


def test_the_order_in_which_layers_are_named_only_chooses_the_mean_token():
    x = images()
    assert torch.equal(DINOv3.tiny(layers=(0, 1)).raw(x), DINOv3.tiny(layers=(1, 0)).raw(x))
    plain, added = DINOv3.tiny(layers=(0, 1)), DINOv3.tiny(layers=(0, 1), mean_token=True)
    last = DINOv3.tiny(layers=(1,)).raw(x)
    assert_close(added.raw(x), plain.raw(x) + last.mean((2, 3), keepdim=True), **EXACT)
    assert "mean_token" not in plain.identity() and added.identity()["mean_token"] is True


@every
def test_blocks_above_the_highest_layer_do_not_run(name):
    space = SPACES[name].tiny(layers=(0,))
    before = space.raw(images())
    blocks_of(space)[1].forward = lambda *a, **k: pytest.fail("an unused block ran")
    assert torch.equal(space.raw(images()), before)


def test_mae_masks_nothing_and_keeps_the_patches_in_order():
    """The library shuffles even when it keeps all patches; put back in order they are ours."""
    space = MAE.tiny()
    noise = torch.rand(2, space.spec.tokens, generator=generator("noise"))
    whole = space.encoder(pixels(space, images()), noise=noise, interpolate_pos_encoding=True)
    assert whole.mask.sum() == 0 and not torch.equal(whole.ids_restore[0], torch.arange(16))
    index = whole.ids_restore[..., None].expand(-1, -1, 32)
    ordered = whole.last_hidden_state[:, 1:].gather(1, index)
    assert_close(space.features(images()).patches, ordered, **EXACT)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_float32_latents(name, dtype):
    space = SPACES[name].tiny()
    exact = space.raw(images())
    with torch.autocast("cpu", dtype=dtype):
        rough = space.raw(images())
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05


@every
def test_it_stays_frozen_and_in_eval_mode_yet_pictures_get_gradients(name):
    space = SPACES[name].tiny().train()
    assert not any(module.training for module in space.modules())
    assert not any(p.requires_grad for p in space.parameters())
    x = images().requires_grad_()
    space.raw(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


@every
def test_one_token_stands_for_sixteen_pixels_unless_told_otherwise(name):
    patch = 14 if name == "dinov2" else 16
    space = SPACES[name].tiny(image_size=128)
    assert (space.encoder_size, space.spec.shape) == (8 * patch, (32, 8, 8))
    space = SPACES[name].tiny(image_size=64, encoder_size=2 * patch)
    assert space.raw(images()).shape == (2, 32, 2, 2)
    with pytest.raises(ConfigError, match=f"multiple of {patch}"):
        SPACES[name].tiny(image_size=64, encoder_size=patch + 1)


# -------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip2", "mae"])
def test_features_are_what_the_library_gives_with_the_affine_norm(name):
    space = native(name)
    norm = next(m for n, m in space.network.named_modules() if n in ("layernorm", "norm", "post_layernorm"))
    torch.nn.init.normal_(norm.weight, generator=generator("affine"))
    x = images(space.spec.image_size)
    hidden, whole = seen_by_the_library(name, space, x)
    found = space.features(x)
    assert_close(found.patches, whole.last_hidden_state[:, PREFIX[name] :], **EXACT)
    vector = whole.pooler_output if name == "siglip2" else whole.last_hidden_state[:, 0]
    assert_close(found.cls, vector, **EXACT)
    first, last = space.features(x, layers=(0, 1))
    assert_close(last.patches, found.patches, **EXACT)
    assert_close(first.patches, norm(hidden[0])[:, PREFIX[name] :], **EXACT)


def test_clips_final_norm_is_applied_to_patches_too():
    space = CLIP.tiny()
    torch.nn.init.normal_(space.network.post_layernorm.weight, generator=generator("affine"))
    _, whole = seen_by_the_library("clip", space, images())
    assert_close(space.features(images()).cls, whole.pooler_output, **EXACT)
    normed = space.network.post_layernorm(whole.last_hidden_state)
    assert_close(space.features(images()).patches, normed[:, 1:], **EXACT)


def test_siglip_without_its_pooling_head_has_no_vector():
    space = SigLIP2.tiny()
    del space.network.head
    assert space.features(images()).cls is None


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("vit_base_patch16_siglip_224", 0),
        ("vit_small_patch16_dinov3", 5),
        ("vit_base_patch32_clip_224", 1),
        ("eva02_tiny_patch14_224", 1),
        ("beit_base_patch16_224", 1),
        ("vit_base_patch16_rpn_224", 0),
        ("vit_small_patch14_reg4_dinov2", 5),
    ],
)
def test_timm_vits_of_many_kinds_give_what_timm_gives(model, prefix):
    space = TimmViT.tiny(model=model, image_size=64)
    found, x = space.features(images()), space._pixels(images())
    with torch.no_grad():
        whole = space.encoder.forward_features(x)
        vector = space.encoder.forward_head(whole, pre_logits=True)
    assert space.prefix == prefix
    assert_close(found.patches, whole[:, prefix:], **EXACT)
    assert_close(found.cls, vector, **EXACT)
    last = space.encoder.forward_intermediates(x, indices=[1], norm=False, intermediates_only=True)[0]
    expected = F.layer_norm(last.permute(0, 2, 3, 1), (32,), eps=space.eps).permute(0, 3, 1, 2)
    assert_close(space.raw(images()), expected, **EXACT)


# ------------------------------------------------------------------------------------------- loading and identity


def whole_models() -> dict[str, torch.nn.Module]:
    """What the hub's repositories of these encoders hold: the encoder and networks beside it."""
    with seeded_init("whole models"):
        return {
            "clip": CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
            "siglip2": SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
            "mae": ViTMAEForPreTraining(ViTMAEConfig(**VISION, **DECODER)),
        }


def from_folder(name: str, folder, **changes) -> FrozenEncoder:
    space = umm.find("latents", name)
    return space.from_config(space.Config(weights=str(folder), image_size=64, **changes))


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip2", "clip", "mae"])
def test_a_local_folder_gives_its_weights_and_pixel_statistics(name, tmp_path):
    made = SPACES[name].tiny()
    made.encoder.save_pretrained(tmp_path)
    assert from_folder(name, tmp_path).spec.pixel_mean == made.spec.pixel_mean, "its own where no file says others"
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    space = from_folder(name, tmp_path, layers=[0, 1], normalizer="channel")
    assert space.spec.pixel_mean == (0.1, 0.2, 0.3) and space.spec.pixel_std == (0.4, 0.5, 0.6)
    assert space.layers == (0, 1) and space.normalizer.mode == "channel"
    assert space.identity()["weights"] == made.identity()["weights"]


@pytest.mark.parametrize("name", ["siglip2", "clip", "mae"])
def test_networks_beside_the_encoder_are_left_in_the_file(name, tmp_path):
    whole = whole_models()[name]
    whole.save_pretrained(tmp_path)
    inside = whole.vit if name == "mae" else whole.vision_model
    space = from_folder(name, tmp_path, layers=[-1])
    expected = SPACES[name](inside, 64, pixel_mean=space.spec.pixel_mean, pixel_std=space.spec.pixel_std)
    assert torch.equal(space.raw(images()), expected.raw(images()))
    assert not [key for key in space.state_dict() if "text" in key or "decoder" in key]
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"surplus": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(MissingWeights, match="surplus"):
        from_folder(name, tmp_path)


def test_other_models_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))  # NaFlex
    with pytest.raises(MissingWeights, match="'siglip2' model, not one of siglip"):
        from_folder("siglip2", tmp_path)
    for name in ("dinov3", "clip", "mae", "siglip2"):
        with pytest.raises(MissingWeights, match="asset:dinov2-small-saliency"):
            from_folder(name, "no/such-repository")


@every
def test_the_identity_changes_with_whatever_changes_the_latents_and_with_nothing_else(name):
    base, space = SPACES[name].tiny().identity(), SPACES[name].tiny(normalizer="none")
    assert base["space"] == name and space.identity() == base
    assert SPACES[name].tiny(layers=(0,)).identity() != base
    assert SPACES[name].tiny(encoder_size=28 if name == "dinov2" else 32).identity() != base
    norm = space.final_norm(torch.ones(1, 17, 32))
    latents = space.raw(images())
    for key, value in space.network.state_dict().items():
        if key.startswith(("norm.", "layernorm.", "post_layernorm.")):
            value.add_(1)
    assert torch.equal(space.raw(images()), latents)
    assert not torch.equal(space.final_norm(torch.ones(1, 17, 32)), norm)
    assert SPACES[name](space.encoder, 64).identity()["weights"] == base["weights"]
    next(blocks_of(space)[0].parameters()).data.add_(1e-3)
    assert SPACES[name](space.encoder, 64).identity()["weights"] != base["weights"]


def test_a_digest_of_values_knows_numbers_and_not_names():
    a, b = torch.arange(6.0), torch.ones(2, 3)
    digest = sha256_of_values([a, b])
    assert sha256_of_values([b, a]) == digest
    assert len({digest, sha256_of_values([a]), sha256_of_values([a, b + 1e-7]), sha256_of_values([a, b.T])}) == 4


def test_a_folder_in_timms_layout_is_loaded(tmp_path):
    made = TimmViT.tiny()
    facts = {"architecture": made.architecture, "num_classes": 0, "num_features": 32, "model_args": {
        "img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}}  # fmt: skip
    facts["pretrained_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "tag": "mine", "num_classes": 0}
    facts["pretrained_cfg"] |= {"input_size": [3, 64, 64], "first_conv": "patch_embed.proj", "classifier": "head"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    save_file(made.encoder.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    space = from_folder("timm", tmp_path, layers=[0, 1])
    assert space.identity()["weights"] == made.identity()["weights"]
    assert space.spec.pixel_mean == (0.1, 0.2, 0.3) and space.layers == (0, 1)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(MissingWeights, match=r"timm model .* cannot be loaded"):
        from_folder("timm", tmp_path)


def test_what_is_no_plain_vit_is_refused():
    with pytest.raises(UnknownName, match=r"no model 'vit_bass_patch16_224'.*Did you mean"):
        from_folder("timm", "vit_bass_patch16_224")
    for model in ("resnet18", "swin_tiny_patch4_window7_224"):
        with pytest.raises(ConfigError, match="is no plain ViT"):
            TimmViT(timm.create_model(model, num_classes=0), 224)


def test_a_name_tells_whose_features_they_are():
    assert families_of("vit_base_patch14_reg4_dinov2.lvd142m") == ("dinov2",)
    assert families_of("vit_base_patch16_clip_224.openai_ft_in1k") == ("clip", "vit")
    assert families_of("vit_base_patch16_224.mae") == ("mae",)
    assert families_of("vit_base_patch16_224.augreg2_in21k_ft_in1k") == ("vit",)
    assert {name: space.tiny().families for name, space in SPACES.items()} == {
        **{name: (name,) for name in SPACES},
        "timm": ("vit",),
    }
