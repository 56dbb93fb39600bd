"""Plots of tables: scores over levels of noise, over variants of a model, over epochs; what is taken for what, how surely."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .pictures import CARD, EDGE, FONT, INK, MODALITY_COLORS, MUTED, RIGHT, UNJUDGED, Record, save


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
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.3 * len(modalities) + 0.3), facecolor=CARD, layout="constrained")
    grid = figure.subplots(len(modalities), columns, squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    for index, modality in enumerate(modalities):
        color = MODALITY_COLORS[index % len(MODALITY_COLORS)]
        for axes, key in zip(grid[index], [key for key in panels if key[0] == modality], strict=False):
            rows = panels[key]
            axes.set_visible(True)
            axes.axhline(table[0][metric], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            levels, scores = [0.0, *(row["level"] for row in rows)], [table[0][metric], *(row[metric] for row in rows)]
            axes.plot(levels, scores, color=color, marker="o", markersize=4, linewidth=1.8)
            axes.set_title(f"{modality}: {key[1]}", fontsize=9, color=INK, loc="left", family=FONT)
            axes.set_xlabel(key[2], fontsize=8, color=MUTED, family=FONT)
            axes.tick_params(labelsize=7, colors=MUTED)
            # Parts of one share a scale from 0 to 1; errors and per cent begin at 0 too.
            axes.set_ylim(0, max(1, 1.05 * max(row[metric] for row in table)))
            axes.grid(axis="y", color=EDGE, linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        grid[index][0].set_ylabel(metric, fontsize=8, color=MUTED, family=FONT)
    return save(figure, Path(path))


def ablation_plot(
    table: Sequence[Record],
    results: Mapping[tuple, Record],
    metric: str,
    majority: float,
    path: str | os.PathLike,
    percent: float = 100,
) -> Path:
    """Draw `ablate.ablate`'s table: a line per variant with its mean, and a dot per run.

    Args:
        table: rows with `variant` and `mean`. results: by (variant, seed), with `metrics`. metric: the score.
        majority: score of the most common answer, a dashed line. path: the file to write. percent: what makes per cent of the metric.

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.42 * len(table) + 1.1), facecolor=CARD, layout="constrained")
    axes = figure.subplots()
    for line, row in enumerate(table):
        scores = [
            percent * result["metrics"][metric] for (name, _), result in results.items() if name == row["variant"]
        ]
        color = RIGHT if row["variant"] == "full" else UNJUDGED
        axes.plot(scores, [line] * len(scores), "o", color=color, alpha=0.45, markersize=5, markeredgewidth=0)
        axes.plot([percent * row["mean"]] * 2, [line - 0.3, line + 0.3], color=color, linewidth=2.2)
    axes.axvline(percent * table[0]["mean"], color=RIGHT, linewidth=0.8, alpha=0.5)
    axes.axvline(percent * majority, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(table)), [row["variant"] for row in table], family=FONT, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} (%); dots: runs, bars: means, dashed: most common answer", fontsize=8, color=MUTED)
    axes.tick_params(axis="x", labelsize=8, colors=MUTED)
    axes.grid(axis="x", color=EDGE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return save(figure, Path(path))


def _axes_of(figure, title, xlabel, ylabel):
    axes = figure if hasattr(figure, "plot") else figure.subplots()
    axes.set_title(title, fontsize=9, color=INK, loc="left", family=FONT)
    axes.set_xlabel(xlabel, fontsize=8, color=MUTED, family=FONT)
    axes.set_ylabel(ylabel, fontsize=8, color=MUTED, family=FONT)
    axes.tick_params(labelsize=7, colors=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def learning_curves_plot(log: Sequence[Record], task, path: str | os.PathLike) -> Path:
    """Draw a training run: loss and main metric over epochs, and the weights of modalities where the log has them.

    Args:
        log: of Trainer. task: what is learnt, with its `main_metric`. path: the file to write.

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure

    metric = f"eval_{task.main_metric}"
    losses = [(row["epoch"], row["loss"]) for row in log if "loss" in row]
    chosen = [(row["epoch"], row["eval_loss"]) for row in log if "eval_loss" in row]
    scores = [(row["epoch"], row[metric]) for row in log if metric in row]
    weights: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for key, value in row.items():
            if key.startswith("weight_"):
                weights.setdefault(key.removeprefix("weight_"), []).append((row["epoch"], value))
    panels = 1 + bool(scores) + (len(weights) > 1)
    figure = Figure(figsize=(3.4 * panels, 2.6), facecolor=CARD, layout="constrained")
    grid = list(figure.subplots(1, panels, squeeze=False)[0])
    axes = _axes_of(grid.pop(0), "loss", "epoch", "")
    for points, color, name in ((losses, UNJUDGED, "training"), (chosen, RIGHT, "held out")):
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linewidth=1.6,
                label=name,
                marker="." if len(points) < 3 else "",
            )
    axes.legend(fontsize=7, frameon=False)
    if scores:
        axes = _axes_of(grid.pop(0), f"{task.main_metric}, held out", "epoch", "")
        axes.plot(*zip(*scores, strict=True), color=RIGHT, linewidth=1.6, marker="o", markersize=3)
    if grid:
        axes = _axes_of(grid.pop(0), "weights of modalities", "epoch", "")
        for index, (name, points) in enumerate(weights.items()):
            axes.plot(
                *zip(*points, strict=True),
                color=MODALITY_COLORS[index % len(MODALITY_COLORS)],
                linewidth=1.6,
                label=name,
            )
        axes.set_ylim(0, 1)
        axes.legend(fontsize=7, frameon=False)
    return save(figure, Path(path))


def confusion_plot(counts: np.ndarray, labels: Sequence[str], path: str | os.PathLike) -> Path:
    """Draw counts (A,A) of true labels (rows) taken for others (columns), shaded by the part of each row.

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure

    side = max(2.8, 0.42 * len(labels) + 1.4)
    figure = Figure(figsize=(side, side), facecolor=CARD, layout="constrained")
    axes = _axes_of(figure, "rows: true, columns: chosen", "", "")
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= 30:
        for row, column in np.ndindex(*counts.shape):
            color = CARD if parts[row, column] > 0.5 else INK
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7, color=color)
    return save(figure, Path(path))


def reliability_plot(sure: np.ndarray, right: np.ndarray, parts: np.ndarray, path: str | os.PathLike) -> Path:
    """Draw how often a model was right against how sure it was, by bins (K,) with `parts` (K,) of the rows.

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 3.0), facecolor=CARD, layout="constrained")
    error = float((parts * np.abs(sure - right)).sum())
    axes = _axes_of(figure, f"calibration error {error:.3f}", "probability of the label chosen", "part that is right")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    there = parts > 0
    axes.bar(sure[there], parts[there], width=0.8 / len(parts), color=EDGE)
    axes.plot(sure[there], right[there], color=UNJUDGED, marker="o", markersize=4, linewidth=1.4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return save(figure, Path(path))
