"""Metrics of captions: the tokens and the scores of the official evaluation."""

import shutil
from pathlib import Path

import pytest
from crossmodal.training.metrics.captions.ptb import ptb_tokens


METRIC = Path(__file__).parents[1] / "training" / "metrics" / "captions"

# What Stanford's PTBTokenizer of the official evaluation (CoreNLP 3.4.1) gives.
OFFICIAL = {
    "A woman stands in the dining area, at the table.": "a woman stands in the dining area at the table",
    "A man's dog isn't here, they're gone.": "a man 's dog is n't here they 're gone",
    "I can't cannot gonna wanna lemme gimme don't": "i ca n't can not gon na wan na lem me gim me do n't",
    "A U.S. flag at 3 p.m. on St. Mark's St.": "a u.s. flag at 3 p.m. on st. mark 's st.",
    "He said \"hello\" and 'bye'.": "he said hello and bye",
    "A (small) cat [with] {hat}": "a -lrb- small -rrb- cat -lsb- with -rsb- -lcb- hat -rcb-",
    "50% off $5 items #1 & more": "50 % off $ 5 items # 1 & more",
    "and/or 1/2 cup of 3,000 beans": "and/or 1/2 cup of 3,000 beans",
    "a T-shirt -- red... blue": "a t-shirt red blue",
    "Mr. Smith and Dr. Jones vs. J. K. Rowling": "mr. smith and dr. jones vs. j. k. rowling",
    "it's 8:25 or 10-12 o'clock": "it 's 8:25 or 10-12 o'clock",
    "e-mail me@x.com or http://x.com/a?b=1": "e-mail me@x.com or http://x.com/a?b=1",
    "rock'n'roll 'n' roll the dogs' bowls": "rock 'n' roll 'n' roll the dogs bowls",
    "two 6-year-olds and a 1970's car": "two 6-year-olds and a 1970 's car",
    "a b&w AT&T photo": "a b & w at&t photo",
    "hello!!! what?? ok;": "hello !!! what ?? ok",
    "5' 10\" tall": "5 10 tall",
    "half-eaten pizza,sitting on a plate.It is good": "half-eaten pizza sitting on a plate.it is good",
    "£5 €10 cents": "# 5 $ 10 cents",
    "An umbrella . .. ... ....": "an umbrella",
    "y'all ain't 'tis 'twas": "y' all ai n't 't is 't was",
    "Jan. 5 is on Mon. in Calif.": "jan. 5 is on mon. in calif.",
    "No. 5 of vol. 3": "no. 5 of vol 3",
    "café naïve ’s it’s “quoted” — dash – n": "café naïve 's it 's quoted dash n",
    "1st 2nd 3rd 4th 1980s 20s": "1st 2nd 3rd 4th 1980s 20s",
    "10,000.50 1.5 .5 -5 +5": "10,000.50 1.5 .5 -5 +5",
    "women's/men's shoes w/o w/ n/a": "women 's / men 's shoes w/o w / n/a",
    "Puma Men V.11 Cat, Vintage No.1 Air Force 1 '07": "puma men v. 11 cat vintage no. 1 air force 1 '07",
    "Tie+Cufflink+Pocket square - Lunarfly+2 Cr_Ess Reid&Taylor": (
        "tie + cufflink + pocket square lunarfly +2 cr_ess reid & taylor"
    ),
}


@pytest.mark.parametrize("text", OFFICIAL)
def test_tokens_are_those_of_the_official_evaluation(text):
    assert " ".join(ptb_tokens(text)) == OFFICIAL[text]


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer needs Java")
def test_the_official_tokenizer_says_the_same():
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    found = ptbtokenizer.PTBTokenizer().tokenize({0: [{"caption": text} for text in OFFICIAL]})[0]
    assert found == list(OFFICIAL.values())


@pytest.fixture(scope="module")
def metric():
    pytest.importorskip("pycocoevalcap")
    evaluate = pytest.importorskip("evaluate")
    return evaluate.load(str(METRIC))


def test_scores_are_those_of_the_official_scorers(metric):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    predictions = ["A red car!", "a dog on a bed", ""]
    references = [["a red car.", "the car is red"], ["a dog lies on a bed", "one dog"], ["a cat"]]
    found = metric.compute(predictions=predictions, references=references, meteor=False)
    wanted = {0: ["a red car", "the car is red"], 1: ["a dog lies on a bed", "one dog"], 2: ["a cat"]}
    given = {0: ["a red car"], 1: ["a dog on a bed"], 2: [""]}
    bleu, _ = Bleu(4).compute_score(wanted, given, verbose=0)
    assert [found[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(bleu)
    assert found["cider_d"] == pytest.approx(Cider().compute_score(wanted, given)[0]) and found["cider_d"] > 1
    # All eight words that are there are in a reference; the closest references have eleven in all.
    assert found["bleu1"] == pytest.approx(2.718281828 ** (1 - 11 / 8), rel=1e-6)
    assert "meteor" not in found and 0.5 < found["rouge_l"] < 0.7


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_comes_where_java_is(metric):
    found = metric.compute(predictions=["a red car", "a dog"], references=[["a red car"], ["a cat"]])
    assert 0.3 < found["meteor"] < 1


def test_wrong_input_is_named(metric):
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        metric.compute(predictions=["a"], references=[["a"], ["b"]])
    with pytest.raises(ValueError, match="row 1 has no reference with a word"):
        metric.compute(predictions=["a", "b"], references=[["a"], ["", "..."]], meteor=False)
