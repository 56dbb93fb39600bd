"""Clips made of two real datasets: pictures of a few classes that move one after another, beside recordings of the same classes.

What is seen and what is said agree in time: to tell two clips of the same classes in another order apart, a model has to match
over time, which mean features cannot.
"""

import io
import random
from itertools import permutations

import numpy as np
from PIL import Image

from ..processing.reading_crossmodal import read_image, read_sound, resample


# Of every clip: classes, frames and seconds of each, side of a frame in pixels, and rate of the sound in Hz.
CLASSES, FRAMES_EACH, SECONDS_EACH, SIDE, RATE = 3, 6, 0.6, 48, 8000
# A picture moves about a quarter of the free room from frame to frame.
_STEP = 0.25


def clips_dataset(sounds, images, column, split, matching=False, count=None):
    """Rows of clips: `video`, a list of encoded frames, `audio`, an encoded sound, and `class`, its classes in order, as a string.

    Args:
        sounds, images: rows with `audio` and `image`, and the class in `column`.
        split: with its name the draws are those of another world.
        matching: half of the clips are beside the sound of others, and `label` says "same" or "different". Of those half say the
            same classes in another order, the others another class in one place.
        count: of clips; None: three times as many as there are sounds.

    Raises:
        ValueError: if one lacks its column, or a class of sounds has no picture.
    """
    import datasets

    for rows, needed in ((sounds, "audio"), (images, "image")):
        if missing := {needed, column} - set(rows.column_names):
            raise ValueError(
                f"clips need the columns {needed!r} and {column!r}; {sorted(missing)} is not in {rows.column_names}."
            )
    said, shown = _places(sounds[column]), _places(images[column])
    if missing := set(said) - set(shown):
        raise ValueError(f"no picture has {column}={sorted(missing)[0]!r}, and a sound has.")
    sounds = sounds.cast_column("audio", datasets.Audio(decode=False))
    images = images.cast_column("image", datasets.Image(decode=False))
    names, draw = sorted(said), random.Random(f"clips of {split}")
    made = []
    for number in range(3 * len(sounds) if count is None else count):
        seen = [draw.choice(names) for _ in range(CLASSES)]
        same = not matching or number % 2 == 0
        heard = seen if same else _another(seen, names, draw)
        pictures = [read_image(images[draw.choice(shown[name])]["image"]["bytes"]) for name in seen]
        waves = [read_sound(sounds[draw.choice(said[name])]["audio"]["bytes"]) for name in heard]
        row = {"video": _frames(pictures, draw), "audio": {"bytes": _sound(waves), "path": None}}
        row["class"] = " ".join(map(str, seen))
        made.append(row | ({"label": "same" if same else "different"} if matching else {}))
    # As stored: the feature `Audio` wants torchcodec to write what is encoded already.
    sound = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"video": datasets.List(datasets.Image(decode=False)), "audio": sound}
    features |= {key: datasets.Value("string") for key in ("class", "label") if key in made[0]}
    return datasets.Dataset.from_list(made, features=datasets.Features(features))


def _places(values):
    places = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return places


def _another(names, every, draw):
    """Other classes than `names`, in half of the draws the same ones in another order, where there is one."""
    orders = sorted({order for order in permutations(names) if list(order) != names})
    if orders and draw.random() < 0.5:
        return list(draw.choice(orders))
    changed, place = list(names), draw.randrange(len(names))
    changed[place] = draw.choice([name for name in every if name != names[place]])
    return changed


def _frames(pictures, draw):
    """Encoded frames of pictures that move one after another, each along a line that the edges throw back."""
    frames = []
    for picture in pictures:
        room = [SIDE - side for side in picture.size]
        place = [draw.uniform(0, free) for free in room]
        step = [draw.uniform(-_STEP, _STEP) * free for free in room]
        for _ in range(FRAMES_EACH):
            frame = Image.new("L", (SIDE, SIDE))
            frame.paste(picture.convert("L"), tuple(round(where) for where in place))
            written = io.BytesIO()
            frame.save(written, "PNG", compress_level=1)
            frames.append({"bytes": written.getvalue(), "path": None})
            for axis, free in enumerate(room):
                if not 0 <= place[axis] + step[axis] <= free:
                    step[axis] = -step[axis]
                place[axis] += step[axis]
    return frames


def _sound(waves):
    """The bytes of a WAV file of recordings, each in the middle of its part of the time; longer ones are cut."""
    import soundfile

    length, parts = int(SECONDS_EACH * RATE), []
    for wave in waves:
        samples = resample(wave["array"], wave["sampling_rate"], RATE)
        start = max(0, (len(samples) - length) // 2)
        samples = samples[start : start + length]
        before = (length - len(samples)) // 2
        parts.append(np.pad(samples, (before, length - len(samples) - before)))
    written = io.BytesIO()
    soundfile.write(written, np.concatenate(parts), RATE, format="WAV")
    return written.getvalue()
