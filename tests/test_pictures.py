"""The picture of answered questions: written whole, with every part in its color and its place."""

import numpy as np
import pytest
from crossmodal.training import pictures
from crossmodal.training.pictures import answer_grid
from PIL import Image


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels: the layout is in inches."""
    monkeypatch.setattr(pictures, "DPI", 80)


def record(**changes):
    peak = np.zeros((4, 4))
    peak[0, 0] = 1
    return {
        "image": Image.new("RGB", (64, 64), (200, 200, 255)),
        "question": "what color is the circle?",
        "answers": [("red", 0.7), ("blue", 0.2), ("green", 0.1)],
        "truth": "red",
        "attention": peak,
        "modality_weights": {"vision": 0.6, "text": 0.4},
    } | changes


def count_pixels(path, color):
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(axis=-1).sum())


@pytest.mark.parametrize("number", [1, 4, 5, 16])
def test_grid_grows_with_its_records(tmp_path, number):
    path = answer_grid([record()] * number, tmp_path / "grid.png", title="Answers")
    columns = {1: 1, 4: 4, 5: 3, 16: 4}[number]
    one = Image.open(answer_grid([record()], tmp_path / "one.png", title="Answers"))
    width, height = Image.open(path).size
    assert width >= columns * one.width * 0.8
    assert height >= -(-number // columns) * one.height * 0.7


def test_right_answers_are_green_and_wrong_ones_red(tmp_path):
    right = answer_grid([record(modality_weights=None)], tmp_path / "right.png")
    wrong = answer_grid([record(truth="yellow", modality_weights=None)], tmp_path / "wrong.png")
    assert count_pixels(right, pictures.RIGHT) > 300
    assert count_pixels(right, pictures.WRONG) == 0
    assert count_pixels(wrong, pictures.WRONG) > 300
    assert 0 < count_pixels(wrong, pictures.RIGHT) < 300  # the truth, named


def test_case_and_spaces_do_not_make_an_answer_wrong(tmp_path):
    assert count_pixels(answer_grid([record(truth=" Red")], tmp_path / "grid.png"), pictures.WRONG) == 0


def test_answers_without_a_truth_are_neither_right_nor_wrong(tmp_path):
    path = answer_grid([record(truth=None)], tmp_path / "grid.png")
    assert count_pixels(path, pictures.UNJUDGED) > 300
    assert count_pixels(path, pictures.RIGHT) == count_pixels(path, pictures.WRONG) == 0


def test_modality_bar_is_divided_by_the_weights(tmp_path):
    path = answer_grid([record(modality_weights={"vision": 3.0, "text": 1.0})], tmp_path / "grid.png")
    vision, text = (count_pixels(path, color) for color in pictures.MODALITY_COLORS[:2])
    assert 2 < vision / text < 3.5, (vision, text)  # the key to the colors and the labels take some


def test_heat_map_is_brightest_where_attention_is_highest():
    heat_map = pictures._heat_map(record()["image"], record()["attention"])
    heat_map = np.asarray(heat_map, dtype=float).mean(axis=-1)
    side = len(heat_map)
    assert heat_map[: side // 8, : side // 8].mean() > heat_map[side // 2 :, side // 2 :].mean() + 80


def test_even_attention_and_missing_parts_are_drawn(tmp_path):
    even = record(attention=np.ones((3, 3)))
    bare = {key: record()[key] for key in ("image", "question", "answers")}
    wide = record(image=Image.new("L", (320, 100)), attention=None, answers=[("yes", 3.2)])
    with Image.open(answer_grid([even, bare, wide], tmp_path / "grid.png")) as image:
        image.verify()


def test_question_lines_fit_the_card_and_keep_their_words():
    question = "is the very large red circle left of the small blue square or of the other one? " * 3
    lines = pictures._question_lines({"question": question})
    assert len(lines) == pictures._MAX_QUESTION_LINES
    assert lines[-1].endswith("…")
    assert max(pictures._text_width(line, size=10.5) for line in lines) <= pictures._INNER_WIDTH
    assert question.startswith(" ".join(lines).rstrip("…"))


def test_endless_words_are_cut_to_the_card():
    (line,) = pictures._question_lines({"question": "W" * 500})
    assert line.endswith("…")
    assert pictures._text_width(line, size=10.5) <= pictures._INNER_WIDTH


def test_dollar_signs_are_not_mathematics(tmp_path):
    answer_grid([record(question="does it cost $5 or $\\frac6?")], tmp_path / "grid.png")


def test_failed_drawing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = answer_grid([record()], tmp_path / "new" / "grid.png")
    before = path.read_bytes()

    def half_written(figure, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        answer_grid([record()], path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "Got no records"),
        ([{"image": None, "question": "?"}], r"records\[0\] lacks \['answers'\]"),
        ([record(answers=[])], r"records\[0\]\['answers'\] is empty"),
        ([record(attention=np.ones((2, 3, 3)))], r"shape \(2, 3, 3\). Expected \(h, w\)"),
    ],
)
def test_bad_records_are_named_with_the_fix(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        answer_grid(records, tmp_path / "grid.png")
