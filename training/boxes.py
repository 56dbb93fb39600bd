"""A drawn world of boxes: three boxes of scattered shapes or stacked blocks, with statements and questions on them.

The kind of picture that NLVR (Suhr et al. 2017) asks about, drawn by ourselves with sentences of our own grammar: a model
that has to count, compare and bind words to boxes learns here in minutes what 12,000 labelled sentences teach slowly.
Every sentence comes as often with a picture that makes it true as with one that makes it false.
"""

import io
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw


COLORS = {"yellow": (255, 255, 0), "blue": (0, 153, 255), "black": (0, 0, 0)}
SHAPES = ("square", "circle", "triangle")
SIZES = (10, 20, 30)
BOX, GAP = 100, 10
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_GROUND = (211, 211, 211)  # of boxes and gaps alike, as NLVR draws them: inner walls cannot be seen
_BLOCK = 20
_MOST_THINGS, _MOST_BLOCKS = 8, 4
_EDGE_SHARE = 0.35  # of scattered things that are pushed to a wall: sentences are fond of them
_SUPERSAMPLING = 3


class Thing(NamedTuple):
    """A thing in a box: x, y of its top left corner in pixels of the box, blocks of a tower from the base up."""

    color: str
    shape: str
    size: int
    x: int
    y: int

    @property
    def walls(self):
        """The walls it touches."""
        right, bottom = self.x + self.size >= BOX, self.y + self.size >= BOX
        touched = {"left": self.x <= 0, "right": right, "top": self.y <= 0, "bottom": bottom}
        return {wall for wall, touches in touched.items() if touches}


class Sentence(NamedTuple):
    """A sentence and what makes it true of three boxes, or its answer."""

    text: str
    holds: Callable[[list[list[Thing]]], object]


def scattered(rng):
    """One to eight things apart from each other, some of them at a wall."""
    things = []
    for _ in range(rng.randint(1, _MOST_THINGS)):
        for _ in range(30):
            size = rng.choice(SIZES)
            x, y = rng.randint(1, BOX - size - 1), rng.randint(1, BOX - size - 1)
            if rng.random() < _EDGE_SHARE:
                walls = rng.choice([(0, None), (BOX - size, None), (None, 0), (None, BOX - size), (BOX - size,) * 2])
                x, y = (old if new is None else new for old, new in zip((x, y), walls, strict=True))
            apart = (
                x >= t.x + t.size + 1 or t.x >= x + size + 1 or y >= t.y + t.size + 1 or t.y >= y + size + 1
                for t in things
            )
            if all(apart):
                things.append(Thing(rng.choice(tuple(COLORS)), rng.choice(SHAPES), size, x, y))
                break
    return things


