"""The latent cache: what is stored, what interrupts it, and what it refuses."""

from __future__ import annotations

import errno
import itertools
import json
import pickle
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from umm import cache as cache_module
from umm import shards
from umm.cache import LatentCache, build, cache_key, key_facts
from umm.data.base import DataSource, Question, collate
from umm.errors import ConfigError, DataError, NonFinite, StaleCache, UmmError
from umm.latents.base import LatentSpace, LatentSpec, Normalizer, RunningStats
from umm.rng import generator
from umm.settings import CacheSettings

SIDE, COUNT = 16, 22  # with shards of 8: 8, 8, 6


class Pictures(DataSource):
    """Random pictures with everything a source can have."""

    split, image_size, classes = "train", SIDE, ["even", "odd"]

    def __init__(self, count: int = COUNT, version: int = 1, without: tuple[str, ...] = (), streaming: bool = False):
        self.count, self.version, self.without, self.streaming = count, version, without, streaming
        self.first_loaded: int | None = None

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a stream has no length")
        return self.count

    def load(self, index, generator=None):
        if self.first_loaded is None:
            self.first_loaded = index
        return self.item(index)

    def item(self, index: int) -> dict:
        rng = generator("pictures", self.version, index)
        item = {
            "image": torch.randint(256, (3, SIDE, SIDE), generator=rng, dtype=torch.uint8),
            "id": f"p/{index}-ü",
            "label": index % 2,
            "mask": torch.randint(5, (SIDE, SIDE), generator=rng),
            "caption": f"picture {index}\nline two",
            "questions": [Question("how many?", str(index), "count", (str(index), "many"))] * (index % 3),
        }
        return {key: value for key, value in item.items() if key not in self.without}

    def stream(self, start=0):
        for index in range(start, self.count):
            yield self.load(index)

    def identity(self):
        return {"name": "pictures", "version": self.version, "image_size": self.image_size, "split": self.split}


class Projection(LatentSpace):
    """A fixed random projection of 4 px patches: latents (6, 4, 4)."""

    def __init__(self, weights: str = "a", layers: tuple[int, ...] = (-1,), scale: float = 1.0, image_size: int = SIDE):
        super().__init__()
        self.spec = LatentSpec(6, 4, 4, image_size)
        self.normalizer = Normalizer(self.spec.shape)
        self.weights, self.layers, self.scale, self.calls = weights, layers, scale, 0
        self.register_buffer("matrix", torch.randn(6, 48, generator=generator(weights)))

    def raw(self, images):
        self.calls += 1
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, 4, 4, 48)
        return (patches @ self.matrix.T * self.scale).permute(0, 3, 1, 2)  # (B, 6, 4, 4)

    def identity(self):
        return {"weights": self.weights, "layers": self.layers, "resize": "bicubic"}


SETTINGS = CacheSettings(dtype="float32", shard_size=8)


def make(folder: Path, source=None, space=None, settings=SETTINGS, **how) -> LatentCache | None:
    source = Pictures() if source is None else source  # an empty source is false
    return build(source, space or Projection(), settings, folder, **{"batch_size": 3, **how})


def raw(index: int, mirror: bool = False) -> torch.Tensor:
    image = Pictures().item(index)["image"]
    return Projection().raw((image.flip(-1) if mirror else image)[None].float() / 255)[0]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stop_after(pictures: int):
    def progress(done, total):
        if done >= pictures:
            raise KeyboardInterrupt

    return progress


# -------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_stored_latents_are_the_raw_ones_to_the_storage_precision(tmp_path, dtype, tolerance):
    cache = make(tmp_path, settings=replace(SETTINGS, dtype=dtype))
    for index in range(COUNT):
        want = Projection().raw(torch.stack([Pictures().item(i)["image"] for i in block(index)]).float() / 255)
        latent = cache[index]["latent"]
        assert latent.dtype == torch.float32
        torch.testing.assert_close(latent, want[index - block(index)[0]], rtol=tolerance, atol=0)


def block(index: int) -> range:
    """The encoder batch of three that picture `index` was in: equality to the last bit needs the same batch."""
    shard, row = divmod(index, 8)
    first = shard * 8 + row // 3 * 3
    return range(first, min(first + 3, shard * 8 + 8, COUNT))


def test_bfloat16_comes_back_as_torch_rounds_it(tmp_path):
    exact, rounded = make(tmp_path / "a"), make(tmp_path / "b", settings=replace(SETTINGS, dtype="bfloat16"))
    want = exact.batch(range(COUNT))["latent"].bfloat16().float()
    assert torch.equal(rounded.batch(range(COUNT))["latent"], want)


