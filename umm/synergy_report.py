"""`umm synergy report`: what is computed, drawn and said of an experiment, as JSON, Markdown, plots and one page."""

from __future__ import annotations

from pathlib import Path

from umm.pages import Measured
from umm.sections import Drawn, Section, measured, write
from umm.synergy_analysis import analyse
from umm.synergy_plots import plots
from umm.synergy_verdict import falsification, interval, verdict


def report(folder: str | Path) -> str:
    """Write report/ in the folder of an experiment; returns the verdict and where the files are.

    Raises:
        UmmError: this is no experiment, or its files were changed.
    """
    folder = Path(folder)
    found = analyse(folder)
    found |= {"verdict": verdict(found), "falsification": falsification(found)}
    drawn = plots(found) | grids(folder, found)
    lead = "A synergy experiment: do two tasks help each other?"
    wrote = write(folder / "report", found["about"] or folder.name, lead, found, sections(found, drawn), drawn)
    return "\n".join([f"{found['verdict']['title']}.", *found["verdict"]["sentences"], wrote])


def grids(folder: Path, found: dict) -> Drawn:
    """The newest picture grid of every arm with the first seed; runs draw some where `train.sample_every` says so."""
    drawn, seed = {}, found["declaration"]["seeds"][0]
    for name in found["arms"]:
        if files := sorted((folder / name / f"seed{seed}" / "samples").glob("*.png")):
            words = f"{name} with seed {seed}, after {int(files[-1].stem.partition('-')[0]):,} pictures."
            drawn[f"grid-{name}"] = files[-1], words, f"picture grid drawn by {name}"
    return drawn


def sections(found: dict, drawn: Drawn) -> list[Section]:
    """The report from top to bottom; sections with nothing in them are left out."""
    said = found["verdict"]
    seeds, curves = ([name for name in drawn if name.startswith(kind)] for kind in ("seeds-", "curve-"))
    fronts = ["front"] if "front" in drawn else []
    made = [
        Section(said["title"], said["sentences"]),
        Section("The two directions", [S_MEANS], direction_rows(found), "Joint arms against the specialists.", seeds),
        Section("Worth in compute", [SIGMA_MEANS], sigma_rows(found), "Sigma, and each task's part of it.", curves),
        Section("Is it the partner?", [], control_rows(found), "Control arms, and what the headline arm adds to them."),
        Section("The instrument", [], stop_rows(found), "Arms whose partner cannot act, against the specialists."),
        Section("All loss weights", [], front_rows(found), "Best: no other weight is better in both errors.", fronts),
        Section("What would refute it", [], found["falsification"], "Each way to be wrong, and how the claim fared."),
        Section("Exploratory", [], exploratory_rows(found), "Not the question asked; q is Benjamini and Hochberg's."),
        Section("What they draw", drawn=[name for name in drawn if name.startswith("grid-")]),
        Section("Arms", [], arm_rows(found), COSTS_MEAN),
        Section("Per seed", [], seed_rows(found), "The number of every arm with every seed."),
        Section("Declared before the first run", declared(found)),
    ]
    return [section for section in made if section.text or section.rows or section.drawn]


S_MEANS = (
    "s = log(error alone / error together), paired by seed: positive is better together. Gain: the part of the error "
    "that is gone. Detectable: the s that would have been shown alone, corrected for two tests, four times in five. A "
    "small p of no harm, or of equality, shows it within the margin."
)
SIGMA_MEANS = (
    "The joint arm's errors are read back on the specialists' learning curves: 1 is worth two specialists sharing its "
    "compute, 2 is each task as good as with all of it, more is 1 + 1 > 2. `>` and `<`: beyond the curve's end."
)
COSTS_MEAN = "Means over seeds with intervals, and what a run cost; images are those of all its parts together."


# -------------------------------------------------------------------------------------------------------------- rows


def direction_rows(found: dict) -> list[dict]:
    rows = []
    for name, joint in found["joint"].items():
        for endpoint, row in joint["directions"].items():
            if row:
                rows.append({"arm": name, "endpoint": endpoint, "against": row["single"], **test_columns(row)})
                rows[-1] |= {"detectable": row["detectable"], "margin": row["margin"]}
                rows[-1] |= {"p of no harm": row["p_harm"], "p of equality": row["p_different"]}
    return rows


