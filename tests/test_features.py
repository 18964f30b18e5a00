"""Feature addresses, what they read, and the cache that keeps it."""

from __future__ import annotations

import pytest
import torch

from umm.errors import DataError, MissingHead, StaleCache, UmmError, UnknownName
from umm.feature_cache import Extraction, FeatureSet
from umm.features import open_reader, parse, pixel_tokens, randomised
from umm.heads.dit import DiT
from umm.latents.dinov2 import DINOv2
from umm.shards import shard_folder, write_json

CPU = torch.device("cpu")


@pytest.fixture
def shades(monkeypatch, tmp_path):
    """A source of pictures by settings; the cache is in a folder of the test."""
    from fakes.shades import Config, Shades

    monkeypatch.setenv("UMM_CACHE", str(tmp_path / "cache"))
    return lambda split="train", **changes: Shades(Config(**changes), split)


@pytest.fixture(scope="module")
def space():
    made = DINOv2.tiny(image_size=64)
    made.normalizer.mean.normal_(generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture(scope="module")
def batch(space):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return {"image": images, "latent": space.raw(images), "label": torch.arange(3), "id": ["x", "y", "z"]}


def read(text, space, batch, dit=None):
    return open_reader(parse(text), space, dit).read(batch)


# ---------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("text", ["latent", "cls", "patch-mean@3", "cls+patch-mean@-2", "trunk:8@0.1", "random:cls@1"])
def test_an_address_keeps_its_text(text):
    assert parse(text).text == text


def test_a_trunks_address_has_block_time_and_label():
    found = parse("trunk:-2@.25+label")
    assert (found.kind, found.block, found.time, found.labelled) == ("trunk", -2, 0.25, True)
    assert parse("random:trunk:0@1").random and not parse("trunk:0@1").labelled


@pytest.mark.parametrize("text", ["latnt", "trunk:8", "trunk:1@1.5", "random:pixels", "random:random:cls", "cls@", ""])
def test_what_is_no_address_is_refused_by_name(text):
    with pytest.raises(UnknownName, match=r"no feature is called|times lie in|random counterpart"):
        parse(text)


def test_a_typing_error_gets_the_nearest_name():
    with pytest.raises(UnknownName, match="Did you mean 'patch-mean'"):
        parse("patch-meen")


# ------------------------------------------------------------------------------------------------------------ readers


def test_the_latent_is_read_standardised_token_by_token(space, batch):
    tokens = read("latent", space, batch)
    assert torch.equal(tokens[:, 1], space.encode(batch["image"])[:, :, 0, 1])
    without_cache = {key: value for key, value in batch.items() if key != "latent"}
    torch.testing.assert_close(read("latent", space, without_cache), tokens)


def test_encoder_addresses_are_the_encoders_own_features(space, batch):
    last, first = space.features(batch["image"]), space.features(batch["image"], (0,))[0]
    assert torch.equal(read("cls", space, batch), last.cls)
    assert torch.equal(read("cls@0", space, batch), first.cls)
    assert torch.equal(read("patches@-2", space, batch), first.patches)
    both = read("cls+patch-mean", space, batch)
    torch.testing.assert_close(both, torch.cat([last.cls, last.patches.mean(1)], 1))


def test_the_published_readings_are_slices_of_one_vector(batch):
    from transformers import Dinov2Config, Dinov2Model

    shape = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    deep = DINOv2(Dinov2Model(Dinov2Config(**shape)).eval(), 64)
    reader = open_reader(parse("published"), deep)
    vector, blocks = reader.read(batch), deep.features(batch["image"], (-1, -2, -3, -4))
    readings = {k: torch.cat([vector[:, s] for s in parts], 1) for k, parts in reader.variants(5 * 32).items()}
    torch.testing.assert_close(readings["1 block"], blocks[0].cls)
    torch.testing.assert_close(readings["4 blocks"], torch.cat([b.cls for b in blocks], 1))
    with_mean = torch.cat([blocks[0].cls, blocks[0].patches.mean(1)], 1)
    torch.testing.assert_close(readings["1 block + mean patch"], with_mean)
    assert readings["4 blocks + mean patch"].shape[1] == 5 * 32


def test_a_block_that_is_not_there_is_refused(space, batch):
    with pytest.raises(UmmError, match="encoder that has 2"):
        read("cls@7", space, batch)
    with pytest.raises(UmmError, match="blocks 0 to 1"):
        read("trunk:5@0", space, batch, DiT.tiny(space.spec))


def test_a_space_without_cls_says_what_to_use(batch):
    from fakes.space import Config, Patches

    with pytest.raises(UmmError, match="no CLS token: use patch-mean"):
        read("cls", Patches(Config(image_size=64)), batch)


def test_a_trunk_reads_the_null_label_and_its_own_noise(space, batch):
    dit = DiT.tiny(space.spec, num_classes=10)
    z = space.normalizer(batch["latent"])
    torch.testing.assert_close(read("trunk:1@0", space, batch, dit), dit.features(z, 0.0, 1))
    noisy = read("trunk:1@0.5", space, batch, dit)
    alone = {key: value[2:] for key, value in batch.items()}
    torch.testing.assert_close(read("trunk:1@0.5", space, alone, dit), noisy[2:])
    assert not torch.allclose(noisy, dit.features(z, 0.5, 1))


def test_a_trunk_fed_with_labels_is_flagged_and_differs(space, batch):
    dit = DiT.tiny(space.spec, num_classes=10)
    fed = open_reader(parse("trunk:1@0+label"), space, dit)
    assert "WARNING" in fed.notes[0] and "leave out +label" in fed.notes[0]
    torch.testing.assert_close(fed.read(batch), dit.features(space.normalizer(batch["latent"]), 0.0, 1, batch["label"]))
    assert "learned from class labels" in open_reader(parse("trunk:1@0"), space, dit).notes[0]
    unconditional = DiT.tiny(space.spec, num_classes=0)
    assert open_reader(parse("trunk:1@0"), space, unconditional).notes == []
    with pytest.raises(UmmError, match="no label to feed"):
        open_reader(parse("trunk:1@0+label"), space, unconditional)


def test_a_trunk_needs_a_run(space):
    with pytest.raises(MissingHead, match="umm train --task gen"):
        open_reader(parse("trunk:1@0"), space)


def test_random_weights_keep_each_tensors_moments_and_nothing_else(space, batch):
    fresh = randomised(space.encoder, seed=0)
    for (name, old), new in zip(space.encoder.named_parameters(), fresh.parameters()):
        if old.numel() > 1000:
            assert not torch.allclose(old, new), name
            assert float(new.std()) == pytest.approx(float(old.std()), rel=0.15)
    assert not torch.allclose(read("random:cls", space, batch), read("cls", space, batch))
    assert torch.equal(read("random:cls", space, batch), read("random:cls", space, batch))


def test_pixels_are_area_means_in_the_grid_of_the_latent():
    images = torch.rand(2, 3, 64, 64)
    tokens = pixel_tokens(images, 4)  # 4 x 4 tokens of 8 x 8 pixels
    assert tokens.shape == (2, 16, 8 * 8 * 3)
    torch.testing.assert_close(tokens[:, 0, :3], images[:, :, :2, :2].mean((2, 3)))


class Eye:
    """Someone's own encoder."""

    def encode(self, images):
        return images.flatten(2).transpose(1, 2)[:, :5]


class Blind:
    def encode(self, images):
        return images.mean((2, 3))


def test_an_own_encoder_goes_by_its_import_path(space, batch):
    assert read(f"{__name__}:Eye", space, batch).shape == (3, 5, 3)
    with pytest.raises(UmmError, match=r"must return \(B, N, D\), got \(3, 3\)"):
        read(f"{__name__}:Blind", space, batch)
    with pytest.raises(UnknownName, match="cannot be imported"):
        read(f"{__name__}:Nobody", space, batch)
    with pytest.raises(UmmError, match=r"has no encode\(images\)"):
        read("math:pi", space, batch)


# -------------------------------------------------------------------------------------------------------------- cache


def extraction(source, space, text="latent", tokens=True, dtype="float32"):
    return Extraction(open_reader(parse(text), space), space, source, source.identity(), tokens, dtype)


@pytest.fixture
def patches():
    from fakes.space import Config, Patches

    return Patches(Config())


def test_kept_features_are_the_read_ones_with_labels_ids_and_masks(shades, patches):
    source = shades(limit=20)
    found = extraction(source, patches).open(CPU, batch_size=6, workers=0)
    items = [source[i] for i in range(20)]
    images = torch.stack([item["image"] for item in items]).float() / 255
    rows = torch.tensor([17, 3])
    expected = patches.encode(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.tokens(rows), expected[rows])
    torch.testing.assert_close(found.vectors(), expected.mean(1))
    assert found.labels.tolist() == [item["label"] for item in items] and found.ids == list(source.ids)
    assert torch.equal(found.masks(rows), torch.stack([items[17]["mask"], items[3]["mask"]]))


def test_pictures_are_read_once(shades, patches, monkeypatch):
    source = shades(limit=20)
    first = extraction(source, patches).open(CPU, 8, 0).vectors()
    monkeypatch.setattr(type(source), "load", lambda *_: pytest.fail("a picture was read"))
    assert torch.equal(extraction(source, patches).open(CPU, 8, 0).vectors(), first)


def test_an_interrupted_extraction_goes_on_with_its_shards(shades, patches, monkeypatch):
    monkeypatch.setattr("umm.feature_cache.SHARD", 8)
    source, calls = shades(limit=20), []
    whole = extraction(shades("val", limit=20), patches).open(CPU, 4, 0).vectors()
    original = Extraction.arrays

    def stop(self, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Extraction, "arrays", stop)
    made = extraction(source, patches)
    with pytest.raises(KeyboardInterrupt):
        made.open(CPU, 4, 0)
    assert shard_folder(made.folder, 0).exists() and not shard_folder(made.folder, 1).exists()
    monkeypatch.setattr(Extraction, "arrays", lambda self, batch: calls.append(2) or original(self, batch))
    found = extraction(source, patches).open(CPU, 4, 0)
    assert calls.count(2) == 3 and len(found) == 20 and len(whole) == 20


def test_other_weights_pictures_dtypes_or_addresses_have_other_folders(shades, patches):
    from fakes.space import Config, Patches

    base = extraction(shades(), patches).folder
    others = [
        extraction(shades(), Patches(Config(channels=13))),
        extraction(shades(limit=10), patches),
        extraction(shades("val"), patches),
        extraction(shades(), patches, dtype="float16"),
        extraction(shades(), patches, text="patch-mean"),
        extraction(shades(), patches, tokens=False),
    ]
    patches.normalizer.mean += 1
    others.append(extraction(shades(), patches))
    assert len({base, *(other.folder for other in others)}) == len(others) + 1


def test_the_final_norm_is_part_of_an_encoder_features_key(shades):
    space = DINOv2.tiny(image_size=64)
    before = extraction(shades(image_size=64), space, "cls", tokens=False).folder
    with torch.no_grad():
        space.encoder.layernorm.bias += 1
    assert extraction(shades(image_size=64), space, "cls", tokens=False).folder != before
    assert "layernorm" not in str(space.identity()), "the latents do not read it, so their identity need not have it"


def test_a_folder_with_other_contents_than_its_name_is_refused(shades, patches):
    made = extraction(shades(limit=6), patches)
    made.open(CPU, 8, 0)
    write_json(made.folder / "meta.json", {**FeatureSet(made.folder).meta, "facts": {"format": 0}})
    with pytest.raises(StaleCache, match="delete it"):
        extraction(shades(limit=6), patches).open(CPU, 8, 0)


def test_pictures_without_labels_name_the_setting(shades, patches):
    with pytest.raises(DataError, match=r"no labels.*data\.columns"):
        extraction(shades(labels=False), patches).open(CPU, 8, 0)


def test_cached_latents_are_not_copied(shades, patches, tmp_path):
    from umm.cache import build
    from umm.settings import CacheSettings

    source = shades(limit=12)
    cached = build(source, patches, CacheSettings(dtype="float32"), tmp_path / "latents")
    made = Extraction(open_reader(parse("latent"), patches), patches, cached, source.identity(), True, "float32")
    found, direct = made.open(CPU, 8, 0), extraction(source, patches).open(CPU, 8, 0)
    assert not (shard_folder(made.folder, 0) / "tokens.npy").exists()
    rows = torch.arange(12)
    torch.testing.assert_close(found.tokens(rows), direct.tokens(rows))
    assert torch.equal(found.masks(rows), direct.masks(rows))
