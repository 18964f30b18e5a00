"""umm eval --joint: all heads of one model in one table, beside the runs that were trained for one of them alone.

Every head is judged by its own task, and every baseline exactly as the joint model: same pictures, metrics, sampler
and noise. So values per picture are pairs, and their differences have intervals and tests; numbers of whole sets (FD,
KID) have none and are subtracted only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from umm.build import open_source
from umm.config import TASKS, combine, config_hash, flatten, schema
from umm.errors import MissingHead, UmmError
from umm.evaluate import run_config, write
from umm.judging import OF_CLASSES, Records
from umm.latents._adapted import adapter_digest
from umm.metrics._conflict import MARK
from umm.model import UnifiedModel
from umm.paired import compare
from umm.registry import find
from umm.rng import derive_seed
from umm.run_facts import ANSWERING, look_at, plain
from umm.run_tables import key_of
from umm.runs import Run, now, write_atomic, writing
from umm.stats import bootstrap, paired_differences, sign_flip_p

PARTS = {"recon": "decoder", "gen": "dit", "und": "und", "vqa": "vqa", "llm": "llm"}  # part -> its head
KEPT = ("seed", "run", "data", "latent", "cache", "train")  # sections that every task has
BESIDE = "baseline"  # folder in that of a baseline: what was found of it beside a joint model
IMAGES = "training images of each part"


@dataclass
class Judged:
    """What was found of one run, part by part."""

    name: str
    parts: dict[str, Records]
    notes: list[str]  # each begins with the part


def evaluate_joint(folder: str, baselines: Sequence[str] = (), overrides: Sequence[str] = ()) -> str:
    """Judge all heads of a run and compare them with the baselines; writes what was found, returns the table.

    Raises:
        MissingHead: the model has no head that could be judged, or a baseline none of this model's.
        UmmError: a baseline lives on another latent space, or knows other classes.
    """
    seen = look_at([folder, *baselines])
    run, whole = Run(folder), run_config(Run(folder), overrides)
    accelerator = Accelerator(cpu=whole.train.device == "cpu")
    model = UnifiedModel.load(folder, accelerator.device)
    named = any(text.startswith("eval.metrics=") for text in overrides)
    configs = {part: part_config(whole, part, named) for part in parts_of(model)}
    judged = judge(seen[0].name, model, configs, accelerator)
    judged.notes += adapter_notes(model)
    trained, others = [run_config(Run(one.folder), ()) for one in seen], []
    for one, config in zip(seen[1:], trained[1:]):
        other = judge_baseline(one.name, Run(one.folder), config, model, configs, judged, accelerator)
        other.notes += unlike(trained[0], config, other.parts)
        others.append(other)
    if not accelerator.is_main_process:
        return ""
    rows, notes = compared(judged, others, whole.seed, whole.eval.bootstrap)
    compute = [{"run": one.name, "task": one.task, IMAGES: one.images // turns(config), "seconds": one.seconds}
               for one, config in zip(seen, trained)]  # fmt: skip
    found = {"split": whole.eval.split, "evaluated": now(), "rows": rows, "compute": compute}
    found["notes"] = [*remarks(judged, others), *notes]
    said = write(run, merged(judged.parts), whole)
    file = run.folder / "eval" / f"{whole.eval.split}-joint.json"
    with writing(file.parent, file.name):
        write_atomic(file, json.dumps(found, indent=1))
    return f"{table(found)}\n{said} and {file}"


# ----------------------------------------------------------------------------------------------------------- judging


def parts_of(model: UnifiedModel) -> list[str]:
    """What the heads of a model can be judged on; a trunk that never learnt to generate is not asked to.

    Raises:
        MissingHead: nothing.
    """
    found = [part for part, head in PARTS.items() if head in model.heads]
    found = [part for part in found if part != "gen" or "generation" in model.facts]
    if not found:
        raise MissingHead(f"this model has none of the heads that are judged: {', '.join(PARTS.values())}.")
    return found


def part_config(
    whole: DictConfig, part: str, metrics_named: bool = False, like: DictConfig | None = None
) -> DictConfig:
    """The configuration with which a part is judged: the run's where it has the section, else the defaults.

    Args:
        metrics_named: eval.metrics was given for this evaluation, so it counts for every part that can take it.
        like: judge on the pictures, with the evaluation settings and with the noise of this configuration.
    """
    task = "und" if part in ANSWERING else part
    plain = OmegaConf.to_container(whole)
    layer = {key: plain[key] for key in (*KEPT, *TASKS[task]) if key in plain and key != "eval"}
    known = schema(task).eval
    layer["eval"] = {key: value for key, value in plain["eval"].items() if key in known}
    if metrics_named:
        layer["eval"]["metrics"] = [name for name in plain["eval"]["metrics"] if suits(name, task)]
    elif TASKS[task].get("eval") != TASKS[whole.task].get("eval"):
        del layer["eval"]["metrics"]  # they were chosen for another kind of result
    if task == "und":
        layer["und"] = layer.get("und", {}) | {"kind": part if part in ANSWERING else "classify"}
    if like is not None:
        layer |= {key: OmegaConf.to_container(like)[key] for key in ("data", "eval", "seed")}
    return combine(task, [(str(whole.run), OmegaConf.create(layer))])


def suits(metric: str, task: str) -> bool:
    """Reconstructions have originals but no training pictures beside them, samples the other way round."""
    found = find("metrics", metric)
    return not found.paired if task == "gen" else found.paired or "train" not in found.sides


def judge(name: str, model: UnifiedModel, configs: Mapping[str, DictConfig], accelerator: Accelerator) -> Judged:
    """Every part by its own task; one that cannot be judged becomes a note.

    Raises:
        UmmError: no part can be judged.
    """
    judged, error = Judged(name, {}, []), None
    for part, config in configs.items():
        try:
            records = find("tasks", config.task).evaluate(model, config, accelerator)
        except UmmError as problem:
            error = problem
            judged.notes.append(f"{part} was not judged: {problem}")
            continue
        judged.parts[part] = records
        judged.notes += [f"{part}: {note}" for note in records.notes]
    if error is not None and not judged.parts:
        raise error
    return judged


def judge_baseline(
    name: str,
    run: Run,
    saved: DictConfig,
    model: UnifiedModel,
    configs: Mapping[str, DictConfig],
    joint: Judged,
    accelerator: Accelerator,
) -> Judged:
    """The baseline on what it was trained for; an evaluation it already has is used where it was made alike."""
    other = UnifiedModel.load(run.folder, accelerator.device)
    check_space(run, other, model)
    parts = [part for part in parts_of(other) if part in configs and trained_for(saved, part)]
    if not parts:
        raise MissingHead(f"{run.folder} has no head to compare with {', '.join(configs)}: give runs of these tasks.")
    own = {part: part_config(saved, part, like=configs[part]) for part in parts}
    refused = {part: reason for part in parts if (reason := other_classes(part, other, model, own[part]))}
    if len(refused) == len(parts):
        raise UmmError(f"{run.folder} {refused[parts[0]]}: give a baseline that was trained on the same classes.")
    fit = {part: config for part, config in own.items() if part not in refused}
    judged = judged_alone(name, run, saved, other, fit, joint, accelerator)
    judged.notes += [f"{part} was not judged: it {reason}" for part, reason in refused.items()]
    judged.notes += adapter_notes(other)
    if adapter_digest(other.space) != adapter_digest(model.space):
        reason = "distances in latents are not compared, an adapter lies between them"
        leave_out(judged, lambda row: row.get("space") == "latents", reason)
    if "gen" in fit and other.head("dit").classes != model.head("dit").classes:
        leave_out(judged, lambda row: row["metric"] in OF_CLASSES, "agreement with other classes is not compared")
    return judged


def judged_alone(
    name: str,
    run: Run,
    saved: DictConfig,
    model: UnifiedModel,
    configs: Mapping[str, DictConfig],
    joint: Judged,
    accelerator: Accelerator,
) -> Judged:
    """What is found of a baseline, now or in an earlier evaluation; written where it replaces no evaluation of its own.

    Args:
        saved: the baseline's own configuration.
        configs: of its parts, by which the joint model was judged.
    """
    part, config = next(iter(configs.items()))
    beside = Run(run.folder / BESIDE)
    if len(configs) == 1 and part in joint.parts:
        for place in (run, beside):
            records = stored(place, run.facts.get("finished", ""), config, joint.parts[part])
            if records is not None:
                return Judged(name, {part: records}, [f"{part}: {note}" for note in records.notes])
    judged = judge(name, model, configs, accelerator)
    if accelerator.is_main_process:
        there = (run.folder / "eval" / f"{config.eval.split}.json").exists()
        alike = saved.data == config.data and saved.seed == config.seed  # as umm eval would judge it
        records, whole = (judged.parts[part], config) if len(configs) == 1 else (merged(judged.parts), saved)
        write(run if alike and not there else beside, records, whole)
    return judged


def other_classes(part: str, other: UnifiedModel, model: UnifiedModel, config: DictConfig) -> str | None:
    """Why a baseline cannot be judged on a part: it answers with other classes, or generates fewer than there are."""
    if part == "und":
        known, asked = other.head("und").classes, model.head("und").classes
        return None if known == asked else f"knows the classes {few(known)}, the joint model {few(asked)}"
    if part == "gen" and other.head("dit").num_classes:
        known, asked = other.head("dit").classes, open_source(config, config.eval.split).classes or []
        if other.head("dit").num_classes < len(asked):
            return f"makes the classes {few(known)}, the pictures have {few(asked)}"
    return None


def few(classes: Sequence[str]) -> str:
    return f"{', '.join(classes[:4])}{', ...' if len(classes) > 4 else ''} ({len(classes)})"


def unlike(joint: DictConfig, alone: DictConfig, parts: Collection[str]) -> list[str]:
    """What a baseline learnt from otherwise than the joint model did, as one note: the first difference of the data,
    the number of pictures, labels and classes."""
    ours, theirs = (dict(flatten(c)) | {"train.images": c.train.images // turns(c)} for c in (joint, alone))
    data = next((key for key in ours | theirs if key.startswith("data.") and ours.get(key) != theirs.get(key)), None)
    keys = [data] if data else []
    keys += ["train.images", *(["und.limit"] if {"und", *ANSWERING} & {*parts} else [])]
    keys += ["gen.conditional"] if "gen" in parts else []
    said = [f"{key}={plain(theirs.get(key))} (joint: {plain(ours.get(key))})"
            for key in keys if ours.get(key) != theirs.get(key)]  # fmt: skip
    return [f"trained with {', '.join(said)}: what differs is not its partner's doing alone"] if said else []


def turns(config: DictConfig) -> int:
    """Parts that share the training pictures out, one after another."""
    return len(config.joint.parts) if config.task == "joint" and config.joint.sequential else 1


def adapter_notes(model: UnifiedModel) -> list[str]:
    """Through what the heads read, and whether the decoder has learnt to."""
    if adapter_digest(model.space) is None:
        return []
    decoder = model.facts.get("adapter", {}).get("decoder")
    return ["all heads read latents through an adapter" + (f"; the decoder was {decoder}" if decoder else "")]


def leave_out(judged: Judged, unfit: Callable[[Mapping], bool], why: str) -> None:
    """Leave out rows of a baseline that are of another kind than the joint model's, and say so."""
    for part, records in judged.parts.items():
        kept = [row for row in records.numbers if not unfit(row)]
        if len(kept) < len(records.numbers):
            records.numbers = kept
            judged.notes.append(f"{part}: {why}")


