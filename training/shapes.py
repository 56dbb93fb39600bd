"""A drawn world for small models: colored shapes on light paper, and balanced questions about them.

Every kind of question has its answers in equal numbers, and so has every wording as far as scenes allow. A
model that reads only the question stays near 1 / (answers that its words allow): what it scores above, it has seen.
"""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import permutations, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw


if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("exists", "color", "shape", "count", "place", "relation", "comparison")
# One look at one thing answers these. Without them first, two looks and a comparison of what they find are not learnt; and
# they are learnt at once where things differ, so that whatever a question names is one thing among others that it is not.
SIMPLE_KINDS = ("exists", "color", "shape", "place")
SPLITS = ("train", "validation", "test")
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (222, 56, 49),
    "green": (52, 168, 83),
    "blue": (44, 104, 222),
    "yellow": (247, 201, 32),
    "purple": (146, 70, 186),
}
IMAGE_SIZE = 64

_SUPERSAMPLING = 4
# Few and large on purpose, and often one alone: that is where a small model learns what words mean.
_THINGS = (0.4, 0.2, 0.2, 0.2)  # probability of 1, 2, ... of them
_ALIKE = (0.4, 0.2, 0.4)  # probability that 1, 2, ... of them share a shape; likewise a color
_DIFFERENT = (1.0, 0.0, 0.0)
_RADII = (9.0, 12.0)  # of the circle around a thing
_GAP = 2.5  # least distance between the circles around two things
_PATIENCE = 100  # misses before places are drawn anew
_MARGIN = 12.0  # least distance between two centres along the axis that a relation names
_OFF_CENTRE = 6.0  # least distance of a centre from the middle of the image, where a side of it is asked for

_TALKED_ABOUT = (0.2, 0.3, 0.3, 0.2)  # probability of 1, 2, ... things in a scene of a dialogue
_APART = 6.0  # least distance along the x axis of things that a caption names in order

# A caption and questions about it.
DIALOGUE_TURNS = 6
_DESCRIBE = ("what is in the picture?", "describe the picture.", "what do you see?")

# Relative to the circle around a thing, y pointing down. For areas that are alike, the triangle sticks out of
# its circle with two corners, by less than half the gap.
_CIRCLE_RADIUS = 0.82
_CORNERS = {
    "square": ((-0.71, -0.71), (0.71, -0.71), (0.71, 0.71), (-0.71, 0.71)),
    "triangle": ((0.0, -1.0), (0.9, 0.62), (-0.9, 0.62)),
}

# Asked once more on the same image, after one question of each kind: two looks and a comparison take most examples to learn.
_FURTHER = ("relation", "relation")
QUESTIONS_PER_IMAGE = len(KINDS) + len(_FURTHER)

# What a question may call a thing, from each of which its phrases are drawn evenly.
_PHRASES = {
    "shape": SHAPES,
    "color": tuple(f"{color} shape" for color in COLORS),
    "both": tuple(f"{color} {shape}" for color, shape in product(COLORS, SHAPES)),
}
# Axis, and sign along it of the way from the first thing to the second.
_RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
# Axis, and the answers where the first thing comes first along it, and where it comes last.
_DIRECTIONS = {"left or right of": (0, ("left", "right")), "above or below": (1, ("above", "below"))}
_SIDES = {"on the left or on the right": (0, ("left", "right")), "at the top or at the bottom": (1, ("top", "bottom"))}
_TEMPLATES = {
    "exists": ("is there a {0}?", "can you see a {0}?", "does the picture show a {0}?"),
    "color": ("what color is the {0}?", "what is the color of the {0}?", "which color does the {0} have?"),
    "shape": ("what shape is the {0} thing?", "what is the shape of the {0} thing?", "which shape is {0}?"),
    "count": ("how many {0}s are there?", "how many {0}s can you see?", "what is the number of {0}s?"),
    "place": ("is the {0} {1}?", "do you see the {0} {1}?"),
    "relation": ("is the {0} {1} the {2}?", "do you see the {0} {1} the {2}?"),
    "comparison": ("are there more {0}s than {1}s?", "do you see more {0}s than {1}s?"),
}