def test_everything_else_of_an_item_comes_back_unchanged(tmp_path):
    cache, source = make(tmp_path), Pictures()
    assert len(cache) == COUNT and cache.classes == source.classes and cache.split == "train"
    assert cache.spec == Projection().spec and cache.image_size == SIDE
    for index in range(COUNT):
        got, want = cache[index], source.item(index)
        got.pop("latent")
        assert set(got) == set(want)
        for key, value in want.items():
            assert torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value, key
        assert got["mask"].dtype == torch.int64 and type(got["label"]) is int


@pytest.mark.parametrize("flip", [False, True])
def test_statistics_equal_a_direct_float64_computation(tmp_path, flip):
    cache = make(tmp_path, settings=replace(SETTINGS, flip=flip, dtype="bfloat16"))
    latents = [raw(i, mirror) for i in range(COUNT) for mirror in ([False, True] if flip else [False])]
    z = torch.stack(latents).double()
    assert cache.stats.count == len(z)
    torch.testing.assert_close(cache.stats.mean, z.mean(0), rtol=1e-6, atol=1e-7)  # float32 sums in other batches
    torch.testing.assert_close(cache.stats.var, z.var(0, correction=0), rtol=1e-5, atol=1e-9)


def test_statistics_of_the_same_latents_agree_to_float64_rounding(tmp_path):
    cache = make(tmp_path)
    z = cache.batch(range(COUNT))["latent"].double()
    torch.testing.assert_close(cache.stats.mean, z.mean(0), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(cache.stats.var, z.var(0, correction=0), rtol=1e-12, atol=1e-14)
    assert Normalizer(cache.spec.shape).fit(cache.stats).fitted


def test_mirrored_pictures_have_their_own_latents(tmp_path):
    cache = make(tmp_path, settings=replace(SETTINGS, flip=True))
    batch = cache.batch([5, 20], flips=[True, False])
    torch.testing.assert_close(batch["latent"], torch.stack([raw(5, mirror=True), raw(20)]))
    assert torch.equal(batch["image"][0], Pictures().item(5)["image"].flip(-1))
    assert torch.equal(batch["mask"][0], Pictures().item(5)["mask"].flip(-1))
    assert torch.equal(batch["image"][1], Pictures().item(20)["image"])
    draws = [bool(torch.equal(cache.load(5, generator(i))["latent"], batch["latent"][0])) for i in range(20)]
    assert 0 < sum(draws) < 20


def test_a_mirrored_latent_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StaleCache, match=r"cache\.flip=true"):
        make(tmp_path).batch([0], flips=[True])


@pytest.mark.parametrize("without", [("label",), ("mask", "questions", "caption"), ("label", "mask", "caption")])
def test_sources_may_lack_labels_masks_and_words(tmp_path, without):
    cache = make(tmp_path, Pictures(without=without))
    assert not set(without) & (set(cache[3]) | set(cache.batch([0, 9])))


def test_without_pictures_nothing_but_the_image_is_lost(tmp_path):
    cache = make(tmp_path, settings=replace(SETTINGS, pictures=False))
    assert set(Pictures().item(0)) - set(cache[0]) == {"image"}
    assert not list(tmp_path.rglob("images.npy"))


def test_an_empty_split_is_an_empty_cache(tmp_path):
    cache = make(tmp_path, Pictures(0))
    assert len(cache) == 0 and cache.stats.count == 0
    assert cache.select("latent").batch([])["latent"].shape == (0, 6, 4, 4)
    with pytest.raises(UmmError, match="not one latent"):
        _ = cache.stats.var


# --------------------------------------------------------------------------------------------------------- reading


def test_a_batch_keeps_the_order_it_was_asked_in(tmp_path):
    cache = make(tmp_path)
    indices = [21, 0, 8, 7, 0, -1]
    batch = cache.batch(indices)
    assert batch["label"].tolist() == [1, 0, 0, 1, 0, 1]
    assert batch["id"] == [Pictures().item(i % COUNT)["id"] for i in indices]
    for row, index in enumerate(indices):
        torch.testing.assert_close(batch["latent"][row], raw(index % COUNT))
    with pytest.raises(IndexError, match="22"):
        cache.batch([22])