def trained_for(config: DictConfig, part: str) -> bool:
    """Whether the run's task trains this part: a generator's borrowed decoder is not its own result."""
    trained = list(config.joint.parts) if config.task == "joint" else [config.task]
    if "und" in trained and config.und.kind in ANSWERING:
        trained[trained.index("und")] = config.und.kind
    return part in trained


def check_space(run: Run, other: UnifiedModel, model: UnifiedModel) -> None:
    ours, theirs = (json.loads(json.dumps(one.space.identity())) for one in (model, other))
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            raise UmmError(
                f"{run.folder} lives on another latent space ('{key}' is {theirs.get(key)!r}, here {ours.get(key)!r}): "
                "compare models on one latent space."
            )


def stored(run: Run, finished: str, config: DictConfig, joint: Records) -> Records | None:
    """What an evaluation in this folder found since the training ended, if made with this configuration and judges."""
    import pyarrow.parquet as pq

    split = config.eval.split
    file, items = run.folder / "eval" / f"{split}.json", run.folder / "items" / f"{split}.parquet"
    if not file.exists() or not items.exists():
        return None
    try:
        found, columns = json.loads(file.read_text()), pq.read_table(items).to_pydict()
        same = found["provenance"]["config_hash"] == config_hash(config)
        same &= found["evaluated"] >= finished
        prints = json.loads(json.dumps(joint.fingerprints))
        if not same or any(prints.get(key, value) != value for key, value in found["fingerprints"].items()):
            return None
        ids = columns.pop("id")
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of another version: judged again
        return None
    values = {
        name: {i: value for i, value in zip(ids, column) if value is not None} for name, column in columns.items()
    }
    return Records(found["numbers"], values, found["fingerprints"], found["notes"])


