"""VQA accuracy as pure functions, without `evaluate`, which takes seconds to import.

The pinned version is the official `vqaEval.py` of GT-Vision-Lab/VQA as it stood from October 2016 (commit
458a8b2) to March 2021, the years of most published VQA v2 numbers:

* a prediction is always cleaned in full (`normalize_answer`);
* annotators' answers stay as they are when all agree, and otherwise have only their punctuation cleaned.

The later commit a013f00 cleans both sides in full when annotators disagree, and neither when they agree. The
two differ only where answers are not stored clean; those of VQA v2 mostly are.
"""

import re
from collections import Counter
from collections.abc import Sequence


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # the apostrophe and the colon stay
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # 3.5 keeps its period
_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(i) for i, word in enumerate(_COUNTS)}
_ARTICLES = frozenset(("a", "an", "the"))

# The official map restores a contraction that lacks one of its apostrophes. Forms that are words without it
# (she'll, we're, i'd) are absent there too, and its capitalised keys ("Im") never match, the text being
# lower-case by then.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, c in enumerate(word) if c == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # a slip in the official map, kept so that scores agree


def _clean_punctuation(text: str) -> str:
    """Drop marks that touch a space anywhere in `text`, all marks if it holds 1,000; space out others."""
    has_number = _DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        drop = has_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if drop else " ")
    return _PERIOD.sub("", cleaned)


def normalize_answer(text: str) -> str:
    """Clean an answer in the official order: punctuation, case, number words, articles, contractions.

    >>> normalize_answer("The two DOGS, dont bark.")
    "2 dogs don't bark"
    """
    text = _clean_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _leave_one_out(matches: int, n: int) -> float:
    """Mean of min(matches among the others / 3, 1) over the `n` ways to leave one annotator out.

    Where the others are fewer than 3, all of them suffice; with a single annotator a match is 1.
    """
    if n == 1:
        return float(matches)
    enough = min(3, n - 1)
    without_a_match = matches * min((matches - 1) / enough, 1)
    without_another = (n - matches) * min(matches / enough, 1)
    return (without_a_match + without_another) / n


def vqa_score(prediction: str, references: Sequence[str]) -> float:
    """Score one answer in [0, 1] against its annotators' answers, ten in VQA v2.

    A single reference, as where a question has one true answer, is an exact match with both sides normalised.
    """
    _check_references(references)
    if len(references) == 1:
        references = [normalize_answer(references[0])]
    elif len(set(references)) > 1:
        references = [_clean_punctuation(answer) for answer in references]
    return _leave_one_out(list(references).count(normalize_answer(prediction)), len(references))


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str] | str]) -> float:
    """Mean `vqa_score` in [0, 1]; `references` holds per prediction a list of answers, or a single answer."""
    check_lengths(predictions, references)
    answer_lists = ([answers] if isinstance(answers, str) else answers for answers in references)
    return sum(map(vqa_score, predictions, answer_lists)) / len(predictions)


def soft_targets(answers: Sequence[str]) -> dict[str, float]:
    """Normalised answers of one question with their scores, best first: the targets of soft-label training.

    With ten annotators, an answer that n of them gave scores min(1, 0.3 n). Equals `vqa_score` on clean
    answers; others are cleaned in full here, so that "two" and "2" are one class of the answer vocabulary.

    >>> soft_targets(["two"] * 8 + ["3", "many"])
    {'2': 1.0, '3': 0.3, 'many': 0.3}
    """
    _check_references(answers)
    counts = Counter(map(normalize_answer, answers))
    return {answer: _leave_one_out(count, len(answers)) for answer, count in counts.most_common()}


def check_lengths(predictions: Sequence[str], references: Sequence[Sequence[str] | str]) -> None:
    """Raise a `ValueError` unless there are as many references as predictions, and at least one."""
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"Got {len(predictions)} predictions and {len(references)} references. Expected the annotators' "
            "answers once per prediction, and at least one. Pass both for the same questions, in one order."
        )


def _check_references(references: Sequence[str]) -> None:
    if isinstance(references, str) or not len(references):
        raise ValueError(
            f"Got references={references!r}. Expected a list with each annotator's answer (ten in VQA v2, at "
            "least one). Wrap a single answer in a list; drop questions without an answer before scoring."
        )
