"""What an experiment shows, in plain words: the verdict, and the table of what could have refuted it."""

from __future__ import annotations

import math

KEYS = {
    "leak": "The instrument leaks",
    "both": "Both directions are shown",
    "one": "One direction is shown",
    "mixed": "One direction is shown, and harm in the other",
    "both harmed": "Harm is shown in both directions",
    "harmed": "Harm is shown in one direction",
    "neither": "Neither direction is shown",
    "unscored": "An endpoint has no scores",
    "unfinished": "Not enough runs are in",
}
OFF = 0.05  # of the declared ratio of two arms' compute: where the measured one differs by more, it is said


def verdict(found: dict) -> dict:
    """{"key": one of KEYS, "title", "sentences"} of an analysis."""
    headline = found["declaration"]["headline"]
    joint = found["joint"][headline]
    key = verdict_key(found, joint["decisions"])
    sentences = []
    if key == "leak":
        sentences += [leak_sentence(row) for row in found["stop"] if row["leak"]]
        sentences.append("Nothing below can be called synergy: first find out why these runs are not the same.")
    elif not found["stop"]:
        sentences.append("No stop-gradient arm was run, so a leak in the instrument is not excluded.")
    if joint["decisions"]:
        sentences += decision_sentences(found, headline, joint)
        sentences += control_sentences(found, joint["decisions"]["shown"])
        sentences += harm_sentences(found, joint["decisions"]["harmed"])
    sentences += sigma_sentences(headline, joint["sigma"])
    doubtful = key in ("both", "one", "mixed") and not withstood(found, joint["decisions"]["shown"])
    title = KEYS[key] + (", with reservations" if doubtful else "")
    return {"key": key, "title": title, "sentences": sentences + caveats(found)}


def withstood(found: dict, shown: list[str]) -> bool:
    """Was the instrument tested, and do the shown gains survive a placebo, all other controls, and equal compute?

    Arms with too few seeds to decide anything do not count, neither for nor against.
    """
    for endpoint in shown:
        rows = [row for row in controls_of(found, endpoint) if row["adjusted"]["decidable"]]
        equal = [row for _, row in equal_compute(found, endpoint) if row["decidable"]]
        survived = [row["adjusted"]["better"] for row in rows] + [row["better"] for row in equal]
        if not equal or not any(row["role"] == "placebo" for row in rows) or not all(survived):
            return False
    return bool(found["stop"]) and not found["judges"]


def controls_of(found: dict, endpoint: str) -> list[dict]:
    """The control arms that have been compared with the headline arm on an endpoint."""
    return [row for row in found["controls"] if row["endpoint"] == endpoint and row["adjusted"]]


def verdict_key(found: dict, decisions: dict | None) -> str:
    if any(row["leak"] for row in found["stop"]):
        return "leak"
    if decisions is None:
        return "unscored" if found["runs"]["unscored"] else "unfinished"
    if decisions["both"] or decisions["both_harmed"]:
        return "both" if decisions["both"] else "both harmed"
    if decisions["shown"]:
        return "mixed" if decisions["harmed"] else "one"
    return "harmed" if decisions["harmed"] else "neither"


def leak_sentence(row: dict) -> str:
    return (
        f"With the partner's gradient stopped, {row['arm']} must equal {row['single']} on {row['endpoint']}, but at "
        f"seed {row['seed']} their errors differ by {100 * row['gap']:.3g} %."
    )


def decision_sentences(found: dict, headline: str, joint: dict) -> list[str]:
    """The two directions, then what may be said of them together."""
    decisions, directions = joint["decisions"], joint["directions"]
    sentences = [direction_sentence(name, row, decisions) for name, row in directions.items()]
    measured = [measured_compute(found, headline, row["single"]) for row in directions.values()]
    cost = f"with {found['arms'][headline]['compute']:g} x the specialist's compute on what is shared"
    cost += f"; measured: {', '.join(filter(None, measured))}" if any(measured) else ""
    at = f"{headline} ({cost})"
    sentences.append(together_sentence(at, decisions))
    n, least, alpha = min(row["n"] for row in directions.values()), decisions["least_p"], found["declaration"]["alpha"]
    if least > alpha:
        sentences.append(f"{n} seeds cannot show anything: the exact test's smallest p is {least:.3g}.")
    elif 2 * least > alpha:
        sentences.append(
            f"{n} seeds cannot show one direction alone: corrected for two, the exact test's smallest p is "
            f"{2 * least:.3g}."
        )
    return sentences


