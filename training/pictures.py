"""Pictures for people: what a model was asked, where it looked, what it answered, and what it leaned on."""

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

# Inches. Text is measured before it is drawn, and cut to the room that these leave it: nothing can overlap.
_CARD_WIDTH = 3.5
_PAD = 0.18
_GAP = 0.2
MARGIN = 0.3
TITLE_LINE = 0.32
_TEXT_LINE = 0.2
BAR_PITCH = 0.2
BAR_HEIGHT = 0.11
WEIGHTS_HEIGHT = 0.16
LABEL_WIDTH = 0.95
SCORE_WIDTH = 0.38
_INNER_WIDTH = _CARD_WIDTH - 2 * _PAD
_PANEL_GAP = 0.1
_PANEL_WIDTH = (_INNER_WIDTH - _PANEL_GAP) / 2

_MAX_TITLE_LINES = 4
_MAX_QUESTION_LINES = 3
_TOP_ANSWERS = 3
DPI = 160
_HEAT_MAP_SIDE = 320  # pixels
FONT = "DejaVu Sans"  # comes with matplotlib, so that the picture is the same everywhere

PAPER, CARD, EDGE = "#f3f4f6", "#ffffff", "#dfe3e8"
INK, MUTED, _TRACK, RUNNER_UP = "#1f2933", "#6b7280", "#eef0f3", "#b3bcc9"
RIGHT, WRONG, UNJUDGED = "#1f9d61", "#d64550", "#4a78b5"
MODALITY_COLORS = ("#3f6fb5", "#dd8a2b", "#8a63b8", "#2f9a93", "#c46a93", "#7f858e")


Record = Mapping[str, Any]


class _Layout(NamedTuple):
    """Heights that the cards of a row share, so that their parts align."""

    question: float
    panel: float
    weights: float

    @property
    def card(self) -> float:
        bars = (_TOP_ANSWERS + 0.3) * BAR_PITCH + self.weights
        return 2 * _PAD + self.question + 1.5 * _TEXT_LINE + self.panel + bars


def answer_grid(records: Sequence[Record], path: str | os.PathLike, title: str | None = None) -> Path:
    """Draw answered questions as a grid of cards and write it to `path`, whose suffix chooses the format.

    Args:
        records: one mapping per card with `image` (PIL), `question` and `answers` ((answer, score) pairs,
            best first), and optionally `truth` (the right answer), `attention` (array (h, w) that covers the
            image) and `modality_weights` (name to weight).
        path: the file to write, whole or not at all. Missing folders are made.
        title: a line above the grid.

    Returns:
        The path written.
    """
    _check(records)
    from matplotlib.figure import Figure

    columns = min(len(records), 3 if len(records) in (5, 6, 9) else 4)
    width = 2 * MARGIN + columns * (_CARD_WIDTH + _GAP) - _GAP
    title_lines = _wrap(title or "", width - 2 * MARGIN, _MAX_TITLE_LINES, size=15, weight="bold")
    names = dict.fromkeys(name for record in records for name in record.get("modality_weights") or ())
    palette = {name: MODALITY_COLORS[i % len(MODALITY_COLORS)] for i, name in enumerate(names)}
    rows = [records[start : start + columns] for start in range(0, len(records), columns)]
    layouts = [_layout(row, bool(palette)) for row in rows]
    height = 2 * MARGIN + TITLE_LINE * len(title_lines) - _GAP
    height += sum(layout.card + _GAP for layout in layouts) + (_TEXT_LINE if palette else 0)

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    top = MARGIN
    for line in title_lines:
        _write(page, MARGIN, top + 0.3 * TITLE_LINE, line, size=15, weight="bold")
        top += TITLE_LINE
    for row, layout in zip(rows, layouts, strict=True):
        for i, record in enumerate(row):
            _draw_card(page, MARGIN + i * (_CARD_WIDTH + _GAP), top, record, layout, palette)
        top += layout.card + _GAP
    _draw_legend(page, MARGIN, top, palette)
    page.set(xlim=(0, width), ylim=(height, 0))  # inches from the top left corner; images moved the limits
    return save(figure, Path(path))


