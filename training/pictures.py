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
_MARGIN = 0.3
_TITLE_LINE = 0.32
_TEXT_LINE = 0.2
_BAR_PITCH = 0.2
_BAR_HEIGHT = 0.11
_WEIGHTS_HEIGHT = 0.16
_LABEL_WIDTH = 0.95
_SCORE_WIDTH = 0.38
_INNER_WIDTH = _CARD_WIDTH - 2 * _PAD
_PANEL_GAP = 0.1
_PANEL_WIDTH = (_INNER_WIDTH - _PANEL_GAP) / 2

_MAX_TITLE_LINES = 4
_MAX_QUESTION_LINES = 3
_TOP_ANSWERS = 3
_DPI = 160
_HEAT_MAP_SIDE = 320  # pixels
_FONT = "DejaVu Sans"  # comes with matplotlib, so that the picture is the same everywhere

_PAPER, _CARD, _EDGE = "#f3f4f6", "#ffffff", "#dfe3e8"
_INK, _MUTED, _TRACK, _RUNNER_UP = "#1f2933", "#6b7280", "#eef0f3", "#b3bcc9"
_RIGHT, _WRONG, _UNJUDGED = "#1f9d61", "#d64550", "#4a78b5"
_MODALITY_COLORS = ("#3f6fb5", "#dd8a2b", "#8a63b8", "#2f9a93", "#c46a93", "#7f858e")


Record = Mapping[str, Any]


class _Layout(NamedTuple):
    """Heights that the cards of a row share, so that their parts align."""

    question: float
    panel: float
    weights: float

    @property
    def card(self) -> float:
        bars = (_TOP_ANSWERS + 0.3) * _BAR_PITCH + self.weights
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
    width = 2 * _MARGIN + columns * (_CARD_WIDTH + _GAP) - _GAP
    title_lines = _wrap(title or "", width - 2 * _MARGIN, _MAX_TITLE_LINES, size=15, weight="bold")
    names = dict.fromkeys(name for record in records for name in record.get("modality_weights") or ())
    palette = {name: _MODALITY_COLORS[i % len(_MODALITY_COLORS)] for i, name in enumerate(names)}
    rows = [records[start : start + columns] for start in range(0, len(records), columns)]
    layouts = [_layout(row, bool(palette)) for row in rows]
    height = 2 * _MARGIN + _TITLE_LINE * len(title_lines) - _GAP
    height += sum(layout.card + _GAP for layout in layouts) + (_TEXT_LINE if palette else 0)

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_PAPER)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    top = _MARGIN
    for line in title_lines:
        _write(page, _MARGIN, top + 0.3 * _TITLE_LINE, line, size=15, weight="bold")
        top += _TITLE_LINE
    for row, layout in zip(rows, layouts, strict=True):
        for i, record in enumerate(row):
            _draw_card(page, _MARGIN + i * (_CARD_WIDTH + _GAP), top, record, layout, palette)
        top += layout.card + _GAP
    _draw_legend(page, _MARGIN, top, palette)
    page.set(xlim=(0, width), ylim=(height, 0))  # inches from the top left corner; images moved the limits
    return _save(figure, Path(path))


def robustness_plot(table: Sequence[Record], metric: str, path: str | os.PathLike) -> Path:
    """Draw `robustness.robustness`'s table: a panel per modality and kind, the clean score as a dashed line.

    Args:
        table: rows with `modality`, `kind`, `level`, `unit` and the metric; the first one of clean rows.
        metric: the score to draw, in [0, 1]. path: the file to write.

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple, list[Record]] = {}
    for row in table[1:]:
        panels.setdefault((row["modality"], row["kind"], row["unit"]), []).append(row)
    modalities = list(dict.fromkeys(modality for modality, _, _ in panels))
    columns = max(sum(key[0] == modality for key in panels) for modality in modalities)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.3 * len(modalities) + 0.3), facecolor=_CARD, layout="constrained")
    grid = figure.subplots(len(modalities), columns, squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    for index, modality in enumerate(modalities):
        color = _MODALITY_COLORS[index % len(_MODALITY_COLORS)]
        for axes, key in zip(grid[index], [key for key in panels if key[0] == modality], strict=False):
            rows = panels[key]
            axes.set_visible(True)
            axes.axhline(table[0][metric], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
            levels, scores = [0.0, *(row["level"] for row in rows)], [table[0][metric], *(row[metric] for row in rows)]
            axes.plot(levels, scores, color=color, marker="o", markersize=4, linewidth=1.8)
            axes.set_title(f"{modality}: {key[1]}", fontsize=9, color=_INK, loc="left", family=_FONT)
            axes.set_xlabel(key[2], fontsize=8, color=_MUTED, family=_FONT)
            axes.tick_params(labelsize=7, colors=_MUTED)
            axes.set_ylim(0, 1)
            axes.grid(axis="y", color=_EDGE, linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        grid[index][0].set_ylabel(metric, fontsize=8, color=_MUTED, family=_FONT)
    return _save(figure, Path(path))


def ablation_plot(
    table: Sequence[Record], results: Mapping[tuple, Record], metric: str, majority: float, path: str | os.PathLike
) -> Path:
    """Draw `ablate.ablate`'s table: a line per variant with its mean, and a dot per run.

    Args:
        table: rows with `variant` and `mean`. results: by (variant, seed), with `metrics`. metric: the score.
        majority: score of the most common answer, a dashed line. path: the file to write.

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.42 * len(table) + 1.1), facecolor=_CARD, layout="constrained")
    axes = figure.subplots()
    for line, row in enumerate(table):
        scores = [100 * result["metrics"][metric] for (name, _), result in results.items() if name == row["variant"]]
        color = _RIGHT if row["variant"] == "full" else _UNJUDGED
        axes.plot(scores, [line] * len(scores), "o", color=color, alpha=0.45, markersize=5, markeredgewidth=0)
        axes.plot([100 * row["mean"]] * 2, [line - 0.3, line + 0.3], color=color, linewidth=2.2)
    axes.axvline(100 * table[0]["mean"], color=_RIGHT, linewidth=0.8, alpha=0.5)
    axes.axvline(100 * majority, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(table)), [row["variant"] for row in table], family=_FONT, fontsize=9, color=_INK)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} (%); dots: runs, bars: means, dashed: most common answer", fontsize=8, color=_MUTED)
    axes.tick_params(axis="x", labelsize=8, colors=_MUTED)
    axes.grid(axis="x", color=_EDGE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return _save(figure, Path(path))


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
        weights=1.3 * _BAR_PITCH if with_weights else 0,
    )


