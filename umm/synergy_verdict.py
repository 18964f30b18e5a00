"""What an experiment shows, in plain words: the verdict, and the table of what could have refuted it."""

from __future__ import annotations

from umm.seed_stats import smallest_p

KEYS = {
    "leak": "The instrument leaks",
    "both": "Both directions are shown",
    "one": "One direction is shown",
    "neither": "Neither direction is shown",
    "unfinished": "Not enough runs are in",
}


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
        if joint["decisions"]["shown"]:
            sentences += control_sentences(found, joint["decisions"]["shown"])
    sentences += sigma_sentences(headline, joint["sigma"])
    doubtful = key in ("both", "one") and not withstood(found, joint["decisions"]["shown"])
    title = KEYS[key] + (", with reservations" if doubtful else "")
    return {"key": key, "title": title, "sentences": sentences + caveats(found)}


def withstood(found: dict, shown: list[str]) -> bool:
    """Was the instrument tested, and do the shown gains survive a placebo, all other controls, and equal compute?"""
    for endpoint in shown:
        rows = [row for row in found["controls"] if row["endpoint"] == endpoint and row["adjusted"]]
        equal = equal_compute(found, endpoint)
        survived = [row["adjusted"]["better"] for row in rows] + [row["better"] for _, row in equal]
        if not equal or not any(row["role"] == "placebo" for row in rows) or not all(survived):
            return False
    return bool(found["stop"]) and not found["judges"]


def verdict_key(found: dict, decisions: dict | None) -> str:
    if any(row["leak"] for row in found["stop"]):
        return "leak"
    if decisions is None:
        return "unfinished"
    return "both" if decisions["both"] else "one" if decisions["shown"] else "neither"


def leak_sentence(row: dict) -> str:
    return (
        f"With the partner's gradient stopped, {row['arm']} must equal {row['single']} on {row['endpoint']}, but at "
        f"seed {row['seed']} their errors differ by {100 * row['gap']:.2g} %."
    )


def decision_sentences(found: dict, headline: str, joint: dict) -> list[str]:
    """The two directions, then what may be said of them together."""
    decisions, directions = joint["decisions"], joint["directions"]
    alpha = found["declaration"]["alpha"]
    sentences = [direction_sentence(name, row, decisions) for name, row in directions.items()]
    cost = found["arms"][headline]["compute"]
    at = f"{headline} (with {cost:g} x the specialist's compute on what is shared)"
    if decisions["both"]:
        sentences.append(f"So {at} is better in both directions (intersection-union p = {decisions['p_both']:.3g}).")
    elif len(decisions["shown"]) == 1:
        sentences.append(f"So one direction is shown for {at}, and no more may be claimed.")
    elif len(decisions["shown"]) == 0:
        sentences.append(f"So no gain of {at} is shown. That is not yet evidence of no effect; see the margins below.")
    n = min(row["n"] for row in directions.values())
    if found["declaration"]["test"] == "sign-flip" and smallest_p(n) > alpha:
        sentences.append(f"{n} seeds cannot show anything: the exact test's smallest p is {smallest_p(n):.3g}.")
    return sentences


def direction_sentence(name: str, row: dict, decisions: dict) -> str:
    """One direction: size, interval, p, and where nothing is shown, what could have been."""
    size = f"{abs(row['percent']):.2g} % {'lower' if row['percent'] >= 0 else 'higher'}"
    facts = f"s = {interval(row, 3)}, p = {row['p']:.3g}, {row['n']} seeds"
    text = f"{name}: the error is {size} than that of {row['single']} ({facts})"
    if name in decisions["shown"]:
        return f"{text}: the partner helps."
    if name in decisions["harmed"]:
        return f"{text}: the partner harms."
    if name in decisions["equivalent"]:
        return f"{text}: shown to be equal within the margin of {row['margin']} (p = {row['p_different']:.3g})."
    if name in decisions["no_harm"]:
        return f"{text}: no gain is shown, but no loss beyond the margin of {row['margin']} (p = {row['p_harm']:.3g})."
    return (
        f"{text}: neither help nor harm nor equality within {row['margin']} is shown; an effect of s = "
        f"{row['detectable']:.2g} would have been seen four times in five."
    )