def search_grid(
    query: str, hits: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], path: str | os.PathLike
) -> Path:
    """Draws what a search found, best first, each image with its score and a text, and writes it to `path`.

    Args:
        query: what was asked, a line above the grid. hits: of `CrossModalIndex.search`. images: one of each hit.

    Returns:
        The path written.
    """
    if not hits or len(hits) != len(images):
        raise ValueError(f"{len(hits)} hits and {len(images)} images. Expected as many, and at least one.")
    from matplotlib.figure import Figure

    columns, side = min(len(hits), 5), 1.7
    cell = side + 2 * _TEXT_LINE + _GAP
    rows = -(-len(hits) // columns)
    width = max(2 * MARGIN + columns * (side + _GAP) - _GAP, 5.0)
    title = _wrap(query, width - 2 * MARGIN, 2, size=13, weight="bold")
    height = 2 * MARGIN + len(title) * TITLE_LINE + rows * cell - _GAP
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    for line, words in enumerate(title):
        _write(page, MARGIN, MARGIN + (line + 0.3) * TITLE_LINE, words, size=13, weight="bold")
    for place, (hit, image) in enumerate(zip(hits, images, strict=True)):
        left = MARGIN + place % columns * (side + _GAP)
        top = MARGIN + len(title) * TITLE_LINE + place // columns * cell
        _show(page, image.convert("RGB"), left, top, side, side)
        caption = hit.get("text") or next((text for text in hit.get("texts") or () if text), "")
        _write(page, left, top + side + 0.6 * _TEXT_LINE, f"{place + 1}.  {hit['score']:.2f}", size=8, color=MUTED)
        _write(page, left, top + side + 1.5 * _TEXT_LINE, caption, size=8, room=side)
    page.set(xlim=(0, width), ylim=(height, 0))
    return save(figure, Path(path))


def explanation_picture(record: Record, path: str | os.PathLike, words: Sequence[str] | None = None) -> Path:
    """Draw what `explain.explain` returns: the answer, where each word looked, which words counted, gates and weights.

    Args:
        record: of `explain`. path: the file to write. words: that get a panel of their own; None takes the four that the
            answer's attention weighs most.

    Raises:
        ValueError: for a word that the text does not have.
    """
    from matplotlib.figure import Figure

    sentence = next((name for name, found in record["words"].items() if found), None)
    chosen = [] if sentence is None else _chosen_words(record, sentence, words)
    scenes = [name for name in record["grids"] if record["types"][name] == "vision" and name in record["inputs"]]
    tracks = [name for name in record["types"] if record["types"][name] in ("audio", "features", "video")]
    columns = 2 + max(len(chosen), 2)
    side, gap = 1.9, 0.15
    width = 2 * MARGIN + columns * (side + gap) - gap
    text_height = 0.62 if sentence else 0.0
    heights = [side * max(0.4, _shape_of(record["inputs"][name])) + 0.3 for name in scenes]
    heights += [0.75 + 0.32 * len(chosen)] * len(tracks)
    bars = 0.3 + BAR_PITCH * max(len(record["answers"]), 2 + sum(map(len, record["gates"])))
    height = 2 * MARGIN + TITLE_LINE + text_height + sum(heights) + gap * len(heights) + bars
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    answer, score = record["answers"][0]
    title = record["inputs"].get(sentence) or "answer"
    room = width - 2 * MARGIN
    _write(page, MARGIN, MARGIN + 0.1, f"{title}  {answer} ({score:.2f})", size=13, weight="bold", room=room)
    top = MARGIN + TITLE_LINE
    if sentence:
        _draw_words(page, top, record, sentence, room)
        top += text_height
    for name, tall in zip(scenes, heights, strict=False):
        image = _as_image(record["inputs"][name])
        maps = [("image", None), ("all words", _mean_look(record, sentence, name))] if sentence else [("image", None)]
        maps += [(word, _look(record, sentence, name, places)) for word, places in chosen]
        maps += [] if sentence else [("attended to", record["token_weights"].get(name))]
        for column, (label, seen) in enumerate(maps):
            if label != "image" and seen is None:
                continue
            left = MARGIN + column * (side + gap)
            _write(page, left, top + 0.08, label, size=9, color=MUTED, room=side)
            shown = image if seen is None else _heat_map(image, _on_grid(seen, record["grids"][name]))
            _show(page, shown, left, top + 0.2, side, tall - 0.3)
        top += tall + gap
    for name, tall in zip(tracks, heights[len(scenes) :], strict=True):
        _draw_track(figure, page, (MARGIN, top, room, tall), record, name, sentence, chosen)
        top += tall + gap
    _draw_bars(page, top, width, record)
    page.set(xlim=(0, width), ylim=(height, 0))
    return save(figure, Path(path))


def _chosen_words(record: Record, name: str, words: Sequence[str] | None) -> list[tuple[str, list[int]]]:
    found, weights = record["words"][name], record["token_weights"].get(name)
    if words:
        chosen = []
        for word in words:
            match = [item for item in found if item[0].lower() == word.lower()]
            if not match:
                raise ValueError(f"the text has no word {word!r}. Expected any of {[item[0] for item in found]}.")
            chosen.append(match[0])
        return chosen
    if weights is None:
        return found[:4]
    best = sorted(found, key=lambda item: -float(weights[item[1]].sum()))[:4]
    return sorted(best, key=lambda item: item[1])


def _look(record: Record, sentence: str | None, name: str, places: list[int]) -> np.ndarray | None:
    """Attention from some tokens of the text to a modality, (T,)."""
    seen = record["attention"].get(f"{sentence}<-{name}")
    return None if seen is None else seen[places].mean(axis=0)


def _mean_look(record: Record, sentence: str, name: str) -> np.ndarray | None:
    return _look(record, sentence, name, [place for _, places in record["words"][sentence] for place in places])


def _on_grid(seen: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return seen[-grid[0] * grid[1] :].reshape(grid)


def _as_image(value: Any) -> Image.Image:
    from ..processing.reading_crossmodal import read_image

    return read_image(value, "the image")  # as the model saw it, turned by its EXIF data


def _shape_of(value: Any) -> float:
    image = _as_image(value)
    return min(1.0, image.height / image.width)


def _draw_words(page: "Axes", top: float, record: Record, name: str, room: float) -> None:
    """The text, each word on a color as strong as the attention that it got."""
    words, weights = record["words"][name], record["token_weights"].get(name)
    others = [pair.split("<-")[0] for pair in record["attention"] if pair.endswith(f"<-{name}")]
    looking = [other for other in others if other != name] or [name]
    caption = f"words by the attention of {', '.join(looking)}"
    _write(page, MARGIN, top + 0.08, caption, size=8.5, color=MUTED)
    if weights is None:
        return
    strengths = [float(weights[places].sum()) for _, places in words]
    left, strongest = MARGIN, max(strengths) or 1.0
    for (word, _), strength in zip(words, strengths, strict=True):
        wide = _text_width(word, size=10) + 0.14
        if left + wide > MARGIN + room:
            break
        _box(page, left, top + 0.2, wide, 0.26, MODALITY_COLORS[1], rounding=0.04).set_alpha(
            0.08 + 0.72 * strength / strongest
        )
        _write(page, left + 0.07, top + 0.33, word, size=10)
        left += wide + 0.05


def _draw_track(
    figure: "Figure",
    page: "Axes",
    place: tuple[float, float, float, float],
    record: Record,
    name: str,
    sentence: str | None,
    chosen: list[tuple[str, list[int]]],
) -> None:
    """Attention along time: a curve of the whole, and a strip per chosen word; of patches of a spectrogram the mean over bands."""
    from matplotlib import colormaps

    def over_time(seen: np.ndarray | None) -> np.ndarray | None:
        rows = record["rows_of_steps"].get(name)
        if seen is None or rows is None:
            return seen
        return np.asarray(seen)[-rows[0] * rows[1] :].reshape(rows).mean(axis=0)

    left, top, room, _ = place
    label = 0.9
    _write(page, left, top + 0.08, f"{name} over time", size=9, color=MUTED)
    curves = [("all", over_time(record["token_weights"].get(name)))]
    curves += [(word, over_time(_look(record, sentence, name, places))) for word, places in chosen]
    y = top + 0.2
    for word, seen in curves:
        if seen is None:
            continue
        tall = 0.45 if word == "all" else 0.22
        peak = float(np.max(seen)) or 1.0
        wide = (room - label) / len(seen)
        _write(page, left, y + tall / 2, word, size=8.5, color=MUTED, room=label - 0.1)
        if word == "all":
            steps = left + label + wide * (np.arange(len(seen)) + 0.5)
            page.fill_between(steps, y + tall, y + tall - tall * np.asarray(seen) / peak, color=UNJUDGED, linewidth=0)
        else:
            colors = colormaps["inferno"](0.05 + 0.85 * np.asarray(seen)[None] / peak)
            page.imshow(colors, extent=(left + label, left + room, y + tall, y), aspect="auto", zorder=1)
        y += tall + 0.1


def _draw_bars(page: "Axes", top: float, width: float, record: Record) -> None:
    """Answers on the left; modality weights and gates on the right."""
    half = (width - 2 * MARGIN - 0.4) / 2
    y = top + 0.1
    for index, (answer, score) in enumerate(record["answers"]):
        _write(page, MARGIN, y, answer, size=8.5, color=MUTED if index else INK, room=LABEL_WIDTH)
        color = RUNNER_UP if index else UNJUDGED
        _stack(page, MARGIN + LABEL_WIDTH, y, half - LABEL_WIDTH - SCORE_WIDTH, BAR_HEIGHT, [(score, color)])
        _write(page, MARGIN + half, y, f"{score:.2f}", size=8.5, color=MUTED, align="right")
        y += BAR_PITCH
    left, y, label = MARGIN + half + 0.4, top + 0.1, 1.6
    weights = record["modality_weights"]
    palette = {name: MODALITY_COLORS[i % len(MODALITY_COLORS)] for i, name in enumerate(weights)}
    _write(page, left, y, "modality weights", size=8.5, color=MUTED)
    shares = [(weight, palette[name]) for name, weight in weights.items()]
    _stack(page, left + label, y, half - label, WEIGHTS_HEIGHT, shares, labelled=True)
    y += BAR_PITCH
    _draw_legend(page, left + label, y, palette)
    gates = [
        (f"layer {index + 1}: {pair}", size)
        for index, layer in enumerate(record["gates"])
        for pair, size in layer.items()
    ]
    largest = max([size for _, size in gates], default=1.0)
    for pair, size in gates:
        y += BAR_PITCH
        _write(page, left, y, pair, size=8.5, color=MUTED, room=label - 0.05)
        _stack(page, left + label, y, half - label - SCORE_WIDTH, BAR_HEIGHT, [(size / max(1.0, largest), RUNNER_UP)])
        _write(page, left + half, y, f"{size:.2f}", size=8.5, color=MUTED, align="right")


def _check(records: Sequence[Record]) -> None:
    if not len(records):
        raise ValueError("Got no records. Expected one mapping per answered question. Pass at least one.")
    for i, record in enumerate(records):
        if missing := {"image", "question", "answers"} - record.keys():
            raise ValueError(
                f"records[{i}] lacks {sorted(missing)}. Expected image, question and answers in each record. "
                "Add what is missing."
            )
        if not len(record["answers"]):
            raise ValueError(f"records[{i}]['answers'] is empty. Expected (answer, score) pairs. Add one.")
        attention = record.get("attention")
        if attention is not None and np.ndim(attention) != 2:
            raise ValueError(
                f"records[{i}]['attention'] has shape {np.shape(attention)}. Expected (h, w) over the image. "
                "Average over heads and layers, and reshape the image tokens to their grid."
            )


def _layout(row: Sequence[Record], with_weights: bool) -> _Layout:
    return _Layout(
        question=_TEXT_LINE * max(len(_question_lines(record)) for record in row),
        panel=_PANEL_WIDTH * max(min(1, record["image"].height / record["image"].width) for record in row),
        weights=1.3 * BAR_PITCH if with_weights else 0,
    )


def _question_lines(record: Record) -> list[str]:
    return _wrap(record["question"], _INNER_WIDTH, _MAX_QUESTION_LINES, size=10.5)


def _draw_card(
    page: "Axes", left: float, top: float, record: Record, layout: _Layout, palette: dict[str, str]
) -> None:
    _box(page, left, top, _CARD_WIDTH, layout.card, CARD, edge=EDGE, rounding=0.08)
    left, y = left + _PAD, top + _PAD
    lines, answers, truth = _question_lines(record), record["answers"][:_TOP_ANSWERS], record.get("truth")
    for i, line in enumerate(lines):
        _write(page, left, y + _TEXT_LINE * (i + 0.5), line, size=10.5)
    color = _draw_verdict(page, left, y + _TEXT_LINE * (len(lines) + 0.6), answers[0][0], truth)
    y += layout.question + 1.5 * _TEXT_LINE

    image, attention = record["image"].convert("RGB"), record.get("attention")
    if attention is None:
        _show(page, image, left, y, _INNER_WIDTH, layout.panel)
    else:
        heat_map = _heat_map(image, attention)
        _show(page, image, left, y, _PANEL_WIDTH, layout.panel)
        _show(page, heat_map, left + _PANEL_WIDTH + _PANEL_GAP, y, _PANEL_WIDTH, layout.panel)
    y += layout.panel + 0.9 * BAR_PITCH

    scale = max(1, *(score for _, score in answers))
    bar_left, bar_width = left + LABEL_WIDTH, _INNER_WIDTH - LABEL_WIDTH - SCORE_WIDTH
    for i, (answer, score) in enumerate(answers):
        bar_color = color if i == 0 else RIGHT if _same(answer, truth) else RUNNER_UP
        label_color = INK if i == 0 else MUTED
        _write(page, left, y, answer, size=8.5, color=label_color, room=LABEL_WIDTH - 0.1)
        _stack(page, bar_left, y, bar_width, BAR_HEIGHT, [(score / scale, bar_color)])
        _write(page, left + _INNER_WIDTH, y, f"{score:.2f}", size=8.5, color=MUTED, align="right")
        y += BAR_PITCH
    y += (_TOP_ANSWERS - len(answers) + 0.3) * BAR_PITCH

    if weights := record.get("modality_weights"):
        total = sum(weights.values()) or 1
        _write(page, left, y, "modalities", size=8.5, color=MUTED)
        shares = [(weight / total, palette[name]) for name, weight in weights.items()]
        _stack(page, bar_left, y, _INNER_WIDTH - LABEL_WIDTH, WEIGHTS_HEIGHT, shares, labelled=True)


def _draw_verdict(page: "Axes", left: float, y: float, answer: str, truth: str | None) -> str:
    """The answer, marked right or wrong with the truth named; returns its color."""
    style = {"size": 9.5, "weight": "bold"}
    if truth is None:
        _write(page, left, y, answer, color=UNJUDGED, room=_INNER_WIDTH, **style)
        return UNJUDGED
    if _same(answer, truth):
        _write(page, left, y, f"✓ {answer}", color=RIGHT, room=_INNER_WIDTH, **style)
        return RIGHT
    _write(page, left, y, f"✗ {answer}", color=WRONG, room=_PANEL_WIDTH, **style)
    right_half = left + _PANEL_WIDTH + _PANEL_GAP
    _write(page, right_half, y, f"truth: {truth}", size=9.5, color=RIGHT, room=_PANEL_WIDTH)
    return WRONG


def _draw_legend(page: "Axes", left: float, y: float, palette: dict[str, str]) -> None:
    for name, color in palette.items():
        _box(page, left, y - 0.055, 0.11, 0.11, color, rounding=0.02)
        _write(page, left + 0.17, y, name, size=8.5, color=MUTED)
        left += 0.42 + _text_width(name, size=8.5)


def _same(answer: str, truth: str | None) -> bool:
    return truth is not None and answer.strip().lower() == truth.strip().lower()


def _heat_map(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """The image under its attention (h, w), from the least (dark) to the most (bright)."""
    from matplotlib import colormaps

    attention = np.asarray(attention, dtype=np.float32)
    attention = (attention - attention.min()) / max(np.ptp(attention), np.finfo(np.float32).tiny)
    # Both enlarged before they are mixed: the few pixels of a small image would show the heat in steps.
    scale = _HEAT_MAP_SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    picture = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    heat = np.asarray(Image.fromarray(attention).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    glow = 255 * colormaps["inferno"](0.05 + 0.85 * heat)[..., :3]
    opacity = (0.78 - 0.35 * heat)[..., None]  # what the model looks at stays visible
    return Image.fromarray(((1 - opacity) * picture + opacity * glow).astype(np.uint8))


def _show(page: "Axes", image: Image.Image, left: float, top: float, width: float, height: float) -> None:
    """Fit the image into a box, centered, without a change of its proportions."""
    scale = min(width / image.width, height / image.height)
    shown_width, shown_height = image.width * scale, image.height * scale
    left, top = left + (width - shown_width) / 2, top + (height - shown_height) / 2
    frame = _box(page, left, top, shown_width, shown_height, "none", edge=EDGE, rounding=0.05)
    extent = (left, left + shown_width, top + shown_height, top)
    page.imshow(image, extent=extent, aspect="auto", interpolation="bicubic", clip_path=frame, zorder=1)


def _stack(
    page: "Axes",
    left: float,
    y: float,
    width: float,
    height: float,
    shares: list[tuple[float, str]],
    labelled: bool = False,
) -> None:
    """A horizontal bar filled from the left by shares of its width, each in its color."""
    track = _box(page, left, y - height / 2, width, height, _TRACK, rounding=height / 2)
    for share, color in shares:
        length = max(0, share) * width
        _box(page, left, y - height / 2, length, height, color).set_clip_path(track)
        label = f"{share:.0%}"
        if labelled and _text_width(label, size=7) < length - 0.06:
            _write(page, left + length / 2, y, label, size=7, color=CARD, align="center")
        left += length


def _box(
    page: "Axes",
    left: float,
    top: float,
    width: float,
    height: float,
    color: str,
    edge: str = "none",
    rounding: float = 0,
) -> "Patch":
    from matplotlib.patches import FancyBboxPatch

    style = f"round,pad=0,rounding_size={rounding}" if rounding else "square,pad=0"
    box = FancyBboxPatch((left, top), width, height, boxstyle=style, fc=color, ec=edge, lw=0.8)
    return page.add_patch(box)


def _write(
    page: "Axes",
    x: float,
    y: float,
    text: str,
    size: float,
    color: str = INK,
    weight: str = "normal",
    room: float | None = None,
    align: str = "left",
) -> None:
    """One line, vertically centered at `y` and cut to the width `room`."""
    page.text(
        x,
        y,
        text if room is None else _shorten(text, room, size, weight),
        fontsize=size,
        color=color,
        weight=weight,
        ha=align,
        va="center_baseline",
        family=FONT,
        parse_math=False,  # a dollar sign is a dollar sign
    )


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=FONT, size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def _shorten(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text, or as much of its start as fits before an ellipsis."""
    text = " ".join(text.split())
    if _text_width(text, size, weight) <= width:
        return text
    lengths = range(len(text))
    fitting = bisect_right(lengths, width, key=lambda n: _text_width(f"{text[:n]}…", size, weight))
    return f"{text[: max(0, fitting - 1)].rstrip()}…"


def _wrap(text: str, width: float, max_lines: int, size: float, weight: str = "normal") -> list[str]:
    """Lines that fit `width`; what is left over at the last one is cut."""
    lines = []
    for word in text.split():
        if lines and (len(lines) == max_lines or _text_width(f"{lines[-1]} {word}", size, weight) <= width):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_shorten(line, width, size, weight) for line in lines]


def save(figure: "Figure", path: Path) -> Path:
    """Write beside the target, then move: a reader never sees half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format=path.suffix.lstrip(".") or "png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