def test_only_selected_fields_are_given_and_read(tmp_path):
    cache = make(tmp_path)
    part = cache.select("latent", "label")
    assert set(part.batch([1, 2])) == {"latent", "label"} and set(part[0]) == {"latent", "label"}
    assert {file for _, file in part._maps} == {"latents.npy", "labels.npy"}
    with pytest.raises(DataError, match="Did you mean 'image'"):
        cache.select("imag")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_reads_it_like_any_source_in_other_processes_too(tmp_path, workers):
    cache = make(tmp_path)
    cache.batch([0])  # maps that must not be sent to the worker
    context = "spawn" if workers else None
    loader = DataLoader(cache, 8, collate_fn=collate, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    assert [len(b["latent"]) for b in batches] == [8, 8, 6]
    assert torch.equal(torch.cat([b["latent"] for b in batches]), cache.batch(range(COUNT))["latent"])
    assert torch.cat([b["label"] for b in batches]).tolist() == [i % 2 for i in range(COUNT)]


def test_a_pickled_cache_is_small_and_reads_the_same(tmp_path):
    cache = make(tmp_path)
    cache.batch(range(COUNT))
    data = pickle.dumps(cache)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data)[9]["latent"], cache[9]["latent"])


def test_reading_keeps_no_file_open_and_never_changes_it(tmp_path):
    cache = make(tmp_path)
    before = contents(tmp_path)
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    count = len(list(descriptors.iterdir()))
    cache.batch(range(COUNT))["latent"].zero_()
    cache._map(0, "latents.npy").zero_()
    assert len(list(descriptors.iterdir())) <= count
    assert contents(tmp_path) == before


def test_threads_may_share_a_cache(tmp_path):
    cache, results = make(tmp_path), {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: cache.batch(range(COUNT))})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i]["latent"], results[0]["latent"]) for i in range(4))


# --------------------------------------------------------------------------------------------- interruption, sharing


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stop", [1, 8, 11, 22])
def test_an_interrupted_build_resumes_to_the_same_bytes(tmp_path, stop, streaming):
    make(tmp_path / "whole", Pictures(streaming=streaming))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", Pictures(streaming=streaming), progress=stop_after(stop))
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    source = Pictures(streaming=streaming)
    make(tmp_path / "cut", source)
    assert source.first_loaded == (stop - 1) // 8 * 8  # the first shard that was not whole
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_a_killed_process_left_behind_is_cleared(tmp_path):
    make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", progress=stop_after(9))
    half = tmp_path / "cut/shards/00001.tmp"
    half.mkdir()
    (half / "latents.npy").write_bytes(b"half a shard")
    make(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_complete_cache_is_opened_without_encoding(tmp_path):
    make(tmp_path)
    space = Projection()
    assert len(make(tmp_path, space=space)) == COUNT and space.calls == 0


def test_a_complete_cache_is_opened_without_writing(tmp_path):
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / ".lock0").unlink()
    assert len(make(tmp_path)) == COUNT
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path.name != ".lock0"]  # nothing was written


def test_a_resumed_build_keeps_the_shard_size_it_was_begun_with(tmp_path):
    make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", progress=stop_after(9))
    make(tmp_path / "cut", settings=replace(SETTINGS, shard_size=5))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (4, 3, 2, 1, 0)])
@pytest.mark.parametrize("count", [22, 24, 5])
def test_several_processes_write_what_one_does(tmp_path, order, count, streaming):
    make(tmp_path / "one", Pictures(count, streaming=streaming))
    shared = [
        make(tmp_path / "many", Pictures(count, streaming=streaming), process_index=i, num_processes=len(order))
        for i in order
    ]
    if not streaming:
        assert shared[-1] is not None
    # a stream's end is known to the processes that reach it: ask once more after the barrier, as a second run would
    assert make(tmp_path / "many", Pictures(count, streaming=streaming)) is not None
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_process_that_is_done_first_does_not_claim_the_cache_is_complete(tmp_path):
    assert make(tmp_path, process_index=0, num_processes=2) is None
    with pytest.raises(DataError, match=r"incomplete \(2 shards so far\): run the umm cache command"):
        LatentCache.open(tmp_path)
    assert len(make(tmp_path, process_index=1, num_processes=2)) == COUNT


def test_a_second_build_waits_for_the_first(tmp_path):
    entered, results = threading.Event(), []

    def slow(done, total):
        entered.set()
        while not waiting.is_set():
            waiting.wait(0.01)

    waiting = threading.Event()
    first = threading.Thread(target=lambda: results.append(make(tmp_path, progress=slow)))
    first.start()
    entered.wait(10)
    threading.Timer(0.2, waiting.set).start()
    space = Projection()
    with pytest.warns(UserWarning, match="another process is making"):
        make(tmp_path, space=space)
    first.join()
    assert space.calls == 0 and len(results[0]) == COUNT


