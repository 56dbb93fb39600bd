"""How a model holds when a modality is missing or noisy: accuracy over rates and levels, modality by modality."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from ..processing.chat_crossmodal import is_conversation
from .card import put_section
from .evaluate import samples_of, task_of
from .loading import load_rows


@dataclass(frozen=True)
class Corruption:
    """What is done to one input.

    Args:
        apply: (value, level, rng) to the corrupted value.
        levels: that are measured, mildest first.
        unit: of a level, for tables and plots.
    """

    apply: object
    levels: tuple[float, ...]
    unit: str


def _gaussian_image(image, level, rng):
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    noisy = pixels + rng.normal(scale=level, size=pixels.shape)
    return Image.fromarray((noisy.clip(0, 1) * 255).round().astype(np.uint8))


def _blur(image, level, rng):
    # In parts of the shorter side, so that a level means the same for every size.
    return image.convert("RGB").filter(ImageFilter.GaussianBlur(level * min(image.size)))


_GRID = 8


def _drop_patches(image, level, rng):
    """Cells of an 8 x 8 grid painted in the mean color."""
    pixels = np.asarray(image.convert("RGB")).copy()
    rows = np.linspace(0, pixels.shape[0], _GRID + 1).astype(int)
    columns = np.linspace(0, pixels.shape[1], _GRID + 1).astype(int)
    mean = pixels.mean(axis=(0, 1)).astype(np.uint8)
    for cell in np.flatnonzero(rng.random(_GRID**2) < level):
        row, column = divmod(cell, _GRID)
        pixels[rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = mean
    return Image.fromarray(pixels)


def _drop_words(text, level, rng):
    if is_conversation(text):
        asked = [message | {"content": _drop_words(message["content"], level, rng)} for message in text]
        return [new if new["role"] == "user" else message for new, message in zip(asked, text, strict=True)]
    words = text.split()
    kept = [word for word in words if rng.random() >= level]
    return " ".join(kept) or words[int(rng.integers(len(words)))]


def _gaussian_values(values, level, rng):
    """Noise of `level` times the standard deviation of a signal or of features."""
    if isinstance(values, dict):
        return values | {"array": _gaussian_values(values["array"], level, rng)}
    values = np.asarray(values, dtype=np.float32)
    return values + rng.normal(scale=level * values.std(), size=values.shape).astype(np.float32)


def _drop_steps(values, level, rng):
    if isinstance(values, dict):
        return values | {"array": _drop_steps(values["array"], level, rng)}
    values = np.asarray(values, dtype=np.float32)
    kept = rng.random(len(values)) >= level
    return np.where(kept.reshape(-1, *[1] * (values.ndim - 1)), values, 0.0).astype(np.float32)


def _drop_frames(frames, level, rng):
    """Frames painted in one grey."""
    return [Image.new("RGB", frame.size, (127,) * 3) if rng.random() < level else frame for frame in frames]


def _every_frame(apply):
    return lambda frames, level, rng: [apply(frame, level, rng) for frame in frames]


_SIGNAL = {
    "gaussian": Corruption(_gaussian_values, (0.25, 0.5, 1.0), "noise / signal"),
    "token drop": Corruption(_drop_steps, (0.25, 0.5, 0.75), "rate"),
}
# By type of modality.
CORRUPTIONS = {
    "vision": {
        "gaussian": Corruption(_gaussian_image, (0.1, 0.2, 0.4), "noise / range"),
        "blur": Corruption(_blur, (0.02, 0.04, 0.08), "radius / side"),
        "token drop": Corruption(_drop_patches, (0.25, 0.5, 0.75), "rate"),
    },
    "video": {
        "gaussian": Corruption(_every_frame(_gaussian_image), (0.1, 0.2, 0.4), "noise / range"),
        "blur": Corruption(_every_frame(_blur), (0.02, 0.04, 0.08), "radius / side"),
        "token drop": Corruption(_drop_frames, (0.25, 0.5, 0.75), "rate"),
    },
    "text": {"token drop": Corruption(_drop_words, (0.25, 0.5, 0.75), "rate")},
    "audio": _SIGNAL,
    "features": _SIGNAL,
    "eeg": _SIGNAL,
}
MISSING_RATES = (0.25, 0.5, 0.75, 1.0)


class CorruptedDataset(Dataset):
    """A dataset whose samples have one input missing or corrupted, the same way every time.

    Args:
        dataset: of samples, or of cached tokens. name: of the modality. arguments: of the processor, by modality.
        corruption: a row of `CORRUPTIONS`, or None to take the input away at rate `level` from rows that have another.
    """

    def __init__(self, dataset, name, arguments, corruption, level, seed=0):
        self.dataset, self.name, self.arguments = dataset, name, arguments
        self.corruption, self.level, self.seed = corruption, level, seed
        self.targets, self.places = dataset.targets, dataset.places

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        keys = {name: (argument, f"{name}_tokens") for name, argument in self.arguments.items()}
        present = {name for name, own in keys.items() if any(sample.get(key) is not None for key in own)}
        if self.name not in present:
            return sample
        rng = np.random.default_rng([self.seed, index])
        argument = self.arguments[self.name]
        if self.corruption is not None:
            return sample | {argument: self.corruption.apply(sample[argument], self.level, rng)}
        if rng.random() >= self.level or present == {self.name}:
            return sample
        lost = (argument, f"{self.name}_tokens", f"{self.name}_key")
        return sample | {key: None for key in lost if key in sample}


def robustness(model, processor, dataset, split, seed=0, batch_size=128, limit=None, write=print):
    """Scores of a model on a split as it is, and with each modality missing or corrupted.

    Args:
        model: a head with a task. dataset: Hub id, folder, file, or rows. limit: use only so many rows.
        write: takes each line of report.

    Returns:
        list of dicts `{"modality", "kind", "level", "unit", <metrics>}`, the first one (`modality` None) of clean rows.
    """
    rows = load_rows(dataset, split) if isinstance(dataset, str) else dataset
    task = task_of(model, rows.column_names)
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(limit))
    samples = samples_of(model, rows, task)
    task.check_targets(samples.targets, allow_unknown=True)

    def measured(data, **what):
        scores = task.evaluate(model, processor, data, batch_size)
        return {**what, **scores}

    arguments = {name: processor.argument_of(name) for name in processor.modality_names}
    table = [measured(samples, modality=None, kind="clean", level=0.0, unit="")]
    for name, argument in arguments.items():
        if argument not in samples.adapter.inputs:
            continue
        kinds = {"missing": None} if len(arguments) > 1 else {}
        kinds |= CORRUPTIONS.get(model.config.modality_settings[name]["type"], {})
        for kind, corruption in kinds.items():
            for level in MISSING_RATES if corruption is None else corruption.levels:
                data = CorruptedDataset(samples, name, arguments, corruption, level, seed)
                unit = "rate" if corruption is None else corruption.unit
                table.append(measured(data, modality=name, kind=kind, level=level, unit=unit))
                write(f"{name}, {kind} {level:g}: {task.main_metric} {table[-1][task.main_metric]:.3f}")
    return table


def as_markdown(table, metric):
    """The table of `robustness` as Markdown: a line per modality and kind, a column per level."""
    lines = [f"Clean: {table[0][metric]:.3f}.", "", "| | levels | " + metric + " |", "|---|---|---|"]
    groups = {}
    for row in table[1:]:
        groups.setdefault((row["modality"], row["kind"], row["unit"]), []).append(row)
    for (modality, kind, unit), rows in groups.items():
        levels = ", ".join(f"{row['level']:g}" for row in rows)
        scores = ", ".join(f"{row[metric]:.3f}" for row in rows)
        lines.append(f"| {modality}, {kind} ({unit}) | {levels} | {scores} |")
    return "\n".join(lines)


_HEADING = "## When a modality is missing or noisy"


def add_to_folder(folder, table, metric, where):
    """Writes `robustness.json`, `robustness.png` and a section of the card into a model's folder.

    where: words for the data, such as "`mvsa_single`, validation, 451 rows".
    """
    from .plots import robustness_plot

    folder = Path(folder)
    (folder / "robustness.json").write_text(json.dumps(table, indent=1) + "\n")
    robustness_plot(table, metric, folder / "robustness.png")
    body = (
        f"{metric} on {where}. Missing rows lose the modality at that rate, and keep another one.\n\n"
        f"{as_markdown(table, metric)}\n\n![{metric} over rates and levels](robustness.png)"
    )
    put_section(folder / "README.md", _HEADING, body)