def test_columns(row: dict, **more: float) -> dict:
    measured = Measured(row["mean"], row["low"], row["high"])
    return {"s": measured, "gain, %": row["percent"], "p": row["p"], **more, "d": row["d"], "seeds": row["n"]}


def sigma_rows(found: dict) -> list[dict]:
    rows = []
    for name, joint in found["joint"].items():
        score = joint["sigma"]
        if "reason" not in score:
            row = {"arm": name, "compute": score["compute"], "Sigma": bounded(score)}
            row |= {f"part of {endpoint}": bounded(share) for endpoint, share in score["shares"].items()}
            rows.append(row | {"mutual": score["mutual"], "seeds": score["n"]})
    return rows


def bounded(reading: dict) -> str:
    low, high = reading["interval"] or (None, None)
    return f"{reading['sign']}{reading['value']:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None else "")


def control_rows(found: dict) -> list[dict]:
    return [
        {"arm": row["arm"], "role": row["role"], "endpoint": row["endpoint"], "s": interval(row["score"], 3),
         "headline's s less it": interval(row["adjusted"], 3), "p": row["adjusted"]["p"], "seeds": row["adjusted"]["n"]}
        for row in found["controls"]
        if row["adjusted"]
    ]  # fmt: skip


def stop_rows(found: dict) -> list[dict]:
    return [
        {"arm": row["arm"], "against": row["single"], "endpoint": row["endpoint"], "largest difference": row["gap"],
         "leak": row["leak"], "seeds": row["n"]}
        for row in found["stop"]
    ]  # fmt: skip


def front_rows(found: dict) -> list[dict]:
    return [
        {"arm": point["arm"], "weight": point["value"]}
        | {f"error of {name}": measured(mean) for name, mean in point["errors"].items()}
        | {"best": point["best"]}
        for point in found["front"]
    ]


def exploratory_rows(found: dict) -> list[dict]:
    return [
        {"arm": row["arm"], "against": row["reference"], "endpoint": row["endpoint"]} | test_columns(row, q=row["q"])
        for row in found["exploratory"]
    ]


def arm_rows(found: dict) -> list[dict]:
    rows = []
    for name, arm in found["arms"].items():
        row = {"arm": name, "role": arm["role"], "compute": arm["compute"]}
        row |= {endpoint: measured(arm["endpoints"].get(endpoint)) for endpoint in found["declaration"]["endpoints"]}
        row["seeds"] = max((one["n"] for one in arm["endpoints"].values()), default=0)
        rows.append(row | {key: arm["costs"].get(key) for key in ("seconds", "images", "flops")})
    return rows


def seed_rows(found: dict) -> list[dict]:
    return [
        {"arm and endpoint": f"{name}: {endpoint}"} | {str(seed): value for seed, value in one["per_seed"].items()}
        for name, arm in found["arms"].items()
        for endpoint, one in arm["endpoints"].items()
    ]


def declared(found: dict) -> list[str]:
    said = found["declaration"]
    lines = [f"Hash of arms, endpoints, margins and seeds: `{found['sha256']}`."]
    seeds = ", ".join(map(str, said["seeds"]))
    lines.append(f"Seeds {seeds}; decided by the {said['test']} test, two-sided, at {said['alpha']:g}.")
    for name, endpoint in said["endpoints"].items():
        row = ", ".join(f"{key} {value}" for key, value in endpoint["row"].items())
        kind = "primary" if endpoint["primary"] else "exploratory"
        unit = " %" if endpoint["margin_in"] == "percent" else ""
        lines.append(f"{name} ({kind}): {row}; error = {endpoint['error']}; margin {endpoint['margin']:g}{unit}.")
    for name, settings in found["tuned"].items():
        chosen = ", ".join(f"{key}={value}" for key, value in settings.items())
        lines.append(f"Tuning on seeds {', '.join(map(str, said['tuning']['seeds']))} chose for {name}: {chosen}.")
    return lines