def control_sentences(found: dict, shown: list[str]) -> list[str]:
    """Whether the shown gains survive the controls and equal compute."""
    sentences = []
    for endpoint in shown:
        rows = [row for row in found["controls"] if row["endpoint"] == endpoint and row["adjusted"]]
        if not any(row["role"] == "placebo" for row in rows):
            sentences.append(f"{endpoint}: no placebo arm was run, so the gain may be that of any second loss.")
        for row in rows:
            ahead = f"the gain is {interval(row['adjusted'], 3)} above that of {row['arm']}"
            if row["adjusted"]["better"]:
                sentences.append(f"{endpoint}: {ahead} (p = {row['adjusted']['p']:.3g}): more than {WHY[row['role']]}.")
            else:
                sentences.append(f"{endpoint}: {ahead}, which does not set it apart from {WHY[row['role']]}.")
        sentences += equal_compute_sentences(found, endpoint)
    return sentences


WHY = {
    "placebo": "what any second loss does",
    "distill": "what alignment to the encoder does",
    "more": "what more of the same task does",
}


def equal_compute_sentences(found: dict, endpoint: str) -> list[str]:
    rows = equal_compute(found, endpoint)
    if not rows:
        return [f"{endpoint}: no joint arm had the specialist's compute, so the gain may be that of its larger budget."]
    return [
        f"{endpoint}: at the specialist's compute, {name} has s = {interval(row, 2)} (p = {row['p']:.3g}): "
        + ("the gain remains." if row["better"] else "the gain is not shown there.")
        for name, row in rows
    ]


def equal_compute(found: dict, endpoint: str) -> list[tuple[str, dict]]:
    """[(joint arm, its direction)] of those that spent no more than the specialist."""
    budget = found["arms"][found["declaration"]["endpoints"][endpoint]["single"]]["compute"]
    rows = [
        (name, joint["directions"].get(endpoint))
        for name, joint in found["joint"].items()
        if found["arms"][name]["compute"] <= budget
    ]
    return [(name, row) for name, row in rows if row]


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
        failed = [row for row in arms if not row["adjusted"]["better"]]
        texts = [f"{row['endpoint']}: {row['arm']} leaves {interval(row['adjusted'], 3)}" for row in arms]
        rows.append(refutation(claim, arms, failed, texts))
    same = [(e, name, row) for e in joint["directions"] for name, row in equal_compute(found, e)]
    texts = [f"{endpoint}: {name} has s = {interval(row, 2)}" for endpoint, name, row in same]
    rows.append(refutation("the gain vanishes at equal compute", same, [s for s in same if not s[2]["better"]], texts))
    alike = tuned_alike(found["declaration"])
    text = "all were tuned with the same trials" if alike else "the arms were not all tuned with the same trials"
    lost = failed_directions(decisions)
    rows.append(refutation("the gain vanishes when specialists are tuned alike", alike, lost, [text]))
    rows += sigma_refutations(joint["sigma"])
    text = [f"shown: {', '.join(decisions['shown']) or 'none'}"] if decisions else []
    rows.append(refutation("there is no gain, or in one direction only", decisions, lost, text))
    conflicts = found["judges"] or ["no judge of a primary endpoint took part in the training"]
    rows.append(refutation("the gain is seen only in a judge that took part", True, found["judges"], conflicts))
    other = ["needs experiments of its own"]
    return [*rows, refutation("the sign flips across sizes or data sets", False, [], other)]


def tuned_alike(declaration: dict) -> bool:
    """Did the headline and both specialists have the same trials?"""
    compared = {declaration["headline"], *(endpoint["single"] for endpoint in declaration["endpoints"].values())}
    return bool(declaration["tuning"]) and compared <= {*declaration["tuning"]["arms"]}


def failed_directions(decisions: dict | None) -> bool:
    return not (decisions and decisions["both"])


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