def merged(parts: Mapping[str, Records]) -> Records:
    """One set of records whose rows and fingerprints say which part they are of."""
    whole = Records()
    for part, records in parts.items():
        whole.numbers += [row | {"part": part} for row in records.numbers]
        whole.items |= records.items
        whole.fingerprints |= {f"{part} {name}": facts for name, facts in records.fingerprints.items()}
        whole.notes += [f"{part}: {note}" for note in records.notes]
    return whole


# --------------------------------------------------------------------------------------------------------- comparing


def remarks(joint: Judged, others: Sequence[Judged]) -> list[str]:
    """What must be known of each run; what is true of all is said of the joint model only."""
    said = [f"{joint.name}, {note}" for note in joint.notes]
    return said + [f"{other.name}, {note}" for other in others for note in other.notes if note not in joint.notes]


def compared(joint: Judged, others: Sequence[Judged], seed: int, resamples: int) -> tuple[list[dict], list[str]]:
    """Rows of the joint model's numbers, once for every baseline that has them too; remarks on what is no pair."""
    rows, notes = [], []
    for part, records in joint.parts.items():
        rivals = [(other.name, other.parts[part]) for other in others if part in other.parts]
        for row in records.numbers:
            row = row | {"part": part}
            beside = [(name, rival, its) for name, rival in rivals if (its := same_number(rival, row)) is not None]
            for name, rival, its in beside:
                draw = np.random.default_rng(derive_seed(seed, "joint", part, *key_of(row)))
                try:
                    difference = paired(records, rival, row, draw, resamples)
                except UmmError as error:
                    notes.append(f"{name}, {part}, {row['metric']}: no paired comparison: {error}")
                    difference = None
                difference = difference or {"value": row["value"] - its["value"]}
                rows.append(row | {"baseline": name, "baseline_value": its["value"], "difference": difference})
            rows += [] if beside else [row]
    return rows, notes