def tower(rng):
    """One to four blocks on top of each other, from the base up."""
    height = rng.randint(1, _MOST_BLOCKS)
    return [
        Thing(rng.choice(tuple(COLORS)), "square", _BLOCK, (BOX - _BLOCK) // 2, BOX - _BLOCK - level * (_BLOCK + 1))
        for level in range(height)
    ]


def draw_boxes(boxes):
    """An RGB image of 320 x 100 pixels."""
    scale = _SUPERSAMPLING
    image = Image.new("RGB", (3 * BOX + 2 * GAP, BOX), _GROUND)
    for place, things in enumerate(boxes):
        box = Image.new("RGB", (BOX * scale, BOX * scale), _GROUND)
        pen = ImageDraw.Draw(box)
        for color, shape, size, x, y in things:
            left, top, right, bottom = (scale * v for v in (x, y, x + size, y + size))
            if shape == "square":
                pen.rectangle((left, top, right - 1, bottom - 1), fill=COLORS[color])
            elif shape == "circle":
                pen.ellipse((left, top, right - 1, bottom - 1), fill=COLORS[color])
            else:
                pen.polygon(((left + right) / 2, top, right, bottom, left, bottom), fill=COLORS[color])
        image.paste(box.reduce(scale), (place * (BOX + GAP), 0))
    return image


def _number(rng, n):
    return str(n) if rng.random() < 0.4 else NUMBERS[n]


def _quantity(rng, most=4):
    """(words, test of a count, whether the noun is plural)."""
    n = rng.choices(range(1, most + 1), weights=range(most + 1, 1, -1))[0]
    word = _number(rng, n)
    return rng.choice(
        [
            ("a", lambda v: v >= 1, False),
            ("a", lambda v: v >= 1, False),
            (f"exactly {word}", lambda v: v == n, n > 1),
            (f"only {word}", lambda v: v == n, n > 1),
            (f"at least {word}", lambda v: v >= n, n > 1),
            (f"at most {word}", lambda v: v <= n, n > 1),
            ("no", lambda v: v == 0, False),
            (word, lambda v: v == n, n > 1),
        ]
    )


_TOUCHES = {
    "touching the wall": lambda t: bool(t.walls),
    "touching the edge": lambda t: bool(t.walls),
    "touching the side": lambda t: bool(t.walls),
    "closely touching a wall of a box": lambda t: bool(t.walls),
    "not touching any edge": lambda t: not t.walls,
    "touching the right wall": lambda t: "right" in t.walls,
    "touching the base": lambda t: "bottom" in t.walls,
    "closely touching the bottom of a box": lambda t: "bottom" in t.walls,
    "touching the corner": lambda t: len(t.walls) == 2,
    "closely touching a corner of a box": lambda t: len(t.walls) == 2,
}


def _noun(rng, plural, of_tower):
    """(words, test of a thing)."""
    color = rng.choice(tuple(COLORS)) if rng.random() < 0.75 else None
    shape = None if of_tower or rng.random() < 0.45 else rng.choice(SHAPES)
    noun = "block" if of_tower else shape or rng.choice(["item", "object"])
    words = " ".join(filter(None, [color, noun + "s" * plural]))
    return words, lambda t: color in (None, t.color) and shape in (None, t.shape)


def _counted(rng, of_tower, touching=0.0, most=4):
    """(words such as "exactly two blue squares touching the wall", test of a list of things, whether plural)."""
    quantity, enough, plural = _quantity(rng, most)
    noun, is_one = _noun(rng, plural, of_tower)
    touch, touches = rng.choice(list(_TOUCHES.items())) if rng.random() < touching else ("", lambda t: True)
    words = " ".join(filter(None, [quantity, noun, touch]))
    return words, lambda things: enough(sum(is_one(t) and touches(t) for t in things)), plural


def _box_property(rng, of_tower):
    """(words that follow "a box with", test of one box)."""
    kind = rng.random()
    if kind < 0.5:
        parts = [_counted(rng, of_tower, 0.0 if of_tower else 0.15) for _ in range(rng.choice([1, 1, 2]))]
        return " and ".join(words for words, _, _ in parts), lambda box: all(test(box) for _, test, _ in parts)
    noun = "blocks" if of_tower else rng.choice(["items", "objects"])
    if kind < 0.65:
        colors = rng.sample(tuple(COLORS), rng.choice([1, 2]))
        return f"only {' and '.join(colors)} {noun}", lambda box: {t.color for t in box} == set(colors)
    if kind < 0.75:
        n = rng.randint(1, 3)
        return f"{noun} of {_number(rng, n)} different colors", lambda box: len({t.color for t in box}) == n
    if kind < 0.85 or not of_tower:
        n = rng.randint(1, _MOST_BLOCKS if of_tower else 6)
        return f"exactly {_number(rng, n)} {noun if n > 1 else noun[:-1]}", lambda box: len(box) == n
    color, other = rng.choice(tuple(COLORS)), rng.choice(tuple(COLORS))
    if rng.random() < 0.5:
        end, index = rng.choice([("top", -1), ("base", 0)])
        return f"a {color} block at the {end}", lambda box: box[index].color == color
    word, upper, lower = rng.choice([("over", color, other), ("above", color, other), ("below", other, color)])
    return f"a {color} block {word} a {other} block", lambda box: any(
        (high.color, low.color) == (upper, lower) for low, high in zip(box, box[1:], strict=False)
    )


def statement(rng, of_tower):
    """A sentence that is true or false of three boxes."""
    if rng.random() < 0.45:
        words, test, plural = _counted(rng, of_tower, 0.0 if of_tower else 0.6, most=6 if of_tower else 4)
        return Sentence(
            f"there {'are' if plural else 'is'} {words}", lambda boxes: test([t for b in boxes for t in b])
        )
    if of_tower and rng.random() < 0.3:
        quantity, enough, plural = _quantity(rng, 3)
        color, (end, index) = rng.choice(tuple(COLORS)), rng.choice([("top", -1), ("base", 0)])
        words = f"there {'are' if plural else 'is'} {quantity} {color} block{'s' * plural} as the {end} of a tower"
        return Sentence(words, lambda boxes: enough(sum(box[index].color == color for box in boxes)))
    words, test = _box_property(rng, of_tower)
    one, many = ("tower", "towers") if of_tower else ("box", "boxes")
    kind = rng.random()
    if kind < 0.6:
        verb = rng.choice(["with", "with", "that has"])
        return Sentence(f"there is a {one} {verb} {words}", lambda boxes: any(map(test, boxes)))
    if kind < 0.75:
        return Sentence(f"each {one} has {words}", lambda boxes: all(map(test, boxes)))
    n = rng.choice([1, 1, 2, 2, 3])
    word = rng.choice(["", "exactly ", "only "]) + _number(rng, n)
    noun = one if n == 1 else many
    return Sentence(
        f"there {'are' if n > 1 else 'is'} {word} {noun} with {words}", lambda boxes: sum(map(test, boxes)) == n
    )


def question(rng, of_tower):
    """A question whose answer is a number: what to count, told apart from how to judge it."""
    noun, is_one = _noun(rng, True, of_tower)
    kind = rng.random()
    if kind < 0.4 or of_tower:
        if of_tower and kind < 0.5:
            end, index = rng.choice([("top", -1), ("base", 0)])
            color = rng.choice(tuple(COLORS))
            text = f"how many towers have a {color} {end}?"
            return Sentence(text, lambda boxes: sum(box[index].color == color for box in boxes))
        return Sentence(f"how many {noun} are there?", lambda boxes: sum(is_one(t) for b in boxes for t in b))
    if kind < 0.7:
        touch, touches = rng.choice(list(_TOUCHES.items()))
        text = f"how many {noun} are {touch}?"
        return Sentence(text, lambda boxes: sum(is_one(t) and touches(t) for b in boxes for t in b))
    singular, is_this = _noun(rng, False, of_tower)
    return Sentence(f"how many boxes have a {singular}?", lambda boxes: sum(any(map(is_this, b)) for b in boxes))


def boxes_dataset(num_rows, split="train", seed=0, rows_per_image=10, questions=0.35):
    """Rows of the schema of easy-VQA: image, image_id, question, answer ("true", "false" or a number) and kind.

    Args:
        num_rows: about so many rows. rows_per_image: on the average.
        split, seed: another split or seed draws other pictures and other sentences.
        questions: share of rows that ask for a number.
    """
    rng = random.Random(f"boxes {split} {seed}")
    pools = {kind: [[draw(rng) for _ in range(3)] for _ in range(max(8, num_rows // rows_per_image // 2))]
             for kind, draw in (("scattered", scattered), ("tower", tower))}  # fmt: skip
    rows = []
    while len(rows) < num_rows:
        kind = rng.choice(tuple(pools))
        asks = rng.random() < questions
        sentence = (question if asks else statement)(rng, kind == "tower")
        # Answers of a sentence are looked for in random pictures: none may be told from the words alone.
        found = {}
        for index in rng.sample(range(len(pools[kind])), min(60, len(pools[kind]))):
            answer = sentence.holds(pools[kind][index])
            if len(found) < 2 and (not asks or answer < len(NUMBERS)):
                found.setdefault(str(int(answer)) if asks else str(bool(answer)).lower(), index)
        if len(found) == 2:
            rows += [(kind, index, sentence.text, answer) for answer, index in found.items()]
    return _as_dataset([(kind, index, text, {"answer": answer}) for kind, index, text, answer in rows], pools)


def facts_of(boxes):
    """Everything that sentences ask about boxes, as strings: counts by color and shape, walls, ends and neighbours."""
    counts = Counter()
    for box in boxes:
        for thing in box:
            kinds = [thing.color, thing.shape, f"{thing.color} {thing.shape}"]
            walls = ["wall"] * bool(thing.walls) + ["corner"] * (len(thing.walls) == 2)
            walls += [wall for wall in ("right", "bottom") if wall in thing.walls]
            counts.update(["item", *kinds])
            counts.update(f"{kind} at {wall}" for kind in ["item", *kinds[:2]] for wall in walls)
        if box and all(thing.x == (BOX - _BLOCK) // 2 for thing in box):
            counts.update([f"{box[0].color} base", f"{box[-1].color} top", f"tower of {len(box)}"])
            counts.update(f"{high.color} over {low.color}" for low, high in zip(box, box[1:], strict=False))
    return {f"{n} {name}" for name, count in counts.items() for n in range(1, min(count, _MOST_COUNTED) + 1)}


_MOST_COUNTED = 6


def facts_dataset(num_rows, split="train", seed=0):
    """Rows of image, image_id, question ("what is in the boxes?"), facts (all that hold of them) and kind.

    A question here has many true answers: it teaches to see, before sentences teach to count and compare.
    """
    rng = random.Random(f"facts {split} {seed}")
    pools, rows = {"scattered": [], "tower": []}, []
    for _ in range(num_rows):
        kind, draw = rng.choices([("scattered", scattered), ("tower", tower)], [3, 1])[0]
        boxes = [draw(rng) for _ in range(3)]
        pools[kind].append(boxes)
        rows.append((kind, len(pools[kind]) - 1, "what is in the boxes?", {"facts": sorted(facts_of(boxes))}))
    return _as_dataset(rows, pools)


def _as_dataset(rows, pools):
    """Rows (kind, index into its pool of boxes, question, columns of its own) as a `datasets.Dataset`, images in order."""
    from datasets import Dataset, Image

    images, ids = [], {}
    for kind, index, _, _ in rows:
        if (kind, index) not in ids:
            ids[kind, index] = len(images)
            buffer = io.BytesIO()
            draw_boxes(pools[kind][index]).save(buffer, format="PNG", compress_level=1)
            images.append(buffer.getvalue())
    rows = sorted(rows, key=lambda row: ids[row[0], row[1]])
    columns = {
        "image": [{"bytes": images[ids[row[0], row[1]]], "path": None} for row in rows],
        "image_id": [ids[row[0], row[1]] for row in rows],
        "question": [row[2] for row in rows],
        "kind": [row[0] for row in rows],
    }
    columns |= {name: [row[3][name] for row in rows] for name in rows[0][3]}
    return Dataset.from_dict(columns).cast_column("image", Image())
