"""The drawn world: truthful answers, balanced answers, splits that share nothing."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from crossmodal.training.shapes import (
    COLORS,
    IMAGE_SIZE,
    KINDS,
    SHAPES,
    SIMPLE_KINDS,
    Question,
    Thing,
    draw_rows,
    draw_scene,
    facts_dataset,
    facts_of,
    questions_about,
    sample_scene,
    shapes_dataset,
)


ANSWERS = {
    "exists": {"yes", "no"},
    "color": set(COLORS),
    "shape": set(SHAPES),
    "count": set("0123"),
    "place": {"left", "right", "top", "bottom"},
    "relation": {"yes", "no", "left", "right", "above", "below"},
    "comparison": {"yes", "no"},
}
# Where the wording says which answers there are, and they are two.
CHANCE = {kind: 1 / len(answers) for kind, answers in ANSWERS.items()} | {"place": 0.5, "relation": 0.5}


@pytest.fixture(scope="module")
def train():
    return draw_rows(1000)


@pytest.fixture(scope="module")
def test():
    return draw_rows(300, split="test")


def count_answers(rows, key):
    counts = defaultdict(Counter)
    for row in rows:
        counts[key(row)][row["answer"]] += 1
    return counts


def test_rows_hold_an_image_and_a_question_per_kind(train):
    for row in train[:100]:
        assert row.keys() == {"image", "image_id", "question", "answer", "kind"}
        assert row["image"].mode == "RGB"
        assert row["image"].size == (IMAGE_SIZE, IMAGE_SIZE)
        assert row["question"].endswith("?")
    kinds_per_image = Counter((row["image_id"], row["kind"]) for row in train)
    assert max(n for (_, kind), n in kinds_per_image.items() if kind != "relation") == 1
    assert Counter(n for (_, kind), n in kinds_per_image.items() if kind == "relation").most_common(1)[0][0] == 3
    assert len({(row["image_id"], row["question"]) for row in train}) > 0.98 * len(train)
    assert {row["image_id"] for row in train} == set(range(1000))


def test_same_seed_repeats_the_rows_and_another_does_not():
    first, again, other = draw_rows(5), draw_rows(5), draw_rows(5, seed=1)
    assert first == again
    assert first[0]["image"].tobytes() != other[0]["image"].tobytes()


def test_more_images_only_add_rows(train):
    assert draw_rows(5) == train[: len(draw_rows(5))]


def test_no_image_is_in_two_splits(train, test):
    splits = [train, test, draw_rows(300, split="validation")]
    images = [{hash(row["image"].tobytes()) for row in rows} for rows in splits]
    assert len(set.union(*images)) == sum(map(len, images)) == 1600


def test_every_kind_has_all_its_answers_equally_often(train):
    counts = count_answers(train, key=lambda row: row["kind"])
    assert counts.keys() == set(KINDS)
    for kind, answers in counts.items():
        assert answers.keys() == ANSWERS[kind]
        assert max(answers.values()) <= 1.15 * min(answers.values()), (kind, answers)


def test_question_text_alone_predicts_little_beyond_chance(train, test):
    """A text's commonest answer in training, or else its kind's, is hardly better than a guess."""
    by_text = count_answers(train, key=lambda row: row["question"])
    by_kind = count_answers(train, key=lambda row: row["kind"])
    right = defaultdict(list)
    for row in test:
        counts = by_text.get(row["question"]) or by_kind[row["kind"]]
        right[row["kind"]].append(counts.most_common(1)[0][0] == row["answer"])
    for kind, hits in right.items():
        assert np.mean(hits) < CHANCE[kind] + 0.15, (kind, np.mean(hits))
    overall = np.mean(sum(right.values(), []))
    assert overall < 0.5, overall


def test_wording_does_not_tell_the_answer(train):
    by_opening = count_answers(train, key=lambda row: " ".join(row["question"].split()[:2]))
    for opening, answers in by_opening.items():
        if answers.keys() == {"yes", "no"}:
            share = answers["yes"] / answers.total()
            assert 0.4 < share < 0.6, (opening, share)


def test_kinds_are_equally_frequent_where_fewer_are_asked():
    kinds = Counter(row["kind"] for row in draw_rows(300, questions_per_image=1))
    assert kinds.total() == 300
    assert max(kinds.values()) - min(kinds.values()) <= 5, kinds


def test_kinds_may_be_chosen():
    kinds = Counter(row["kind"] for row in draw_rows(100, kinds=SIMPLE_KINDS))
    assert kinds.keys() == set(SIMPLE_KINDS)


def test_things_may_all_be_different():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = sample_scene(rng, different=True)
        assert len({thing.color for thing in scene}) == len(scene)
        assert len({thing.shape for thing in scene}) == min(3, len(scene))
    rows = draw_rows(200, kinds=SIMPLE_KINDS, different=True)
    # What color a thing has is asked of nearly every image, and not of lone things alone.
    assert sum(row["kind"] == "color" for row in rows) > 0.9 * 200


def test_things_lie_apart_and_inside_the_image():
    rng = np.random.default_rng(0)
    sizes = Counter()
    for _ in range(200):
        scene = sample_scene(rng)
        sizes[len(scene)] += 1
        inked = [np.asarray(draw_scene([thing], rng)).min(axis=-1) < 180 for thing in scene]
        assert np.sum(inked, axis=0).max() == 1, scene
        assert not any(ink[[0, -1]].any() or ink[:, [0, -1]].any() for ink in inked), scene
    assert sizes.keys() == {1, 2, 3, 4}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_a_thing_is_painted_in_its_color_at_its_place_on_light_paper(shape, color):
    thing = Thing(shape, color, 20.0, 44.0, 9.0)
    image = np.asarray(draw_scene([thing], np.random.default_rng(0)), dtype=int)
    distance = {name: np.abs(image[44, 20] - value).max() for name, value in COLORS.items()}
    assert min(distance, key=distance.get) == color, distance
    assert image[20, 44].min() > 230
    inked = (image.min(axis=-1) < 200).sum()
    assert 100 < inked < np.pi * 9.5**2, inked


# A red circle and triangle, one below the other, left of two blue squares.
SCENE = [
    Thing("circle", "red", 15.0, 30.0, 8.0),
    Thing("square", "blue", 45.0, 15.0, 8.0),
    Thing("square", "blue", 45.0, 45.0, 8.0),
    Thing("triangle", "red", 20.0, 55.0, 8.0),
]


@pytest.mark.parametrize(
    ("kind", "words", "answer"),
    [
        ("exists", ("red circle",), "yes"),
        ("exists", ("blue circle",), "no"),
        ("exists", ("green shape",), "no"),
        ("exists", ("square",), "yes"),
        ("count", ("square",), "2"),
        ("count", ("red shape",), "2"),
        ("count", ("yellow shape",), "0"),
        ("relation", ("red circle", "above", "red triangle"), "yes"),
        ("relation", ("red circle", "below", "red triangle"), "no"),
        ("relation", ("triangle", "below", "circle"), "yes"),
        ("relation", ("triangle", "above or below", "circle"), "below"),
        ("relation", ("circle", "above or below", "triangle"), "above"),
        ("place", ("circle", "on the left or on the right"), "left"),
        ("place", ("red triangle", "at the top or at the bottom"), "bottom"),
        ("comparison", ("square", "circle"), "yes"),
        ("comparison", ("circle", "square"), "no"),
        ("comparison", ("red shape", "green shape"), "yes"),
    ],
)
def test_questions_have_their_true_answer(kind, words, answer):
    answers = {(q.kind, q.words): q.answer for q in questions_about(SCENE)}
    assert answers[kind, words] == answer


@pytest.mark.parametrize(
    ("kind", "words", "why"),
    [
        ("color", ("square",), "two squares"),
        ("color", ("circle",), "circle and triangle are both red: the picture alone would tell"),
        ("shape", ("red",), "two red things"),
        ("relation", ("circle", "left of", "square"), "two squares"),
        ("relation", ("circle", "left of", "triangle"), "nearly the same column"),
        ("relation", ("circle", "left or right of", "triangle"), "nearly the same column"),
        ("relation", ("red shape", "left or right of", "green shape"), "two red things, and no green one"),
        ("place", ("square", "on the left or on the right"), "two squares"),
        ("place", ("circle", "at the top or at the bottom"), "nearly in the middle"),
        ("comparison", ("red shape", "blue shape"), "a tie"),
    ],
)
def test_questions_without_one_clear_answer_are_not_asked(kind, words, why):
    assert (kind, words) not in {(q.kind, q.words) for q in questions_about(SCENE)}, why


def test_color_and_shape_are_asked_of_things_that_differ_and_of_a_lone_thing():
    circle, square = Thing("circle", "red", 15.0, 30.0, 8.0), Thing("square", "blue", 45.0, 30.0, 8.0)
    about_circle = {
        Question("color", "shape", ("circle",), "red"),
        Question("shape", "color", ("red",), "circle"),
    }
    about_square = {
        Question("color", "shape", ("square",), "blue"),
        Question("shape", "color", ("blue",), "square"),
    }
    for scene, expected in (([circle], about_circle), ([circle, square], about_circle | about_square)):
        assert {q for q in questions_about(scene) if q.kind in ("color", "shape")} == expected


def test_dataset_has_the_columns_of_a_hub_vqa_set_and_the_pixels_of_the_rows():
    rows, dataset = draw_rows(3, split="validation", seed=4), shapes_dataset(3, split="validation", seed=4)
    assert dataset.column_names == ["image", "image_id", "question", "answer", "kind"]
    assert len(dataset) == len(rows)
    for row, stored in zip(rows, dataset, strict=True):
        assert stored["image"].tobytes() == row["image"].tobytes()
        assert {**stored, "image": None} == {**row, "image": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 1, "split": "dev"}, "split='dev' is unknown"),
        ({"num_images": 0}, "num_images=0"),
        ({"num_images": 1, "questions_per_image": 10}, "questions_per_image=10"),
        ({"num_images": 1, "kinds": ("plce",)}, "kinds has .'plce'."),
    ],
)
def test_bad_arguments_are_named_with_what_is_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_rows(**arguments)


def test_facts_say_all_that_questions_ask_about():
    scene = [Thing("circle", "red", 12, 12, 9), Thing("circle", "blue", 50, 50, 9)]
    facts = facts_of(scene)
    assert {"2 circle", "1 red circle", "1 red left", "1 red top", "1 blue bottom", "1 circle right"} <= facts
    assert {"1 square", "2 red", "3 circle", "1 red right"}.isdisjoint(facts)
    rows, again = facts_dataset(6), facts_dataset(6)
    assert rows["facts"] == again["facts"] and len(set(rows["image_id"])) == 6
    assert facts_dataset(6, "test")["facts"] != rows["facts"]
