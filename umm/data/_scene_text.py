"""What can be said and asked about a scene.

Balance by construction. Yes/no answers are decided by a coin before the wording is chosen, from wordings that are
equally likely either way. Open questions ask for a shape by naming colours only, or for a colour by naming shapes
only: since scenes are as likely with any two shapes (or colours) swapped, every answer is equally likely given the
words. Counts ask about all objects or the theme value, whose numbers are uniform. Which templates a scene tries is
drawn before the scene is looked at, and one that the scene has no clear answer for is left out, not replaced:
otherwise being asked would itself be a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from umm.data._scenes import VALUES, Dice, Scene, Thing
from umm.data.base import Question

MARGIN = 0.1  # of the side: "to the left of" needs centres this far apart, nearer ones are not asked about
SIDES = {  # relation -> (axis, sign of the first object's offset)
    "to the left of": ("x", -1),
    "to the right of": ("x", 1),
    "above": ("y", -1),
    "below": ("y", 1),
}
OPPOSITE = {"shape": "colour", "colour": "shape"}
FAMILIES = list(VALUES)


# ------------------------------------------------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    """One sentence, a clause an object, the large one first."""
    clauses = [f"a {thing.size} {thing.colour} {thing.shape} {position(thing)}" for thing in scene.things]
    listed = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    return f"{listed[0].upper()}{listed[1:]}, on a {scene.background.kind} background."


def position(thing: Thing) -> str:
    """Which ninth of the picture the centre lies in, in words."""
    column = ("left", "", "right")[int(thing.x * 3)]
    row = ("top", "", "bottom")[int(thing.y * 3)]
    if row:
        return f"at the {row} {column}".rstrip()
    return f"on the {column}" if column else "in the centre"


# ------------------------------------------------------------------------------------------------------ questions


def questions(scene: Scene, dice: Dice, tries: int) -> list[Question]:
    """At most `tries` questions, spread evenly over the kinds, no template twice; each has one clear answer."""
    asked = []
    for kind, template in _mixed_templates(dice, tries):
        pair = template(scene, dice)
        if pair:
            asked.append(Question(*pair, kind=kind))
    return asked


def _mixed_templates(dice: Dice, tries: int) -> Iterator[tuple[str, Callable]]:
    queues = {kind: dice.mixed(TEMPLATES[kind]) for kind in dice.mixed(list(TEMPLATES))}
    while tries > 0 and any(queues.values()):
        for kind, queue in queues.items():
            if queue and tries > 0:
                tries -= 1
                yield kind, queue.pop()


# A template takes (scene, dice) and gives (text, answer), or None where the scene has no clear answer.
QA = tuple[str, str] | None


def _value_exists(scene: Scene, dice: Dice) -> QA:
    family, yes = dice.pick(FAMILIES), dice.coin()
    present = _values(scene, family)
    options = [value for value in VALUES[family] if (value in present) == yes]
    return f"Is there {_a(_noun(family, dice.pick(options)))}?", _yes(yes)


def _pair_exists(scene: Scene, dice: Dice) -> QA:
    """Either a combination that is there, or one that shares its colour or its shape with an object."""
    present = sorted({(thing.colour, thing.shape) for thing in scene.things})
    yes = dice.coin()
    near = [
        (colour, shape)
        for colour in VALUES["colour"]
        for shape in VALUES["shape"]
        if (colour, shape) not in present and any(colour == c or shape == s for c, s in present)
    ]
    return f"Is there {_a(' '.join(dice.pick(present if yes else near)))}?", _yes(yes)


def _total(scene: Scene, dice: Dice) -> QA:
    return "How many objects are there?", str(len(scene.things))


def _theme_count(scene: Scene, dice: Dice) -> QA:
    return f"How many {_plural(_noun(*scene.theme))} are there?", str(scene.theme_count)


def _shape_or_colour(scene: Scene, dice: Dice) -> QA:
    """What shape is the red object? What colour is the circle?"""
    named = dice.pick(FAMILIES)
    unique = _unique(scene, named)
    if not unique:
        return None
    thing, asked = dice.pick(unique), OPPOSITE[named]
    return f"What {asked} is the {_name(thing, named)}?", getattr(thing, asked)


def _large_one(scene: Scene, dice: Dice) -> QA:
    asked = dice.pick(FAMILIES)
    return f"What {asked} is the large object?", getattr(scene.things[0], asked)


def _size(scene: Scene, dice: Dice) -> QA:
    """The size is drawn before the object, and the object before asking whether it has a name of its own."""
    if len(scene.things) == 1:
        return None
    thing = scene.things[0] if dice.coin() else dice.pick(scene.things[1:])
    named = dice.pick(FAMILIES)
    return (f"What size is the {_name(thing, named)}?", thing.size) if thing in _unique(scene, named) else None


def _is_beside(scene: Scene, dice: Dice) -> QA:
    named = _named(scene)
    clear = [
        (one, other, axis)
        for one in named
        for other in named
        for axis in "xy"
        if abs(getattr(one[0], axis) - getattr(other[0], axis)) >= MARGIN
    ]
    if not clear:
        return None
    (a, a_names), (b, b_names), axis = dice.pick(clear)
    after, yes = getattr(a, axis) > getattr(b, axis), dice.coin()
    relation = next(r for r, (along, sign) in SIDES.items() if along == axis and ((sign > 0) == after) == yes)
    return f"Is the {dice.pick(a_names)} {relation} the {dice.pick(b_names)}?", _yes(yes)


def _what_is_beside(scene: Scene, dice: Dice) -> QA:
    """What shape is the object to the left of the red object?"""
    clear = []
    for named in FAMILIES:
        for reference in _unique(scene, named):
            for relation, (axis, sign) in SIDES.items():
                offsets = [(sign * (getattr(t, axis) - getattr(reference, axis)), t) for t in scene.things]
                there = [thing for offset, thing in offsets if offset >= MARGIN]
                doubtful = [thing for offset, thing in offsets if abs(offset) < MARGIN and thing is not reference]
                if len(there) == 1 and not doubtful:
                    clear.append((named, reference, relation, there[0]))
    if not clear:
        return None
    named, reference, relation, thing = dice.pick(clear)
    asked = OPPOSITE[named]
    return f"What {asked} is the object {relation} the {_name(reference, named)}?", getattr(thing, asked)


def _more(scene: Scene, dice: Dice) -> QA:
    """Are there more circles than squares? About two values that are there, if their numbers differ."""
    family = dice.pick(FAMILIES)
    values = _values(scene, family)
    counts = {value: values.count(value) for value in VALUES[family]}
    unequal = [(a, b) for a in VALUES[family] for b in VALUES[family] if counts[a] > counts[b]]
    both = [(a, b) for a, b in unequal if counts[b]]
    more, fewer = dice.pick(both or unequal)
    yes = dice.coin()
    first, second = (more, fewer) if yes else (fewer, more)
    return f"Are there more {_plural(_noun(family, first))} than {_plural(_noun(family, second))}?", _yes(yes)


def _larger(scene: Scene, dice: Dice) -> QA:
    named, yes = _named(scene), dice.coin()
    small = [names for thing, names in named if thing.size == "small"]
    if not small or named[0][0].size == "small":
        return None
    names = [dice.pick(named[0][1]), dice.pick(dice.pick(small))]
    first, second = names if yes else reversed(names)
    return f"Is the {first} larger than the {second}?", _yes(yes)


def _which_is_larger(scene: Scene, dice: Dice) -> QA:
    """Both named by the same attribute, which is the answer."""
    family, large = dice.pick(FAMILIES), scene.things[0]
    unique = _unique(scene, family)
    if large not in unique or len(unique) == 1:
        return None
    first, second = dice.mixed([large, dice.pick(unique[1:])])
    return f"Which is larger, the {_name(first, family)} or the {_name(second, family)}?", getattr(large, family)


TEMPLATES: dict[str, list[Callable[[Scene, Dice], QA]]] = {
    "existence": [_value_exists, _pair_exists],
    "count": [_total, _theme_count],
    "attribute": [_shape_or_colour, _large_one, _size],
    "relation": [_is_beside, _what_is_beside],
    "comparison": [_more, _larger, _which_is_larger],
}


# ---------------------------------------------------------------------------------------------------------- names


def _named(scene: Scene) -> list[tuple[Thing, list[str]]]:
    """Objects that their colour or their shape alone singles out, in scene order, with the names that gives them."""
    names = [(thing, [_name(thing, f) for f in FAMILIES if thing in _unique(scene, f)]) for thing in scene.things]
    return [(thing, found) for thing, found in names if found]


def _values(scene: Scene, family: str) -> list[str]:
    return [getattr(thing, family) for thing in scene.things]


def _unique(scene: Scene, family: str) -> list[Thing]:
    """Objects that no other object shares this attribute with."""
    values = _values(scene, family)
    return [thing for thing, value in zip(scene.things, values) if values.count(value) == 1]


def _name(thing: Thing, family: str) -> str:
    return _noun(family, getattr(thing, family))


def _noun(family: str, value: str) -> str:
    return f"{value} object" if family == "colour" else value


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"