def together_sentence(at: str, decisions: dict) -> str:
    """What the two directions say of a joint arm."""
    p = f"(intersection-union p = {decisions['p_both']:.3g})"
    if decisions["both"]:
        return f"So {at} is better in both directions {p}."
    if decisions["both_harmed"]:
        return f"So {at} is worse in both directions {p}."
    shown, harmed = decisions["shown"], decisions["harmed"]
    if shown and harmed:
        return f"So {at} is better in one direction and worse in the other."
    if shown:
        return f"So one direction is shown for {at}, and no more may be claimed."
    if harmed:
        return f"So {at} is worse in one direction, and no gain is shown."
    unsettled = [name for name in decisions["p_holm"] if name not in decisions["equivalent"]]
    if not unsettled:
        return f"So {at} is as good as the specialists, within the margins."
    of = "" if len(unsettled) == len(decisions["p_holm"]) else f", for {unsettled[0]},"
    return f"So no gain of {at} is shown. That is not{of} evidence of no effect."


def direction_sentence(name: str, row: dict, decisions: dict) -> str:
    """One direction: size, interval, p, and where nothing is shown, what could have been."""
    facts = f"s = {interval(row, 3)}, p = {row['p']:.3g}, {row['n']} seeds"
    text = f"{name}: the error is {size(row['mean'])} that of {row['single']} ({facts})"
    little = f", by less than the margin of {row['margin']}" if name in decisions["equivalent"] else ""
    if name in decisions["shown"]:
        return f"{text}: the partner helps{little}."
    if name in decisions["harmed"]:
        return f"{text}: the partner harms{little}."
    if name in decisions["equivalent"]:
        return f"{text}: shown to be equal within the margin of {row['margin']} (p = {row['p_different']:.3g})."
    if name in decisions["no_harm"]:
        return f"{text}: no gain is shown, but no loss beyond the margin of {row['margin']} (p = {row['p_harm']:.3g})."
    text += f": neither help nor harm nor equality within {row['margin']} is shown"
    if row["detectable"] is None:
        return f"{text}."
    return f"{text}; an effect of s = {row['detectable']:.2g} would have been shown alone four times in five."


def size(score: float) -> str:
    """What a mean s does to an error: '8.3 % higher than' it was alone, or '10 times'."""
    factor = math.exp(abs(score))
    if factor >= 2:
        return f"{factor:.2g} times" if score < 0 else f"{factor:.2g} times smaller than"
    percent = 100 * abs(1 - math.exp(-score))
    return f"{percent:.{1 if percent < 10 else 0}f} % {'lower' if score >= 0 else 'higher'} than"


def control_sentences(found: dict, shown: list[str]) -> list[str]:
    """Whether the shown gains survive the controls and equal compute."""
    sentences = []
    for endpoint in shown:
        rows = controls_of(found, endpoint)
        if not any(row["role"] == "placebo" for row in rows):
            sentences.append(f"{endpoint}: no placebo arm was run, so the gain may be that of any second loss.")
        sentences += [control_sentence(endpoint, row) for row in rows]
        sentences += equal_compute_sentences(found, endpoint)
    return sentences


WHY = {
    "placebo": "what any second loss does",
    "distill": "what alignment to the encoder does",
    "more": "what more of the same task does",
}


def harm_sentences(found: dict, harmed: list[str]) -> list[str]:
    """Whether the shown harm is more than that of a placebo."""
    sentences, why = [], WHY["placebo"]
    for endpoint in harmed:
        rows = [row for row in controls_of(found, endpoint) if row["role"] == "placebo"]
        if not rows:
            sentences.append(f"{endpoint}: no placebo arm was run, so the harm may be that of any second loss.")
        for row in rows:
            adjusted = row["adjusted"]
            text = f"{endpoint}: s less that of {row['arm']} is {interval(adjusted, 3)}"
            if not adjusted["decidable"]:
                sentences.append(f"{text}: {adjusted['n']} seeds cannot tell the harm from {why}.")
            elif adjusted["worse"]:
                sentences.append(f"{text} (p = {adjusted['p']:.3g}): more harm than {why}.")
            else:
                sentences.append(f"{text}, which does not set the harm apart from {why}.")
    return sentences


