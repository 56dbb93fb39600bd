"""The drawn world of boxes: what is said of a picture is so, and the words alone tell nothing."""

from collections import Counter, defaultdict

import pytest
from crossmodal.training.boxes import (
    BOX,
    COLORS,
    GAP,
    Thing,
    boxes_dataset,
    draw_boxes,
    facts_dataset,
    facts_of,
    scattered,
    statement,
)


@pytest.fixture(scope="module")
def rows():
    return boxes_dataset(600, "train")


def test_rows_have_the_schema_of_easy_vqa_and_the_size_of_nlvr(rows):
    assert set(rows.column_names) == {"image", "image_id", "question", "answer", "kind"}
    assert rows[0]["image"].size == (3 * BOX + 2 * GAP, BOX)


def test_every_sentence_comes_as_often_with_one_answer_as_with_the_other(rows):
    answers = defaultdict(Counter)
    for question, answer in zip(rows["question"], rows["answer"], strict=True):
        answers[question][answer] += 1
    for question, counts in answers.items():
        if set(counts) <= {"true", "false"}:
            assert counts["true"] == counts["false"], question
    counts = Counter(rows["answer"])
    assert counts["true"] == counts["false"] > 100 and counts["0"] > 0


def test_a_split_and_a_seed_are_repeatable_and_apart(rows):
    again, other = boxes_dataset(600, "train"), boxes_dataset(600, "validation")
    assert again["question"] == rows["question"] and again["answer"] == rows["answer"]
    pictures = {image.tobytes() for image in rows["image"]}
    assert not any(image.tobytes() in pictures for image in other["image"] if len(image.getcolors(10_000)) > 8)


def test_things_are_drawn_where_they_are():
    boxes = [[Thing("blue", "square", 20, 80, 0)], [Thing("black", "circle", 30, 0, 70)], []]
    image = draw_boxes(boxes)
    assert image.getpixel((90, 10)) == COLORS["blue"] and image.getpixel((BOX + GAP + 15, 85)) == COLORS["black"]
    assert image.getpixel((50, 50)) == image.getpixel((BOX + 5, 50)) == image.getpixel((300, 50))
    assert boxes[0][0].walls == {"right", "top"} and boxes[1][0].walls == {"left", "bottom"}


def test_statements_are_judged_as_they_read():
    import random

    rng = random.Random(5)
    yellow, blue = Thing("yellow", "square", 20, 40, 80), Thing("blue", "square", 20, 40, 59)
    towers = [[yellow], [yellow, blue], [blue, blue, yellow]]
    expected = {
        "there is a tower with a blue block at the top": True,
        "there is a tower with a blue block over a yellow block": True,
        "there is a tower with a yellow block below a blue block": True,
        "there is a tower with a black block at the base": False,
        "there is a tower with only yellow blocks": True,
        "there is exactly one yellow block as the base of a tower": False,
    }
    seen = {}
    for _ in range(40_000):
        sentence = statement(rng, of_tower=True)
        if sentence.text in expected:
            seen[sentence.text] = bool(sentence.holds(towers))
    assert seen == expected


def test_scattered_things_lie_apart_and_inside():
    import random

    rng = random.Random(0)
    for _ in range(200):
        things = scattered(rng)
        assert 1 <= len(things) <= 8
        for i, a in enumerate(things):
            assert 0 <= a.x <= BOX - a.size and 0 <= a.y <= BOX - a.size
            for b in things[i + 1 :]:
                assert a.x + a.size < b.x or b.x + b.size < a.x or a.y + a.size < b.y or b.y + b.size < a.y


def test_facts_say_all_that_is_in_the_boxes():
    yellow, blue = Thing("yellow", "square", 20, 40, 80), Thing("blue", "square", 20, 40, 59)
    facts = facts_of([[yellow, blue], [yellow]])
    assert {"2 yellow", "2 yellow square", "3 item", "1 blue over yellow", "1 yellow top", "2 yellow base"} <= facts
    assert {"3 yellow", "1 black", "2 blue", "1 yellow over blue"}.isdisjoint(facts)
    assert "1 yellow at wall" in facts_of([[Thing("yellow", "circle", 10, 0, 50)]])
    rows = facts_dataset(12)
    assert len(rows) == 12 and len(set(rows["image_id"])) == 12 and all(rows["facts"])
