"""VQA accuracy and the normalisation of answers before it, as the official evaluation has them.

Antol et al. 2015 (arXiv 1505.00468) and the evaluation server of VQAv2. Single-answer data sets (GQA, CLEVR, easy-VQA,
shapes) are scored by exact match after the same normalisation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

from umm.data.base import Question

VERSION = 1  # raised when the definition changes

NUMBERS = "zero one two three four five six seven eight nine ten".split()
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes and colons stay, periods have a rule of their own
PERIOD = re.compile(r"\.(?!\d)")  # the official pattern's look-behind is mistyped and always true
THOUSANDS = re.compile(r"\d,\d")
# Written without one of its apostrophes, a word gets it back: "dont" -> "don't", "couldnt've" -> "couldn't've".
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


@functools.cache
def replacements() -> dict[str, str]:
    """Word -> word, of numbers and contractions."""
    table = {number: str(value) for value, number in enumerate(NUMBERS)} | {"none": "0", "somebody'd": "somebodyd"}
    for word in CONTRACTIONS.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in places}
    return table


@functools.lru_cache(maxsize=100_000)
def normalise(answer: str) -> str:
    """An answer as the official evaluation compares it.

    In order: one line; punctuation dropped, or a space where it joins two words; periods dropped except before a digit;
    lower case; number words as digits; articles dropped; contractions spelt with their apostrophes.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    said, thousands = text, THOUSANDS.search(text) is not None
    for mark in PUNCTUATION:
        alone = f"{mark} " in said or f" {mark}" in said
        text = text.replace(mark, "" if alone or thousands else " ")
    words = PERIOD.sub("", text).lower().split()
    table = replacements()
    return " ".join(table.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the raters of min(1, how many of the others gave this answer / 3): 0, 0.3, 0.6, 0.9 or 1 of ten.

    A single answer leaves no others: exact match.
    """
    given = normalise(prediction)
    agree = [normalise(answer) == given for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    total = sum(agree)
    return sum(min(1.0, (total - mine) / 3) for mine in agree) / len(agree)


def raters(question: Question) -> tuple[str, ...]:
    """All answers to a question: the raters', else the one."""
    return question.answers or (question.answer,)


def score(prediction: str, question: Question) -> float:
    """The accuracy of one prediction, in [0, 1]."""
    return accuracy(prediction, raters(question))


def soft_scores(question: Question) -> dict[str, float]:
    """{normalised answer: the accuracy it would get}, of every answer given."""
    return {answer: score(answer, question) for answer in dict.fromkeys(map(normalise, raters(question)))}


def common_answers(questions: Iterable[Question], limit: int | None) -> list[str]:
    """Normalised answers of a training set by falling frequency, equally frequent ones by spelling; at most `limit`.

    Of several raters' answers the most frequent one counts, so that an odd rater adds none.
    """
    counts: dict[str, int] = {}
    for question in questions:
        answer = normalise(question.answer)
        counts[answer] = counts.get(answer, 0) + 1
    counts.pop("", None)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:limit]