class Thing(NamedTuple):
    """One shape of a scene, its place in pixels from the top left corner."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


class Question(NamedTuple):
    """A question before its wording: `naming` is what it names things by, `words` fill a template."""

    kind: str
    naming: str
    words: tuple[str, ...]
    answer: str


def sample_scene(rng: np.random.Generator, different: bool = False, number: int | None = None) -> list[Thing]:
    """Draw one to four things, apart from each other; at most three share a shape or a color.

    different: they share neither, as far as there are shapes. number: of things; None draws it too, often one.
    """
    if number is None:
        number = 1 + rng.choice(len(_THINGS), p=_THINGS)
    alike = _DIFFERENT if different else _ALIKE
    shapes = _sample_values(rng, SHAPES, number, alike)
    colors = _sample_values(rng, tuple(COLORS), number, alike)
    places = _sample_places(rng, number)
    return [Thing(shape, color, *place) for shape, color, place in zip(shapes, colors, places, strict=True)]


def _sample_values(rng: np.random.Generator, values: tuple[str, ...], number: int, chances) -> list[str]:
    """A random value one to three times, others in turn: independent draws have few threes and few ones."""
    alike = min(number, 1 + rng.choice(len(chances), p=chances))
    first, *others = rng.permutation(len(values))
    indices = np.append(np.repeat(first, alike), np.resize(others, number - alike))
    return [values[i] for i in rng.permutation(indices)]


def _sample_places(rng: np.random.Generator, number: int) -> list[tuple[float, float, float]]:
    """Random (x, y, radius) whose circles lie apart and inside the image."""
    places = []
    misses = 0
    while len(places) < number:
        radius = rng.uniform(*_RADII)
        x, y = rng.uniform(radius + 1, IMAGE_SIZE - 1 - radius, size=2).tolist()
        if all(math.hypot(x - x2, y - y2) >= radius + radius2 + _GAP for x2, y2, radius2 in places):
            places.append((x, y, radius))
        elif (misses := misses + 1) % _PATIENCE == 0:
            places.clear()  # no room may be left among these
    return places


def draw_scene(scene: list[Thing], rng: np.random.Generator) -> Image.Image:
    """Paint a scene as an anti-aliased RGB image; `rng` shades the paper and the colors a little."""

    def shade(color: tuple[int, ...], spread: int) -> tuple[int, ...]:
        return tuple(np.clip(np.add(color, rng.integers(-spread, spread + 1, size=3)), 0, 255).tolist())

    side = IMAGE_SIZE * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), shade((245, 245, 245), spread=8))
    pen = ImageDraw.Draw(canvas)
    for thing in scene:
        x, y, radius = (_SUPERSAMPLING * value for value in (thing.x, thing.y, thing.radius))
        fill = shade(COLORS[thing.color], spread=14)
        if thing.shape == "circle":
            pen.circle((x, y), radius * _CIRCLE_RADIUS, fill=fill)
        else:
            pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _CORNERS[thing.shape]], fill=fill)
    return canvas.reduce(_SUPERSAMPLING)


def questions_about(scene: list[Thing]) -> Iterator[Question]:
    """Every question with one clear answer in this scene: no ties, near misses or ambiguous referents."""
    called = defaultdict(list)
    for thing in scene:
        for phrase in (thing.shape, f"{thing.color} shape", f"{thing.color} {thing.shape}"):
            called[phrase].append(thing)
    count = Counter({phrase: len(things) for phrase, things in called.items()})
    unique = {phrase: things[0] for phrase, things in called.items() if len(things) == 1}

    colors = [Question("color", "shape", (word,), unique[word].color) for word in SHAPES if word in unique]
    shapes = [
        Question("shape", "color", (color,), unique[f"{color} shape"].shape)
        for color in COLORS
        if f"{color} shape" in unique
    ]
    for questions in (colors, shapes):
        # Else the picture alone would tell. Of a lone thing it may: the plainest lesson in what words mean.
        if len(scene) == 1 or len({question.answer for question in questions}) > 1:
            yield from questions

    for naming, phrases in _PHRASES.items():
        for phrase in phrases:
            yield Question("exists", naming, (phrase,), _yes_no(count[phrase] > 0))
            if naming != "both":
                yield Question("count", naming, (phrase,), str(count[phrase]))
            if phrase in unique:
                for sides, (axis, answers) in _SIDES.items():
                    offset = _offset(unique[phrase], axis)
                    # As above: something else must lie on the other side.
                    other_side = any(_offset(thing, axis) * offset < 0 for thing in scene)
                    if abs(offset) >= _OFF_CENTRE and (other_side or len(scene) == 1):
                        yield Question("place", naming, (phrase, sides), answers[offset > 0])
        for a, b in permutations(phrases, 2):
            if naming != "both" and count[a] != count[b]:
                yield Question("comparison", naming, (a, b), _yes_no(count[a] > count[b]))
            if a in unique and b in unique:
                way = (unique[b].x - unique[a].x, unique[b].y - unique[a].y)
                for relation, (axis, sign) in _RELATIONS.items():
                    if abs(way[axis]) >= _MARGIN:
                        yield Question("relation", naming, (a, relation, b), _yes_no(sign * way[axis] > 0))
                for directions, (axis, answers) in _DIRECTIONS.items():
                    if abs(way[axis]) >= _MARGIN:
                        yield Question("relation", naming, (a, directions, b), answers[way[axis] < 0])


def _offset(thing: Thing, axis: int) -> float:
    """How far from the middle a thing lies, in pixels; axis 0 to the right, 1 downwards."""
    return (thing.x, thing.y)[axis] - IMAGE_SIZE / 2


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _least_asked(questions: list[Question], asked: Counter, rng: np.random.Generator) -> Question:
    """The question whose answer was given least, first overall, then for its words; else a random one."""
    order = rng.permutation(len(questions))
    return min((questions[i] for i in order), key=lambda question: [asked[key] for key in _tallies(question)])


def _tallies(question: Question) -> tuple[tuple, ...]:
    kind, naming, words, answer = question
    return (kind, answer), (kind, naming, answer), (kind, words, answer)


def draw_rows(
    num_images: int,
    questions_per_image: int = QUESTIONS_PER_IMAGE,
    split: str = "train",
    seed: int = 0,
    kinds: tuple[str, ...] = KINDS,
    different: bool = False,
) -> list[dict]:
    """Draw images with questions of different kinds; the same arguments give the same rows.

    Args:
        num_images: how many images to draw. Splits never share one, whatever their sizes.
        questions_per_image: at most this many questions on an image, one of each kind and then more of relation (fewer
            where a scene allows fewer: one thing alone has no relation).
        split: "train", "validation" or "test".
        seed: another seed draws another world.
        kinds: of questions, some of `KINDS`.
        different: the things of a scene share neither shape nor color, as far as there are shapes.

    Returns:
        Rows with `image` (RGB, 64 x 64, shared by its rows), `image_id`, `question`, `answer` and `kind`.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Expected one of {SPLITS}. Correct the name.")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds has {sorted(unknown)}. Expected some of {KINDS}. Correct the name.")
    if num_images < 1 or not 1 <= questions_per_image <= QUESTIONS_PER_IMAGE:
        raise ValueError(
            f"Got num_images={num_images}, questions_per_image={questions_per_image}. Expected at least one "
            f"image, and 1 to {QUESTIONS_PER_IMAGE} questions on it. Correct the number."
        )
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split),)))
    asked = Counter()
    rows = []
    for image_id in range(num_images):
        scene = sample_scene(rng, different)
        image = draw_scene(scene, rng)
        by_kind = defaultdict(list)
        for question in questions_about(scene):
            if question.kind in kinds:
                by_kind[question.kind].append(question)
        in_turn = sorted(by_kind, key=lambda kind: (asked[kind], rng.random()))
        for kind in [*in_turn, *(kind for kind in _FURTHER if kind in by_kind)][:questions_per_image]:
            if not by_kind[kind]:
                continue
            question = _least_asked(by_kind[kind], asked, rng)
            by_kind[kind].remove(question)
            asked.update((kind, *_tallies(question)))
            text = rng.choice(_TEMPLATES[kind]).format(*question.words)
            row = {"image": image, "image_id": image_id, "question": text, "answer": question.answer}
            rows.append(row | {"kind": kind})
    return rows


