"""VQA accuracy: the cleaning of answers, the scores, and the metric as `evaluate` loads it."""

import subprocess
import sys
from pathlib import Path

import pytest
from crossmodal.training.metrics.vqa_accuracy.vqa_scoring import (
    normalize_answer,
    soft_targets,
    vqa_accuracy,
    vqa_score,
)
from hypothesis import given
from hypothesis import strategies as st


METRIC = Path(__file__).parents[1] / "training" / "metrics" / "vqa_accuracy"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param("red\nand\tblue ", "red and blue", id="newline and tab become spaces"),
        pytest.param("black/white", "black white", id="a mark between letters becomes a space"),
        pytest.param("yes, no", "yes no", id="a mark next to a space is removed"),
        pytest.param("red- or t-shirt", "red or tshirt", id="one such place removes the mark everywhere"),
        pytest.param("red, t-shirt", "red t shirt", id="but leaves other marks to their own rule"),
        pytest.param("1,000 km/h", "1000 kmh", id="a comma between digits removes all marks"),
        pytest.param("what?!", "what", id="closing marks leave no trailing space"),
        pytest.param('[{("x")}]=+\\_-><@`;', "x", id="every official mark is known"),
        pytest.param("12:30", "12:30", id="a colon is no mark"),
        pytest.param("St. Louis.", "st louis", id="periods are removed"),
        pytest.param("3.5 m.", "3.5 m", id="but stay before a digit"),
        pytest.param("ReD", "red", id="lower case"),
        pytest.param("None", "0", id="none is zero"),
        pytest.param(
            "zero one two three four five six seven eight nine ten",
            "0 1 2 3 4 5 6 7 8 9 10",
            id="number words to ten",
        ),
        pytest.param("eleven", "eleven", id="and no further"),
        pytest.param("A dog on the mat in an hour", "dog on mat in hour", id="articles go"),
        pytest.param("theater", "theater", id="only whole words are articles"),
        pytest.param("dont", "don't", id="a contraction gets its apostrophe"),
        pytest.param("couldnt've couldn'tve", "couldn't've couldn't've", id="or its missing one of two"),
        pytest.param("yalld've", "yalld've", id="but not two of three"),
        pytest.param("'ows'at twas oclock", "'ow's'at 'twas o'clock", id="odd contractions"),
        pytest.param("somebody'd", "somebodyd", id="the official slip is kept"),
        pytest.param("its shell well", "its shell well", id="words are no contractions"),
        pytest.param("dog's", "dog's", id="other apostrophes stay"),
        pytest.param("", "", id="nothing stays nothing"),
    ],
)
def test_answers_are_normalised_by_the_official_rules(given, expected):
    assert normalize_answer(given) == expected


@given(st.text(alphabet="abcdehnot '.,-!?13", max_size=20))
def test_normalised_answers_have_single_spaces_and_no_capitals_or_articles(text):
    answer = normalize_answer(text)
    assert answer == " ".join(answer.lower().split())
    assert not {"a", "an", "the"} & set(answer.split())


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_score_is_the_mean_over_leave_one_out_sets_of_ten_annotators(agree, score):
    references = ["yes"] * agree + ["no"] * (10 - agree)
    assert vqa_score("yes", references) == pytest.approx(score, abs=1e-12)
    assert soft_targets(references).get("yes", 0.0) == pytest.approx(score, abs=1e-12)


@given(st.lists(st.sampled_from(["red", "green", "blue", "3"]), min_size=2, max_size=12))
def test_scores_and_soft_targets_equal_the_definition(answers):
    others = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    enough = min(3, len(answers) - 1)
    for answer in ("red", "green", "blue", "3"):
        expected = sum(min(left.count(answer) / enough, 1) for left in others) / len(answers)
        assert vqa_score(answer, answers) == pytest.approx(expected, abs=1e-12)
        assert soft_targets(answers).get(answer, 0.0) == pytest.approx(expected, abs=1e-12)


def test_predictions_are_cleaned_even_where_annotators_agree():
    assert vqa_score("The Two.", ["2"] * 10) == 1.0


def test_annotators_punctuation_is_cleaned_only_where_they_disagree():
    assert vqa_score("t-shirt", ["t-shirt"] * 10) == 0.0  # the prediction is "t shirt" by now
    assert vqa_score("t-shirt", ["t-shirt"] * 9 + ["coat"]) == 1.0


def test_annotators_number_words_and_articles_are_not_cleaned():
    assert vqa_score("two", ["two"] * 9 + ["three"]) == 0.0
    assert vqa_score("the dog", ["the dog"] * 9 + ["cat"]) == 0.0


def test_a_single_reference_is_an_exact_match_of_normalised_answers():
    assert vqa_score("two", ["Two."]) == 1.0
    assert vqa_score("two dogs", ["Two."]) == 0.0
    assert soft_targets(["Two."]) == {"2": 1.0}


@pytest.mark.parametrize("annotators", [1, 2, 3, 4, 10])
def test_unanimous_annotators_give_a_full_score_whatever_their_number(annotators):
    assert vqa_score("yes", ["yes"] * annotators) == 1.0


def test_soft_targets_merge_spellings_and_put_the_best_first():
    targets = soft_targets(["many", "two", "2", "2", "Two.", "3", "3", "3", "four", "five"])
    assert list(targets)[:2] == ["2", "3"]
    assert targets == pytest.approx({"2": 1.0, "3": 0.9, "many": 0.3, "4": 0.3, "5": 0.3})


def test_accuracy_is_the_mean_score_and_takes_lists_and_single_answers():
    assert vqa_accuracy(["2", "red"], [["2"] * 2 + ["3"] * 8, ["blue"] * 10]) == pytest.approx(0.3)
    assert vqa_accuracy(["2", "red"], ["two", "blue"]) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vqa_accuracy(["a", "b"], [["a"]]), "Got 2 predictions and 1 references"),
        (lambda: vqa_accuracy([], []), "Got 0 predictions and 0 references"),
        (lambda: vqa_accuracy(["a"], [[]]), r"references=\[\]"),
        (lambda: vqa_score("yes", "yes"), "Wrap a single answer in a list"),
        (lambda: soft_targets([]), r"references=\[\]"),
    ],
)
def test_bad_input_is_named_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scoring_does_not_import_evaluate():
    code = "import sys, vqa_scoring; assert not {'evaluate', 'datasets', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=METRIC, check=True)


@pytest.mark.slow
def test_evaluate_loads_the_metric_from_its_folder_without_network(tmp_path):
    code = f"""
import evaluate
metric = evaluate.load({str(METRIC)!r})
rows = dict(predictions=["Two.", "no"], references=[["2"] * 2 + ["3"] * 8, ["no"] * 10])
assert metric.compute(**rows) == {{"vqa_accuracy": 0.8}}
assert metric.compute(predictions=["Two."], references=["2"]) == {{"vqa_accuracy": 1.0}}
metric.add_batch(**rows)
assert metric.compute() == {{"vqa_accuracy": 0.8}}
for predictions, references in ((["a", "b"], ["a"]), ([], [])):
    try:
        metric.compute(predictions=predictions, references=references)
    except ValueError as error:
        assert "Expected the annotators' answers once per prediction" in str(error), error
    else:
        raise AssertionError("unequal or empty lists were scored")
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=offline, check=True)
