"""Pretrained transformers models: found, loaded strictly, named the same in every version, digested."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from umm import assets
from umm.errors import MissingWeights

NEEDED_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
UNUSED = ("embeddings.mask_token",)  # read in pretraining only; some files lack it

# transformers 5.2x renamed the parts of attention in memory; its files keep the classic names
CLASSIC = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}


def locate(weights: str, revision: str | None = None, files: Sequence[str] = NEEDED_FILES) -> Path:
    """The local folder of `asset:<name>`, of a folder, or of a hub id (from the hub's cache where it is there).

    Of a hub repository only `files` are fetched.

    Raises:
        MissingWeights: it is none of them, or the hub cannot be reached.
    """
    if weights.startswith("asset:"):
        return assets.path(weights.removeprefix("asset:"))
    folder = Path(weights).expanduser()
    return folder if folder.is_dir() else _from_hub(weights, revision, files)


def _from_hub(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import constants, model_info, snapshot_download

    arguments = {"repo_id": repo, "revision": revision, "allow_patterns": list(files)}
    try:
        with contextlib.suppress(OSError):
            cached = Path(snapshot_download(**arguments, local_files_only=True))
            if all(any(cached.glob(pattern)) for pattern in files if is_needed(pattern)):
                return cached
        model_info(repo, revision=revision, timeout=10)  # one try: a download alone waits for minutes on a dead hub
        return Path(snapshot_download(**arguments))
    except Exception as error:  # the hub has a dozen kinds: offline, no such repository, gated, not an id, timeout
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(error)
        raise MissingWeights(
            f"the weights '{repo}' are no local folder and cannot be had from the hub ({reason}): give a folder in the "
            "hub's layout, or latent.name=dinov2 latent.weights=asset:dinov2-small-saliency, which need no hub."
        ) from error


def is_needed(pattern: str) -> bool:
    """Whether nothing can be loaded without a file of this pattern."""
    return Path(pattern).name == "config.json" or pattern.endswith(".safetensors")


def load_pretrained(folder: Path, classes: Mapping[str, type[nn.Module]], beside: tuple[str, ...] = ()) -> nn.Module:
    """The model in `folder`, float32, of the class that its config.json's model_type names.

    `beside`: beginnings of the names of tensors that the file may hold for other networks.

    Raises:
        MissingWeights: the folder lacks a file, is of another model type, or its tensors do not fit.
    """
    kind = _model_type(folder)
    if kind not in classes:
        raise MissingWeights(f"{folder} holds a '{kind}' model, not one of {', '.join(classes)}.")
    try:
        with quiet():
            model, report = classes[kind].from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # no file, truncated file, wrong shapes: transformers and safetensors have many kinds
        raise MissingWeights(f"the weights in {folder} cannot be read ({first_line(error)}).") from error
    missing = sorted(set(report["missing_keys"]) - set(UNUSED))
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.startswith(beside))
    if missing or unexpected:
        raise MissingWeights(
            f"the weights in {folder} do not fit its config.json: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are not part of the model {unexpected[:3]}."
        )
    return model


def read_tensors(file: Path) -> dict:
    """What a .safetensors file or a `torch.save` file of plain tensors holds, on the CPU; never unpickles code.

    Raises:
        MissingWeights: no such file, truncated, or not plain tensors.
    """
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors have many kinds
        raise MissingWeights(f"{file} cannot be read as tensors ({first_line(error)}).") from error


def _model_type(folder: Path) -> str:
    try:
        return json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise MissingWeights(f"{folder} has no config.json in transformers layout.") from error


def classic_name(key: str) -> str:
    """A tensor's name as files on disk have it, whichever transformers version it comes from."""
    for modern, classic in CLASSIC.items():
        key = key.replace(modern, classic)
    return key


def installed_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` under the names that `model` has in the installed transformers; unknown names are kept."""
    installed = {classic_name(key): key for key in model.state_dict()}
    return {installed.get(classic_name(key), key): value for key, value in state.items()}


def sha256_of(state: Mapping[str, Tensor], skip: Collection[str] = ()) -> str:
    """Digest of names, dtypes, shapes and numbers; the same for every file layout and transformers version."""
    named = {classic_name(key): value for key, value in state.items()}
    digest = hashlib.sha256()
    for key in sorted(set(named) - set(skip)):
        value = named[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sha256_of_values(tensors: Iterable[Tensor]) -> str:
    """Digest of dtypes, shapes and numbers, whatever the tensors are called and in whatever order they come.

    Versions of transformers rename and move the parts of a model; its numbers stay.
    """
    return hashlib.sha256("".join(sorted(sha256_of({"": value}) for value in tensors)).encode()).hexdigest()


def families_of(name: str) -> tuple[str, ...]:
    """The families that a model's name tells, or the name itself."""
    known = ("dinov2", "dinov3", "dino", "siglip", "clip", "mae", "deit")  # dino after its longer relatives
    found = [family for family in known if family in name.lower()][:1]
    if any(tag in name.lower() for tag in ("in1k", "in12k", "in21k", "in22k", "augreg")):
        found.append("vit")  # trained on ImageNet's labels
    return tuple(found) or (name,)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar for a load of milliseconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