def same_number(records: Records, row: Mapping) -> dict | None:
    return next((one for one in records.numbers if key_of(one) == key_of(row)), None)


def paired(one: Records, other: Records, row: Mapping, draw: np.random.Generator, resamples: int) -> dict | None:
    """{"value", "low", "high", "p", "n"} of one - other over the same items; None where a number has no items.

    Questions about one picture are not independent: there pictures are resampled, which bring all their questions.

    Raises:
        UmmError: the items are not the same.
    """
    metric, space = key_of(row)
    name = f"{metric}@{space}" if space else metric
    if name not in one.items or name not in other.items:
        return None
    first, second = one.items[name], other.items[name]
    differences = paired_differences(first, second)
    differences[np.abs(differences) < 1e-12] = 0.0  # rounding
    if row["part"] in ANSWERING:
        items = sorted(first)
        scores = [[side[item] for item in items] for side in (first, second)]
        found = compare(*scores, [item.rpartition("#")[0] for item in items], draw, margin=0.01, resamples=resamples)
        interval, p = found.difference, found.p
    else:
        interval = bootstrap(differences, draw, resamples)
        p = sign_flip_p(differences, draw)
    return {"value": interval.value, "low": interval.low, "high": interval.high, "p": p, "n": interval.n}


# ------------------------------------------------------------------------------------------------------------- table


def table(found: Mapping) -> str:
    """The numbers that speak for or against a model, the cost of each run, and the notes, as text."""
    shown = [row for row in found["rows"] if row["higher_is_better"] is not None]
    shown.sort(key=lambda row: (list(PARTS).index(row["part"]), not row["headline"]))
    head = ("part", "metric", "judge", "value", "95 % interval", "n", "baseline", "its value", "difference",
            "95 % interval", "p", "better")  # fmt: skip
    lines = columns_of([head, *map(cells, shown)])
    if left_out := len(found["rows"]) - len(shown):
        lines.append(f"{left_out} diagnostics that are neither better nor worse are in the file only.")
    reasons = {row["conflict"] for row in shown if row["conflict"]}
    lines += [f"{MARK} conflict of interest: {reason}" for reason in sorted(reasons)]
    cost = [(one["run"], one["task"], f"{one[IMAGES]:,}", f"{one['seconds']:,.0f}" if one["seconds"] else "unknown")
            for one in found["compute"]]  # fmt: skip
    lines += ["", *columns_of([("run", "task", IMAGES, "seconds"), *cost])]
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


def cells(row: Mapping) -> tuple[str, ...]:
    against = row.get("difference", {})
    return (
        row["part"],
        row["metric"] + ("" if row["headline"] else f" {MARK}"),
        row.get("space") or "",
        f"{row['value']:.5g}",
        span(row),
        str(row["n"]),
        row.get("baseline", ""),
        f"{row['baseline_value']:.5g}" if "baseline_value" in row else "",
        f"{against['value']:+.4g}" if against else "",
        span(against, "+"),
        f"{against['p']:.3g}" if "p" in against else "",
        "higher" if row["higher_is_better"] else "lower",
    )


def span(row: Mapping, sign: str = "") -> str:
    return f"{row['low']:{sign}.4g} .. {row['high']:{sign}.4g}" if "low" in row else ""


def columns_of(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines, the first underlined; columns without a word below their head are left out."""
    keep = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in keep}
    lines = ["  ".join(row[i].ljust(widths[i]) for i in keep).rstrip() for row in rows]
    return [lines[0], "-" * len(max(lines, key=len)), *lines[1:]]