def control_sentence(endpoint: str, row: dict) -> str:
    adjusted, why = row["adjusted"], WHY[row["role"]]
    ahead = f"{endpoint}: the gain is {interval(adjusted, 3)} above that of {row['arm']}"
    if not adjusted["decidable"]:
        return f"{ahead}: {adjusted['n']} seeds cannot tell it from {why}."
    if adjusted["better"]:
        return f"{ahead} (p = {adjusted['p']:.3g}): more than {why}."
    if adjusted["worse"]:
        return f"{ahead} (p = {adjusted['p']:.3g}): less than {why}."
    return f"{ahead}, which does not set it apart from {why}."


def equal_compute_sentences(found: dict, endpoint: str) -> list[str]:
    rows = equal_compute(found, endpoint)
    if not rows:
        return [f"{endpoint}: no joint arm had the specialist's compute, so the gain may be that of its larger budget."]
    return [
        f"{endpoint}: at the specialist's compute, {beside(found, name, row)} has s = {interval(row, 2)} "
        f"(p = {row['p']:.3g}): {remains(row)}."
        for name, row in rows
    ]


def remains(row: dict) -> str:
    """What becomes of a gain at equal compute."""
    if not row["decidable"]:
        return f"{row['n']} seeds cannot tell whether the gain remains"
    if row["better"]:
        return "the gain remains"
    return "there it is a loss" if row["worse"] else "the gain is not shown there"


def equal_compute(found: dict, endpoint: str) -> list[tuple[str, dict]]:
    """[(joint arm, its direction)] of those that spent no more than the specialist, as declared."""
    budget = found["arms"][found["declaration"]["endpoints"][endpoint]["single"]]["compute"]
    rows = [
        (name, joint["directions"].get(endpoint))
        for name, joint in found["joint"].items()
        if found["arms"][name]["compute"] <= budget
    ]
    return [(name, row) for name, row in rows if row]


def beside(found: dict, name: str, row: dict) -> str:
    """A joint arm, with what it really cost where that is not what was declared."""
    measured = measured_compute(found, name, row["single"])
    return f"{name} (measured: {measured})" if measured else name


def measured_compute(found: dict, name: str, single: str) -> str | None:
    """The operations of an arm over those of a specialist, where they are known and not in the declared ratio."""
    arms = found["arms"]
    mine, its = (arms[arm]["costs"].get("flops") for arm in (name, single))
    if not mine or not its:
        return None
    ratio, declared = mine / its, arms[name]["compute"] / arms[single]["compute"]
    return f"{ratio:.3g} x the operations of {single}" if abs(ratio / declared - 1) > OFF else None


def sigma_sentences(arm: str, sigma: dict) -> list[str]:
    if "reason" in sigma:
        return [f"Sigma is not known: {sigma['reason']}."]
    low, high = sigma["interval"] or (None, None)
    where = f"[{low:.3g}, {high:.3g}]" if sigma["interval"] else "(no interval: the specialists' budgets end there)"
    size = f"{sigma['sign']}{sigma['value']:.3g} {where}"
    text = f"Sigma, the specialists' compute that {arm} is worth over its own, is {size}"
    if sigma["interval"] is None:
        return [f"{text}. Nothing is extrapolated; arms with other budgets would tell more."]
    if low > 2:
        meaning = "more than 2, the literal 1 + 1 > 2"
    elif low > 1:
        meaning = "positive transfer, " + ("and below the literal 2" if high < 2 else "with the literal 2 left open")
    elif high < 1:
        meaning = "less than two specialists that share its budget"
    else:
        meaning = "not set apart from two specialists that share its budget"
    mutual = " Each task is worth more than half of the budget: the transfer is mutual." if sigma["mutual"] else ""
    return [f"{text}: {meaning}.{mutual}"]


def caveats(found: dict) -> list[str]:
    """What else a reader must know."""
    runs, notes = found["runs"], list(found["runs"]["problems"])
    if runs["missing"]:
        notes.append(f"Preliminary: {runs['done']} of {runs['wanted']} runs are in.")
    if len(runs["commits"]) > 1:
        notes.append(f"The runs were made by {len(runs['commits'])} states of the code: {', '.join(runs['commits'])}.")
    notes += [f"A judge of a primary endpoint has a conflict of interest ({text})." for text in found["judges"]]
    return notes