def _question_lines(record: Record) -> list[str]:
    return _wrap(record["question"], _INNER_WIDTH, _MAX_QUESTION_LINES, size=10.5)


def _draw_card(
    page: "Axes", left: float, top: float, record: Record, layout: _Layout, palette: dict[str, str]
) -> None:
    _box(page, left, top, _CARD_WIDTH, layout.card, _CARD, edge=_EDGE, rounding=0.08)
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
    y += layout.panel + 0.9 * _BAR_PITCH

    scale = max(1, *(score for _, score in answers))
    bar_left, bar_width = left + _LABEL_WIDTH, _INNER_WIDTH - _LABEL_WIDTH - _SCORE_WIDTH
    for i, (answer, score) in enumerate(answers):
        bar_color = color if i == 0 else _RIGHT if _same(answer, truth) else _RUNNER_UP
        label_color = _INK if i == 0 else _MUTED
        _write(page, left, y, answer, size=8.5, color=label_color, room=_LABEL_WIDTH - 0.1)
        _stack(page, bar_left, y, bar_width, _BAR_HEIGHT, [(score / scale, bar_color)])
        _write(page, left + _INNER_WIDTH, y, f"{score:.2f}", size=8.5, color=_MUTED, align="right")
        y += _BAR_PITCH
    y += (_TOP_ANSWERS - len(answers) + 0.3) * _BAR_PITCH

    if weights := record.get("modality_weights"):
        total = sum(weights.values()) or 1
        _write(page, left, y, "modalities", size=8.5, color=_MUTED)
        shares = [(weight / total, palette[name]) for name, weight in weights.items()]
        _stack(page, bar_left, y, _INNER_WIDTH - _LABEL_WIDTH, _WEIGHTS_HEIGHT, shares, labelled=True)


def _draw_verdict(page: "Axes", left: float, y: float, answer: str, truth: str | None) -> str:
    """The answer, marked right or wrong with the truth named; returns its color."""
    style = {"size": 9.5, "weight": "bold"}
    if truth is None:
        _write(page, left, y, answer, color=_UNJUDGED, room=_INNER_WIDTH, **style)
        return _UNJUDGED
    if _same(answer, truth):
        _write(page, left, y, f"✓ {answer}", color=_RIGHT, room=_INNER_WIDTH, **style)
        return _RIGHT
    _write(page, left, y, f"✗ {answer}", color=_WRONG, room=_PANEL_WIDTH, **style)
    right_half = left + _PANEL_WIDTH + _PANEL_GAP
    _write(page, right_half, y, f"truth: {truth}", size=9.5, color=_RIGHT, room=_PANEL_WIDTH)
    return _WRONG


def _draw_legend(page: "Axes", left: float, y: float, palette: dict[str, str]) -> None:
    for name, color in palette.items():
        _box(page, left, y - 0.055, 0.11, 0.11, color, rounding=0.02)
        _write(page, left + 0.17, y, name, size=8.5, color=_MUTED)
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
    frame = _box(page, left, top, shown_width, shown_height, "none", edge=_EDGE, rounding=0.05)
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
            _write(page, left + length / 2, y, label, size=7, color=_CARD, align="center")
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
    color: str = _INK,
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
        family=_FONT,
        parse_math=False,  # a dollar sign is a dollar sign
    )


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=_FONT, size=size, weight=weight)
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


def _save(figure: "Figure", path: Path) -> Path:
    """Write beside the target, then move: a reader never sees half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format=path.suffix.lstrip(".") or "png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
