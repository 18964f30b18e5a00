"""A judge whose relatives took part in training has a conflict of interest and stays out of the headline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MARK = "†"  # beside the judge's name in a table

# Names on one line are one lineage: another size, or a successor trained alike, is not an independent judge.
LINEAGES = (
    ("dino", "dinov2", "dinov3"),
    ("inception", "efficientnet", "convnext", "resnet", "deit", "vit"),  # ImageNet classifiers: one label set
    ("clip", "siglip", "siglip2"),
)


def lineage(family: str) -> tuple[str, ...]:
    """The families related to one, itself included; a name nobody knows has no relatives but itself."""
    return next((names for names in LINEAGES if family in names), (family,))


def conflicts(judges: Mapping[str, Iterable[str]], trained_with: Mapping[str, str]) -> dict[str, str]:
    """The judges to leave out of the headline, with the reason.

    Args:
        judges: {judge: families of its networks}; a judge without weights has none and never conflicts.
        trained_with: {family: what it did in training}, e.g. {"dinov2": "encoder", "vgg": "perceptual loss"}.
    """
    excluded = {}
    for judge, families in judges.items():
        related = {name for family in families for name in lineage(family)}
        roles = [f"{name} took part in training ({role})" for name, role in trained_with.items() if name in related]
        if roles:
            excluded[judge] = f"{judge}: {', '.join(roles)}"
    return excluded


def marked(judge: str, excluded: Mapping[str, str]) -> str:
    """The judge's name as a table prints it."""
    return f"{judge} {MARK}" if judge in excluded else judge