def interval(row: dict, digits: int) -> str:
    return f"{row['mean']:.{digits}g} [{row['low']:.{digits}g}, {row['high']:.{digits}g}]"


# -------------------------------------------------------------------------------------------------------- falsification


def falsification(found: dict) -> list[dict]:
    """[{"what would refute it", "state", "evidence"}]; the state is withstood, not withstood or not tested."""
    headline = found["declaration"]["headline"]
    joint, decisions = found["joint"][headline], found["joint"][headline]["decisions"]
    leaks = [leak_sentence(row) for row in found["stop"] if row["leak"]]
    equal = [f"{row['arm']} on {row['endpoint']}: at most {row['gap']:.1g}" for row in found["stop"]]
    rows = [refutation("the stop-gradient arm shows a gain", found["stop"], leaks, leaks or equal)]
    for role, claim in (
        ("placebo", "a placebo arm reaches the joint arm's gain"),
        ("more", "more of the same reaches it"),
        ("distill", "distillation from the encoder reaches it"),
    ):
        arms = [row for row in found["controls"] if row["role"] == role and row["adjusted"]]
        texts = [f"{row['endpoint']}: {row['arm']} leaves {leaves(row['adjusted'], 3)}" for row in arms]
        rows.append(comparison(claim, [row["adjusted"] for row in arms], texts))
    same = [(e, name, row) for e in joint["directions"] for name, row in equal_compute(found, e)]
    texts = [f"{endpoint}: {beside(found, name, row)} has s = {leaves(row, 2)}" for endpoint, name, row in same]
    rows.append(comparison("the gain vanishes at equal compute", [row for *_, row in same], texts))
    alike = tuned_alike(found["declaration"])
    text = "all were tuned with the same trials" if alike else "the arms were not all tuned with the same trials"
    able = decisions and decisions["least_p"] <= found["declaration"]["alpha"]
    lost = not (able and decisions["both"])
    claim = "the gain vanishes when specialists are tuned alike"
    rows.append(refutation(claim, able and alike, lost, [text]))
    rows += sigma_refutations(joint["sigma"])
    text = [f"shown: {', '.join(decisions['shown']) or 'none'}"] if decisions else []
    rows.append(refutation("there is no gain, or in one direction only", able, lost, text))
    conflicts = found["judges"] or ["no judge of a primary endpoint took part in the training"]
    rows.append(refutation("the gain is seen only in a judge that took part", True, found["judges"], conflicts))
    other = ["needs experiments of its own"]
    return [*rows, refutation("the sign flips across sizes or data sets", False, [], other)]


def leaves(row: dict, digits: int) -> str:
    """A score, and that so few seeds decide nothing."""
    return interval(row, digits) + ("" if row["decidable"] else f" ({row['n']} seeds cannot tell)")


def comparison(claim: str, scores: list[dict], evidence: list[str]) -> dict:
    """A refutation by scores that must be better than 0; those of too few seeds are no test."""
    able = [row for row in scores if row["decidable"]]
    return refutation(claim, able, [row for row in able if not row["better"]], evidence)


def tuned_alike(declaration: dict) -> bool:
    """Did the headline and both specialists have the same trials?"""
    compared = {declaration["headline"], *(endpoint["single"] for endpoint in declaration["endpoints"].values())}
    return bool(declaration["tuning"]) and compared <= {*declaration["tuning"]["arms"]}


def sigma_refutations(sigma: dict) -> list[dict]:
    found = sigma.get("interval")
    text = [f"Sigma in [{found[0]:.3g}, {found[1]:.3g}]"] if found else [sigma.get("reason", "no interval")]
    return [
        refutation("Sigma's interval includes 1 or lies below", found, found and found[0] <= 1, text),
        refutation("Sigma's interval lies below 2 (the literal 1 + 1 > 2)", found, found and found[1] < 2, text),
    ]


def refutation(claim: str, tested: object, failed: object, evidence: list[str]) -> dict:
    state = "not tested" if not tested else "not withstood" if failed else "withstood"
    return {"what would refute it": claim, "state": state, "evidence": "; ".join(evidence)}