def test_worker_processes_write_what_one_process_does(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "two", workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("streaming, total", [(False, COUNT), (True, None)])
def test_progress_counts_pictures_and_starts_where_the_build_was_cut(tmp_path, streaming, total):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Pictures(streaming=streaming), progress=stop_after(9))
    calls = []
    make(tmp_path, Pictures(streaming=streaming), progress=lambda *call: calls.append(call))
    assert calls == [(done, total) for done in (11, 14, 16, 19, 22)]


# -------------------------------------------------------------------------------------------------------- refusals

CHANGES = {
    "latent.weights": (Pictures(), Projection("b"), SETTINGS),
    "latent.layers": (Pictures(), Projection(layers=(-2, -1)), SETTINGS),
    "data.version": (Pictures(version=2), Projection(), SETTINGS),
    "cache.dtype": (Pictures(), Projection(), replace(SETTINGS, dtype="float16")),
    "cache.flip": (Pictures(), Projection(), replace(SETTINGS, flip=True)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_made_with_something_else_is_refused_by_name(tmp_path, name):
    make(tmp_path)
    before = contents(tmp_path)
    source, space, settings = CHANGES[name]
    facts = key_facts(source, space, settings)
    assert cache_key(facts) != cache_key(key_facts(Pictures(), Projection(), SETTINGS))
    for attempt in (lambda: LatentCache.open(tmp_path, facts), lambda: build(source, space, settings, tmp_path)):
        with pytest.raises(StaleCache, match=rf"was made with {name} = .*, this run asks for .*: set cache\.dir") as e:
            attempt()
        assert str(tmp_path) in str(e.value)
    assert contents(tmp_path) == before


def test_the_message_gives_the_old_and_the_new_value(tmp_path):
    make(tmp_path)
    with pytest.raises(StaleCache, match=r'cache\.dtype = "float32", this run asks for "bfloat16"'):
        make(tmp_path, settings=replace(SETTINGS, dtype="bfloat16"))


def test_another_image_size_or_crop_is_refused(tmp_path, monkeypatch):
    make(tmp_path)
    larger = Pictures()
    larger.image_size = 32
    with pytest.raises(StaleCache, match=r"data\.image_size = 16, this run asks for 32"):
        make(tmp_path, larger, Projection(image_size=32))
    facts = key_facts(Pictures(), Projection(), SETTINGS)
    with pytest.raises(StaleCache, match=r'crop = "center", this run asks for "random"'):
        LatentCache.open(tmp_path, facts | {"crop": "random"})
    with pytest.raises(StaleCache, match="format = 1, this run asks for 2"):
        monkeypatch.setattr(cache_module, "FORMAT", 2)
        LatentCache.open(tmp_path)


def test_a_fact_that_one_side_lacks_is_a_difference(tmp_path):
    make(tmp_path)
    facts = key_facts(Pictures(), Projection(), SETTINGS)
    with pytest.raises(StaleCache, match=r"latent\.noise = nothing, this run asks for null"):
        LatentCache.open(tmp_path, facts | {"latent": facts["latent"] | {"noise": None}})
    with pytest.raises(StaleCache, match=r'latent\.resize = "bicubic", this run asks for nothing'):
        LatentCache.open(tmp_path, facts | {"latent": {"weights": "a", "layers": [-1]}})


def test_pictures_may_be_more_than_asked_for_but_not_less(tmp_path):
    bare = replace(SETTINGS, pictures=False)
    make(tmp_path / "full")
    assert "image" in make(tmp_path / "full", settings=bare).fields
    make(tmp_path / "bare", settings=bare)
    with pytest.raises(StaleCache, match=r"cache\.pictures = false, this run asks for true"):
        make(tmp_path / "bare")


def test_an_unfinished_cache_of_another_space_is_refused_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, progress=stop_after(9))
    with pytest.raises(StaleCache, match=r"latent\.weights"):
        make(tmp_path, space=Projection("b"))


def test_pictures_of_another_size_than_the_space_takes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"16 px, the latent space stands for 32 px: set data\.image_size=32"):
        make(tmp_path, space=Projection(image_size=32))


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["latents.npy", "items.jsonl", "stats.safetensors"])
def test_a_truncated_file_is_named_and_its_shard_rewritten(tmp_path, name, streaming):
    make(tmp_path, Pictures(streaming=streaming))
    before = contents(tmp_path)
    path = tmp_path / "shards/00001" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"00001/{name} is missing or cut short: run the umm cache"):
        LatentCache.open(tmp_path)
    source = Pictures(streaming=streaming)
    make(tmp_path, source)
    assert source.first_loaded == 8
    assert contents(tmp_path) == before


