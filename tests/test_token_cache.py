"""The cache of frozen encoders' tokens: same numbers, every change misses, no kill leaves a broken entry."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import zoo
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import RowDataset
from crossmodal.training.recipes import Recipe
from crossmodal.training.tasks import VQATask
from crossmodal.training.token_cache import TokenCache, _Store, content_key, input_key
from crossmodal.training.train import train
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from test_modeling import EXACT, lively
from world import COLORS, QUESTIONS, TINY_RECIPE, color_rows, noise, tiny_processor_and_model

from crossmodal import CrossModalForVQA


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def noisy_pictures(count):
    return [Image.fromarray((noise(32, 32, 3, seed=i) * 50 + 128).clip(0, 255).astype(np.uint8)) for i in range(count)]


def noisy_rows(count, pictures=None):
    """Rows whose pictures all differ; their questions are two."""
    columns = {
        "image": pictures or noisy_pictures(count),
        "image_id": range(count),
        "answer": list(COLORS)[:2] * (count // 2),
    }
    rows = Dataset.from_dict({**columns, "question": QUESTIONS * (count // 2)}).cast_column("image", ImageFeature())
    return RowDataset(rows, "vqa")


@pytest.fixture
def frozen():
    processor, model = tiny_processor_and_model()
    model.freeze("vision", "text")
    return processor, lively(model)


def loss_of(model, processor, samples):
    collate = SampleCollator(processor, VQATask.from_config(model.config).encode_targets)
    return model(**collate(samples)), collate(samples)


def test_cached_tokens_give_the_same_losses_and_gradients(frozen, tmp_path):
    processor, model = frozen
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = noisy_rows(12)
    cached, computed = TokenCache(model, processor, tmp_path).fill(plain, progress=False)
    # Twelve pictures, and each question once however often it is asked.
    assert computed == 12 + 2
    results = []
    for dataset in (plain, cached):
        model.zero_grad()
        output, batch = loss_of(model, processor, [dataset[i] for i in range(8)])
        output.loss.backward()
        results.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert "vision_tokens" in batch and "pixel_values" not in batch and "input_ids" not in batch
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss, **CLOSE)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(
            gradient, results[1][1][name], rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_tokens_are_computed_once_and_found_by_another_process(frozen, tmp_path):
    processor, model = frozen
    rows = noisy_rows(6)
    first, computed = TokenCache(model, processor, tmp_path).fill(rows, progress=False)
    again, recomputed = TokenCache(copy.deepcopy(model), processor, tmp_path).fill(rows, progress=False)
    assert computed > 0 and recomputed == 0
    for name in ("vision", "text"):
        np.testing.assert_array_equal(first[3][f"{name}_tokens"], again[3][f"{name}_tokens"])


def test_whatever_changes_misses(frozen, tmp_path):
    processor, model = frozen
    rows = noisy_rows(6)
    computed = TokenCache(model, processor, tmp_path).fill(rows, progress=False)[1]

    def missing(model=model, processor=processor, rows=rows):
        return TokenCache(model, processor, tmp_path).fill(rows, progress=False)[1]

    other_weights = copy.deepcopy(model)
    with torch.no_grad():
        other_weights.crossmodal.encoders["vision"].get_parameter(
            next(n for n, _ in other_weights.crossmodal.encoders["vision"].named_parameters())
        ).view(-1)[0] += 1e-3
    assert missing(model=other_weights) == 6
    other_levels = copy.deepcopy(model)
    other_levels.config.modality_settings["vision"]["levels"] = [1, 1]
    assert missing(model=other_levels) == 6
    other_processor = copy.deepcopy(processor)
    other_processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert missing(processor=other_processor) == 6
    pictures = noisy_pictures(6)
    pictures[2].putpixel((0, 0), (1, 2, 3))
    spoilt = noisy_rows(6, pictures)
    assert missing(rows=spoilt) == 1
    # Nothing of it disturbed what was there.
    assert missing() == 0 and computed > 6


def test_every_variant_of_an_augmentation_is_cached(frozen, tmp_path):
    processor, model = frozen
    pictures = [picture.resize((96, 32)) for picture in noisy_pictures(2)]
    plain = noisy_rows(2, pictures)
    augmented = RowDataset(plain.rows, "vqa", augment="permute_boxes")
    cached, computed = TokenCache(model, processor, tmp_path).fill(augmented, progress=False)
    assert computed == 2 * 6 + 2
    # The first variant is the picture as it is: nothing is left to do for rows without augmentation.
    assert TokenCache(model, processor, tmp_path).fill(plain, progress=False)[1] == 0
    assert len({cached.unaugmented()[0]["vision_key"] for _ in range(50)}) == 1
    drawn = {cached[0]["vision_key"] for _ in range(200)}
    assert len(drawn) == 6
    expected = {}
    for variant in range(6):
        batch = processor(images=[augmented.input_of(0, "images", variant)])
        expected[variant] = model.crossmodal.encode_tokens("vision", batch["pixel_values"])[0][0].numpy()
    for _ in range(12):
        sample = cached[0]
        variant = int(sample["vision_key"].partition("-")[2] or 0)
        np.testing.assert_allclose(sample["vision_tokens"], expected[variant], rtol=1e-4, atol=1e-5)


def test_keys_tell_contents_apart():
    array = np.arange(6, dtype=np.float32)
    values = ["a", b"a", array, array.reshape(2, 3), array.astype(np.float64), {"array": array, "sampling_rate": 8000},
              {"array": array, "sampling_rate": 16000}, Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))]  # fmt: skip
    keys = [content_key(value) for value in values]
    assert len(set(keys)) == len(keys)
    assert content_key({"bytes": b"a", "path": "x.png"}) == content_key(b"a")
    assert content_key("a") == content_key("a")


def test_a_file_that_changed_has_another_key_and_words_are_no_path(tmp_path):
    file, other = tmp_path / "x.mp4", tmp_path / "y.mp4"
    file.write_bytes(b"one")
    other.write_bytes(b"one")
    key = input_key(str(file), "video")
    # By its content, whichever way it is given and wherever it lies.
    assert key == input_key(other, "video") == input_key({"bytes": None, "path": str(file)}, "video")
    assert key == content_key(b"one")
    frames = input_key([str(file), str(other)], "video")
    file.write_bytes(b"two")
    assert input_key(str(file), "video") != key and input_key([str(file), str(other)], "video") != frames
    assert input_key(str(file), "text") == content_key(str(file))
    assert input_key("http://a/x.mp4", "video") != input_key("http://a/y.mp4", "video")


def test_all_columns_that_an_input_is_made_of_are_in_its_key():
    signals = {"signal": [[[0.0, 1.0]]] * 3 + [None], "sampling_rate": [128, 256, 128, 128]}
    signals |= {"recording": [0] * 4, "state": ["a"] * 4, "window": [0] * 4, "subject": ["s"] * 4}
    scenes = {"points": [[0.0, 1.0, 2.0]] * 3, "colors": [[1, 2, 3], [3, 2, 1], [1, 2, 3]], "labels": [[0]] * 3}
    scenes |= {"area": ["a"] * 3, "room": ["r"] * 3}
    for columns, task, name in ((signals, "classification", "eeg"), (scenes, "point_segmentation", "points")):
        stored = list(RowDataset(Dataset.from_dict(columns), task).contents(name))
        first, other, same = (content_key(value) for value in stored[:3])
        assert first == same != other and stored[3:] == [None] * len(stored[3:])


def test_images_that_differ_in_their_palette_alone_have_keys_of_their_own():
    red, blue = (Image.new("RGB", (4, 4), color).quantize(2) for color in ("red", "blue"))
    assert red.mode == "P" and red.tobytes() == blue.tobytes()
    assert content_key(red) != content_key(blue) and content_key(red) == content_key(red.copy())
    assert content_key([red, red]) != content_key([red, blue])


def test_a_file_is_an_entry_only_when_it_is_whole(tmp_path):
    store = _Store(tmp_path)
    arrays = [np.random.rand(3, 4).astype(np.float32), np.random.rand(2, 4).astype(np.float32)]
    store.write(["a", "b"], arrays)
    for fresh in (store, _Store(tmp_path)):
        np.testing.assert_array_equal(fresh.read("b"), arrays[1])
    # Cut off: numbers without a listing, a listing whose numbers are short, a file that was being written.
    (tmp_path / "c.tokens").write_bytes(b"123")
    (tmp_path / "d.writing").write_bytes(b"123")
    listing = json.loads(next(tmp_path.glob("*.json")).read_text())
    (tmp_path / "e.json").write_text(json.dumps({**listing, "arrays": {"e": [0, [3, 4]]}}))
    (tmp_path / "e.tokens").write_bytes(b"123")
    assert set(_Store(tmp_path).places) == {"a", "b"}


def test_two_processes_fill_a_folder_at_once(tmp_path):
    arrays = {key: np.full((2, 3), number, np.float32) for number, key in enumerate("abc")}
    # Each has found the folder empty; they begin with the same key, and what they write is of one size.
    stores = [_Store(tmp_path), _Store(tmp_path)]
    for store, keys in zip(stores, ("abc", "acb"), strict=True):
        store.write(list(keys), [arrays[key] for key in keys])
    for store in (*stores, _Store(tmp_path)):
        for key, array in arrays.items():
            np.testing.assert_array_equal(store.read(key), array)
    # Files that are called by their first key.
    numbers = next(tmp_path.glob("*.tokens"))
    old = tmp_path / "old"
    old.mkdir()
    for suffix in (".tokens", ".json"):
        (old / f"a{suffix}").write_bytes(numbers.with_suffix(suffix).read_bytes())
    np.testing.assert_array_equal(_Store(old).read("b"), arrays["b"])


def test_a_kill_while_tokens_are_written_leaves_no_broken_entry(tmp_path):
    script = """