def shapes_dataset(
    num_images: int,
    split: str = "train",
    seed: int = 0,
    questions_per_image: int = QUESTIONS_PER_IMAGE,
    kinds: tuple[str, ...] = KINDS,
    different: bool = False,
) -> "Dataset":
    """The rows of `draw_rows` as a `datasets.Dataset`, with the columns that a VQA set from the Hub has."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = draw_rows(num_images, questions_per_image, split=split, seed=seed, kinds=kinds, different=different)
    images = {row["image_id"]: row["image"] for row in rows}
    files = {image_id: _png(image) for image_id, image in images.items()}
    text = Value("string")
    features = Features(
        {"image": ImageFeature(), "image_id": Value("int64"), "question": text, "answer": text, "kind": text}
    )
    columns = {name: [row[name] for row in rows] for name in features}
    columns["image"] = [{"bytes": files[image_id], "path": None} for image_id in columns["image_id"]]
    return Dataset.from_dict(columns, features=features)


def facts_of(scene: list[Thing]) -> set[str]:
    """Everything that questions ask about, as strings: how many there are of each color and shape, and where."""
    counts = Counter()
    for thing in scene:
        sides = ["left" if thing.x < IMAGE_SIZE / 2 else "right", "top" if thing.y < IMAGE_SIZE / 2 else "bottom"]
        counts.update([thing.color, thing.shape, f"{thing.color} {thing.shape}"])
        counts.update(f"{name} {side}" for name in (thing.color, thing.shape) for side in sides)
    return {f"{n} {name}" for name, count in counts.items() for n in range(1, count + 1)}


def facts_dataset(num_images: int, split: str = "train", seed: int = 0) -> "Dataset":
    """Rows of image, image_id, question ("what is in the picture?") and facts (all that hold of it).

    A question here has many true answers: it teaches to see, before questions with one answer teach to look.
    """
    from datasets import Dataset
    from datasets import Image as ImageFeature

    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), 1)))
    scenes = [sample_scene(rng) for _ in range(num_images)]
    columns = {
        "image": [{"bytes": _png(draw_scene(scene, rng)), "path": None} for scene in scenes],
        "image_id": range(num_images),
        "question": ["what is in the picture?"] * num_images,
        "facts": [sorted(facts_of(scene)) for scene in scenes],
    }
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


class _Ask(NamedTuple):
    """A turn of a dialogue: its kind, the question, the answer, the thing it is about (its number), and what of that is known
    now. `form` asks the same of another thing."""

    kind: str
    question: str
    answer: str
    thing: int | None = None
    known: tuple[str, ...] = ()
    form: tuple[str, ...] = ()


def caption_of(scene: list[Thing]) -> str:
    """Every thing of a scene, from the left to the right."""
    named = [f"a {thing.color} {thing.shape}" for thing in sorted(scene, key=lambda thing: thing.x)]
    return " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))


def _asks(scene: list[Thing], last: _Ask, names: dict[int, dict[str, str]]) -> Iterator[_Ask]:
    """What may be asked next. Kinds `it` and `and` cannot be answered without the turn before."""
    for thing, phrases in names.items():
        for naming, phrase in phrases.items():
            for about in ("color", "shape", *_SIDES):
                answer = _about(scene, thing, about)
                if answer is None or about == naming:
                    continue
                form = (about, naming)
                known = (naming, about)
                if last.form == form and thing != last.thing:
                    yield _Ask("and", f"and the {phrase}?", answer, thing, known, form)
                if about in _SIDES:
                    yield _Ask("side", f"is the {phrase} {about}?", answer, thing, known, form)
                elif about == "color":
                    yield _Ask("color", f"what color is the {phrase}?", answer, thing, known, form)
                else:
                    yield _Ask("shape", f"what shape is the {phrase}?", answer, thing, known, form)
    if last.thing is not None:
        for about in ("color", "shape", *_SIDES):
            answer = _about(scene, last.thing, about)
            if answer is not None and about not in last.known:
                question = f"is it {about}?" if about in _SIDES else f"what {about} is it?"
                yield _Ask("it", question, answer, last.thing, (*last.known, about))
    yield _Ask("count", "how many things are there?", str(len(scene)))
    for phrase in _PHRASES["both"]:
        there = [n for n, thing in enumerate(scene) if f"{thing.color} {thing.shape}" == phrase]
        known = ("color", "shape")
        yield _Ask(
            "exists", f"is there a {phrase}?", _yes_no(bool(there)), there[0] if len(there) == 1 else None, known
        )


def _about(scene: list[Thing], thing: int, about: str) -> str | None:
    """Color, shape or side of a thing; None where its side is not clear, or where nothing lies on the other one."""
    if about not in _SIDES:
        return getattr(scene[thing], about)
    axis, answers = _SIDES[about]
    offset = _offset(scene[thing], axis)
    other_side = len(scene) == 1 or any(_offset(other, axis) * offset < 0 for other in scene)
    return answers[offset > 0] if abs(offset) >= _OFF_CENTRE and other_side else None


def sample_dialogue(scene: list[Thing], turns: int, rng: np.random.Generator, caption: bool = True) -> list[_Ask]:
    """A caption, and questions of kinds drawn evenly, as far as a scene allows them."""
    asked = [_Ask("caption", str(rng.choice(_DESCRIBE)), caption_of(scene))]
    turns += not caption
    shapes = Counter(thing.shape for thing in scene)
    names = {}
    for number, thing in enumerate(scene):
        names[number] = {"color": f"{thing.color} thing"}
        if shapes[thing.shape] == 1:
            names[number]["shape"] = thing.shape
    while len(asked) < turns:
        by_kind = defaultdict(list)
        for ask in _asks(scene, asked[-1], names):
            if ask.question not in [earlier.question for earlier in asked if earlier.kind not in ("it", "and")]:
                by_kind[ask.kind].append(ask)
        kinds = sorted(by_kind)
        # Half of the turns go on from the one before, where they can.
        going_on = [kind for kind in kinds if kind in ("it", "and")]
        kind = str(rng.choice(going_on if going_on and rng.random() < 0.5 else kinds))
        questions = by_kind[kind]
        if kind == "exists":
            truth = _yes_no(bool(rng.random() < 0.5))
            questions = [ask for ask in questions if ask.answer == truth] or questions
        asked.append(questions[rng.integers(len(questions))])
    return asked if caption else asked[1:]


def dialogues_dataset(
    num_images: int, split: str = "train", seed: int = 0, turns: int = DIALOGUE_TURNS, apart: bool = False
) -> "Dataset":
    """Rows of image, image_id, `messages` (user and assistant in turn, the first asking for a caption) and `kinds` of the questions.

    apart: each turn begins a dialogue of its own, and makes a row; nothing needs an earlier turn then.

    The things of a scene have different colors, and lie apart from the left to the right as far as it takes to tell which comes
    first.
    """
    from datasets import Dataset
    from datasets import Image as ImageFeature

    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), 2)))
    columns = {"image": [], "image_id": [], "messages": [], "kinds": []}
    drawn = 0
    while drawn < num_images:
        number = 1 + int(rng.choice(len(_TALKED_ABOUT), p=_TALKED_ABOUT))
        while True:
            scene = sample_scene(rng, different=True, number=number)
            places = sorted(thing.x for thing in scene)
            if all(right - left >= _APART for left, right in zip(places, places[1:], strict=False)):
                break
        if apart:
            dialogues = [sample_dialogue(scene, 1, rng, caption=number == 0) for number in range(turns)]
        else:
            dialogues = [sample_dialogue(scene, turns, rng)]
        image = {"bytes": _png(draw_scene(scene, rng)), "path": None}
        for asks in dialogues:
            said = [pair for ask in asks for pair in (("user", ask.question), ("assistant", ask.answer))]
            columns["image"].append(image)
            columns["image_id"].append(drawn)
            columns["messages"].append([{"role": role, "content": content} for role, content in said])
            columns["kinds"].append([ask.kind for ask in asks])
        drawn += 1
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