def test_a_missing_file_is_named(tmp_path):
    make(tmp_path)
    (tmp_path / "shards/00002/labels.npy").unlink()
    with pytest.raises(DataError, match=r"00002/labels\.npy is missing"):
        LatentCache.open(tmp_path)


def test_verify_finds_one_changed_byte(tmp_path):
    cache = make(tmp_path)
    cache.verify()
    path = tmp_path / "shards/00000/images.npy"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    LatentCache.open(tmp_path)  # the size is right
    with pytest.raises(DataError, match=r"00000/images\.npy is not what was written: delete"):
        cache.verify()


def test_no_cache_and_a_broken_description_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="there is no latent cache in"):
        LatentCache.open(tmp_path)
    (tmp_path / "meta.json").write_text('{"complete": tr')
    with pytest.raises(DataError, match="cannot be read: delete"):
        LatentCache.open(tmp_path)


def test_arrays_are_never_unpickled(tmp_path):
    """np.load would run code hidden in a pickled array; the map reads numbers or raises."""
    path = tmp_path / "labels.npy"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\x00" * 64)
    with pytest.raises(KeyError, match="object"):
        shards.map_file(path)


# ------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("write", [0, 20, 40, 60])
def test_a_disk_that_fills_up_loses_no_earlier_shard(tmp_path, monkeypatch, write):
    make(tmp_path / "whole")
    counter, append = itertools.count(), shards._append

    def full(file, data):
        if next(counter) >= write:
            file.write(bytes(data)[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_append", full)
        with pytest.raises(UmmError, match=r"the disk is full.*free some space and run the same command again"):
            make(tmp_path / "cut")
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    kept = [name for name in cut if name.startswith("shards/")]
    assert all(cut[name] == whole[name] for name in kept)
    assert (len(kept) > 0) == (write >= 40)
    make(tmp_path / "cut")
    assert contents(tmp_path / "cut") == whole


def test_a_disk_that_is_too_small_is_refused_before_encoding(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    space = Projection()
    with pytest.raises(UmmError, match=r"needs 0 MB more and 0 MB are free.*cache\.dtype=bfloat16"):
        make(tmp_path, space=space)
    assert space.calls == 0


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UmmError, match=r"no latent cache can be made in .*set another cache\.dir"):
        make(tmp_path / "file" / "cache")


# -------------------------------------------------------------------------------------------------------- bad items


def test_a_latent_too_large_for_the_stored_dtype_names_its_picture(tmp_path):
    with pytest.raises(NonFinite, match=r"picture 'p/0-ü' is not finite in torch\.float16: try cache\.dtype"):
        make(tmp_path, space=Projection(scale=1e6), settings=replace(SETTINGS, dtype="float16"))


class Uneven(Pictures):
    """Some pictures lack a label, some masks do not fit a byte."""

    def __init__(self, bad: int, label: bool = True, mask: int = 0):
        super().__init__()
        self.bad, self.label, self.value = bad, label, mask

    def item(self, index):
        item = super().item(index)
        if index >= self.bad:
            item["mask"] = item["mask"] + self.value
            if not self.label:
                del item["label"]
        return item


@pytest.mark.parametrize("bad, where", [(4, "picture 'p/4-ü' has no label"), (6, "picture 'p/6-ü' differs in labels")])
def test_a_label_that_only_some_pictures_have_is_an_error(tmp_path, bad, where):
    with pytest.raises(DataError, match=where):
        make(tmp_path, Uneven(bad, label=False))


def test_shards_that_differ_in_fields_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"shard 1 .* differs from shard 0 in labels\.npy"):
        make(tmp_path, Uneven(8, label=False))


def test_a_mask_that_does_not_fit_a_byte_is_an_error(tmp_path):
    with pytest.raises(DataError, match="mask of picture 'p/9-ü' has values outside"):
        make(tmp_path, Uneven(9, mask=300))


def test_meta_data_say_where_the_numbers_come_from(tmp_path):
    cache = make(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["complete"] is True and meta["facts"]["latent"]["weights"] == "a"
    assert meta["key"] == cache.key == cache_key(cache.identity())
    assert isinstance(cache.stats, RunningStats)