import sys, numpy as np
from crossmodal.training.token_cache import _Store
store, n = _Store(sys.argv[1]), 0
print("ready", flush=True)
while True:
    store.write([f"{n}-{i}" for i in range(20)], [np.full((50, 64), n * 20 + i, np.float32) for i in range(20)])
    n += 1
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not list(tmp_path.glob("*.json")):
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = _Store(tmp_path)
    assert len(store) >= 20 and len(store) % 20 == 0
    for key in store.places:
        n, i = map(int, key.split("-"))
        assert (store.read(key) == n * 20 + i).all()


def test_what_cannot_be_cached_is_refused(frozen, tmp_path):
    processor, model = frozen
    model.unfreeze("vision", "text")
    with pytest.raises(ValueError, match="no encoder of this model is frozen"):
        TokenCache(model, processor, tmp_path)
    tokens = model.crossmodal.encode_tokens("vision", torch.randn(2, 3, 32, 32))[0]
    with pytest.raises(ValueError, match="is not frozen: its encoder would learn nothing"):
        model.train()(vision_tokens=tokens)
    with pytest.raises(ValueError, match=r"vision_tokens has shape.*Expected \(batch, tokens"):
        model.eval()(vision_tokens=tokens[..., :-1])


@pytest.mark.parametrize("model_type", ["vit", "resnet", "bert", "crossmodal_features"])
def test_tokens_in_place_of_inputs_change_no_output(model_type):
    entry, kind, batch = zoo.tiny_encoder(model_type, batch_size=3)
    from crossmodal import CrossModalConfig

    model = lively(CrossModalForVQA(CrossModalConfig(modalities={kind: entry}, **zoo.TINY, num_labels=3))).eval()
    if model_type == "bert":
        batch["attention_mask"][1, -3:] = 0
    values, mask = model.config.input_keys(kind)
    inputs = {f"{kind}_{key}" if kind == "features" else key: value for key, value in batch.items()}
    tokens, real = model.crossmodal.encode_tokens(kind, inputs[values], inputs.get(mask) if mask else None)
    given = {f"{kind}_tokens": tokens} | ({} if real is None else {f"{kind}_tokens_mask": real})
    torch.testing.assert_close(model(**given).logits, model(**inputs).logits, **EXACT)
    shared = {**given, f"{kind}_tokens_index": torch.tensor([2, 0, 2, 1])}
    torch.testing.assert_close(model(**shared).logits, model(**inputs).logits[[2, 0, 2, 1]], rtol=1e-4, atol=1e-5)


def test_a_recipe_trains_from_the_cache_as_it_trains_without(tmp_path):
    results = []
    for cache in (None, str(tmp_path / "tokens"), str(tmp_path / "tokens")):
        values = copy.deepcopy(TINY_RECIPE) | {"dataset": "rows", "output_dir": str(tmp_path / "run"), "name": "tiny"}
        values["model"]["freeze"], values["token_cache"] = ["vision"], cache
        values["training"]["logging_steps"] = 1
        lines = []
        result = train(Recipe(**values), color_rows(24), color_rows(12), fresh=True, write=lines.append, export=False)
        results.append((result, lines))
    losses = [[entry["loss"] for entry in result["log"] if "loss" in entry] for result, _ in results]
    assert (
        losses[0]
        and losses[1] == pytest.approx(losses[0], rel=1e-3)
        and losses[2] == pytest.approx(losses[0], rel=1e-3)
    )
    assert any("training rows: 3 inputs computed" in line for line in results[1][1])
    assert any("tokens of vision, training rows: 0 inputs computed" in line for line in results[2][1])
    assert results[1][0]["metrics"]["accuracy"] == results[0][0]["metrics"]["accuracy"]
