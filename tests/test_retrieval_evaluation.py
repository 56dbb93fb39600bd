"""Retrieval measured: ranks against loops, protocols, two stages, and a run from rows to a folder that a stranger loads."""

import copy
import json
import math
from itertools import combinations

import datasets
import pytest
import torch
from crossmodal.training import retrieval
from crossmodal.training.datasets import RowDataset
from crossmodal.training.evaluate import evaluate
from crossmodal.training.index import CrossModalIndex
from crossmodal.training.recipes import Recipe
from crossmodal.training.retrieval import (
    RightPairs,
    evaluate_two_stages,
    features_of,
    inputs_of,
    metrics_of,
    rank_pairs,
    ranks_of,
    score_directions,
    score_embeddings,
)
from crossmodal.training.statistics import standardised_shortcuts
from crossmodal.training.train import train
from hypothesis import given
from hypothesis import strategies as st
from world import COLORS, TINY_RECIPE, picture, run_as_stranger

from crossmodal import CrossModalForRetrieval, CrossModalProcessor


@given(st.integers(0, 10**6))
def test_ranks_and_precision_are_those_of_a_loop_with_ties_against_the_model(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (6, 9), generator=generator).float()
    positive = torch.rand(6, 9, generator=generator) < 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_WAYS", 3)
        places, precisions, matching = ranks_of(scores, positive)
    for row in range(6):
        # Worst order that the scores allow: of equal scores, negatives first.
        order = sorted(range(9), key=lambda j: (-scores[row, j].item(), bool(positive[row, j])))
        hits = [place for place, j in enumerate(order, 1) if positive[row, j]]
        assert places[row] == (hits[0] if hits else 0)
        if hits:
            expected = sum(n / place for n, place in enumerate(hits, 1)) / len(hits)
            assert abs(precisions[row].item() - expected) < 1e-6
            negatives = [j for j in range(9) if not positive[row, j]]
            rounds = [
                all(scores[row, own] > scores[row, other] for other in others)
                for own in range(9)
                if positive[row, own]
                for others in combinations(negatives, 2)
            ]
            if rounds:
                assert abs(matching[row].item() - sum(rounds) / len(rounds)) < 1e-6
            else:
                assert math.isnan(matching[row].item())
        else:
            assert math.isnan(precisions[row].item()) and math.isnan(matching[row].item())


def test_metrics_of_known_places():
    places, precisions = torch.tensor([1, 3, 0, 12, 6]), torch.tensor([1.0, 0.5, torch.nan, 0.1, 0.2])
    assert "10way" not in metrics_of(places, precisions, precisions.new_full((5,), torch.nan))
    found = metrics_of(places, precisions, torch.tensor([1.0, 0.6, torch.nan, 0.2, 0.2]))
    assert found == {
        "r1": 25.0,
        "r5": 50.0,
        "r10": 75.0,
        "medr": 4.5,
        "map": pytest.approx(45.0),
        "10way": pytest.approx(50.0),
    }
    with pytest.raises(ValueError, match="no query has a positive"):
        metrics_of(torch.tensor([0]), *torch.full((2, 1), torch.nan))


def captions(images=3, texts=2):
    """Targets of COCO's kind: several texts per image."""
    return [{"id": i, "keys": [("image", i), ("text", f"{i}-{k}")]} for i in range(images) for k in range(texts)]


def test_an_image_finds_any_of_its_texts_and_equal_texts_are_right_for_each_others_images():
    targets = captions()
    targets[5]["keys"][1] = ("text", "0-0")
    rows, right = inputs_of(targets)
    assert rows == [0, 2, 4]
    expected = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(right(torch.arange(3), torch.arange(6)), expected)
    assert right.own(torch.tensor([1])).tolist() == [2, 3]


def test_folds_are_averaged_and_each_has_its_own_candidates():
    scores = torch.eye(4).repeat_interleave(2, dim=1)
    scores[0, 2] = scores[0, 3] = 2.0  # image 0 prefers the texts of image 1, which are in its fold
    scores[2, 0] = 2.0  # image 2 prefers a text of another fold
    _, right = inputs_of(captions(4))

    def score(queries, candidates, swap):
        return scores[candidates][:, queries].T if swap else scores[queries][:, candidates]

    halves = [(torch.tensor([0, 1]), torch.arange(4)), (torch.tensor([2, 3]), torch.arange(4, 8))]
    whole = score_directions(score, right, (4, 8), ("i", "t"))
    folds = score_directions(score, right, (4, 8), ("i", "t"), halves)
    assert whole["i2t_r1"] == 50.0 and folds["i2t_r1"] == 75.0
    assert whole["t2i_r1"] == pytest.approx(100 * 5 / 8) and folds["t2i_r1"] == 75.0


def test_embeddings_are_scored_as_samples_give_them():
    one = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1).repeat_interleave(2, dim=0)
    found = score_embeddings(one, one.clone(), captions())
    assert found["mean_r1"] == 100.0 and found["122_medr"] == 1


HALVES = [(a, b) for a in COLORS for b in COLORS if a != b]


def pair_rows(count=24, texts=2):
    """Pictures of two colors with captions in the schema of COCO, learnable in a moment."""
    rows = []
    for i in range(count):
        left, right = HALVES[i % len(HALVES)]
        image = picture(left)
        image.paste(picture(right, (16, 32)), (16, 0))
        both = [f"{left} and {right}", f"left {left} right {right}"][:texts]
        rows.append({"image": image, "image_id": HALVES.index((left, right)), "captions": both})
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def recipe(folder, **changes):
    values = copy.deepcopy(TINY_RECIPE) | {"task": "retrieval", "dataset": "rows", "output_dir": str(folder)}
    values["model"]["config"] |= {"projection_dim": 16, "fusion_queries": ["text"], "num_fusion_layers": 1}
    values["training"] |= {"num_train_epochs": 12, "per_device_train_batch_size": 12}
    return Recipe(**values | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval") / "model"
    rows = pair_rows(36)
    return folder, train(recipe(folder), rows, rows.select(range(6)), write=lambda line: None)


def test_a_run_learns_to_find_and_its_folder_serves_strangers(trained):
    folder, result = trained
    assert result["metrics"]["contrastive_mean_r1"] > 80 and result["metrics"]["mean_r1"] > 80
    # 6 pictures with 2 captions each, and no two pictures alike.
    assert result["majority"]["mean_r1"] == pytest.approx(100 / 6)
    card = (folder / "README.md").read_text()
    assert "zero-shot-image-classification" in card and "two stages" in card and "by chance" in card
    code = """
from PIL import Image
from transformers import pipeline
import json
image = Image.new("RGB", (32, 32), (220, 40, 40))
image.paste(Image.new("RGB", (16, 32), (40, 60, 220)), (16, 0))
pipe = pipeline("zero-shot-image-classification", model=sys.argv[1], trust_remote_code=True)
labels = ["red and blue", "green and red", "blue and green"]
print(json.dumps(pipe(image, candidate_labels=labels, hypothesis_template="{}")[0]["label"]))
"""
    assert json.loads(run_as_stranger(code, folder, cwd=folder.parent)) == "red and blue"


def test_ranking_everything_again_is_the_score_of_all_pairs(trained):
    _, result = trained
    samples = RowDataset(pair_rows(6), "retrieval")
    found = evaluate_two_stages(result["model"], result["processor"], samples, rerank=100, full=True, progress=False)
    for key in ("i2t_r1", "t2i_r1", "i2t_map", "t2i_medr"):
        assert found[key] == pytest.approx(found[f"full_{key}"])
    alone = evaluate_two_stages(result["model"], result["processor"], samples, rerank=0, progress=False)
    assert {k: v for k, v in alone.items() if not k.startswith("contrastive_")} == {
        k.removeprefix("contrastive_"): v for k, v in found.items() if k.startswith("contrastive_")
    }
    as_a_user = evaluate(result["model"], result["processor"], pair_rows(6), None, progress=False)
    only = evaluate(result["model"], result["processor"], pair_rows(6), None, progress=False, rerank=0)
    assert "contrastive_mean_r1" in only and only["mean_r1"] == only["contrastive_mean_r1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result["model"].config, "contrastive_weight", 0.0)
        all_ranked = evaluate(result["model"], result["processor"], pair_rows(6), None, progress=False, full=True)
        assert all_ranked["mean_r1"] == all_ranked["full_mean_r1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result["model"].config, "matching_weight", 0.0)
        none_ranked = evaluate(result["model"], result["processor"], pair_rows(6), None, progress=False)
        assert none_ranked["mean_r1"] == none_ranked["contrastive_mean_r1"]
    with pytest.raises(ValueError, match="rank does not go with CrossModalForRetrieval.*rerank.*fold_size"):
        evaluate(result["model"], result["processor"], pair_rows(6), None, progress=False, rank=5)
    assert as_a_user.keys() == alone.keys()
    assert as_a_user["i2t_r1"] == pytest.approx(found["i2t_r1"])


def test_what_a_row_lacks_asks_nothing_and_is_no_candidate(trained):
    model, processor = trained[1]["model"], trained[1]["processor"]
    whole = pair_rows(6, texts=1)
    rows = [dict(row) for row in whole]
    rows[0]["image"], rows[3]["captions"] = None, [None]
    lacking = datasets.Dataset.from_list(rows, features=whole.features)
    found = evaluate(model, processor, lacking, None, progress=False, full=True)
    samples = RowDataset(lacking, "retrieval")
    first, _ = inputs_of(samples.targets)
    stores = {
        name: features_of(model, processor, samples, name, rows, progress=False)
        for name, rows in (("vision", first), ("text", None))
    }
    assert stores["vision"].absent.tolist() == [True] + [False] * 5
    assert stores["text"].absent.tolist() == [False] * 3 + [True] + [False] * 2
    # Four rows ask, and each is offered what the other five have.
    for prefix, score in (("contrastive_", "similarity"), ("full_", "rank")):
        for letters, asks, offered in (("i2t", "vision", [0, 1, 2, 4, 5]), ("t2i", "text", [1, 2, 3, 4, 5])):
            right = 0
            for row in (1, 2, 4, 5):
                other = "text" if asks == "vision" else "vision"
                places = {asks: torch.full((5,), row), other: torch.tensor(offered)}
                pairs = {name: stores[name].features(places[name], model) for name in ("vision", "text")}
                with torch.no_grad():
                    right += offered[int(getattr(model, score)(pairs).argmax())] == row
            assert found[f"{prefix}{letters}_r1"] == pytest.approx(100 * right / 4)
    assert found["t2i_r1"] == pytest.approx(found["full_t2i_r1"])
    for row in rows:
        row["image"] = None
    with pytest.raises(ValueError, match="no row has a 'vision'"):
        evaluate(model, processor, datasets.Dataset.from_list(rows, features=whole.features), None, progress=False)


def test_by_image_a_caption_is_right_for_its_own_image_alone(trained):
    model, processor = trained[1]["model"], trained[1]["processor"]
    rows = pair_rows(4, texts=1).map(lambda row: {"captions": ["the same"]})
    equal = evaluate(model, processor, rows, None, progress=False)
    assert equal["i2t_r1"] == equal["t2i_r1"] == 100
    own = evaluate(model, processor, rows, None, progress=False, by_image=True)
    # Ties are decided against the model.
    assert own["i2t_r1"] == 0 and own["t2i_r1"] == 25


def test_kept_features_give_the_scores_of_the_pairs_themselves(trained):
    model, processor = trained[1]["model"], trained[1]["processor"]
    samples = RowDataset(pair_rows(6), "retrieval")
    first, _ = inputs_of(samples.targets)
    stores = {"vision": features_of(model, processor, samples, "vision", first, progress=False)}
    stores["text"] = features_of(model, processor, samples, "text", batch_size=5, progress=False)
    assert len(stores["vision"]) == 6 and len(stores["text"]) == 12
    rows = {"vision": torch.tensor([0, 5, 2]), "text": torch.tensor([3, 10, 4])}
    found = rank_pairs(model, stores, rows)
    for vision, text, score in zip(rows["vision"], rows["text"], found, strict=True):
        sample = samples[first[int(vision)]] | {"text": samples[int(text)]["text"]}
        batch = processor(images=[sample["images"]], text=[sample["text"]])
        with torch.no_grad():
            expected = model.rank(model.features(dict(batch))[0])
        torch.testing.assert_close(score, expected[0], rtol=1e-4, atol=1e-5)


def test_every_schema_of_pairs_gives_a_sample_per_text():
    image = [picture()] * 2
    sentences = [
        [{"raw": "a dog", "tokens": ["a", "dog"]}, {"raw": "dogs", "tokens": ["dogs"]}],
        [{"raw": "x", "tokens": ["x"]}],
    ]
    schemas = [
        {"image": image, "id": ["7", "8"], "title": ["a", "b"]},
        {"image": image, "cocoid": [1, 2], "sentences": sentences},
        {"image": image, "img_id": ["1", "2"], "caption": [["a dog", "dogs"], ["x"]]},
        {"image": image, "image_id": ["1", "2"], "captions": [["a dog", "dogs"], ["x"]]},
        {"image": image, "name": ["tiger", "moon"], "keywords": [["animal", "cat"], ["sky"]]},
    ]
    lengths = []
    for columns in schemas:
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        samples = RowDataset(rows, "retrieval")
        texts = [samples[i]["text"] for i in range(len(samples))]
        assert all(isinstance(text, str) for text in texts)
        assert texts == list(samples.raw_column("text"))
        assert [dict(t["keys"])["text"] for t in samples.targets] == texts
        # Also where no column names images, texts of one of them are right, and those of another are not.
        first, right = inputs_of(samples.targets)
        assert len(first) == 2
        known = torch.tensor([samples.places[i][0] for i in range(len(samples))])
        assert torch.equal(right(torch.arange(2), torch.arange(len(samples))), torch.arange(2)[:, None] == known)
        lengths.append(len(samples))
    assert lengths == [2, 3, 3, 3, 3]


def test_right_pairs_share_a_key():
    right = RightPairs([{1}, {2}], [{2}, {1, 2}, {3}])
    assert right(torch.tensor([0, 1]), torch.tensor([0, 1, 2])).tolist() == [[False, True, False], [True, True, False]]


def test_the_shipped_pipeline_ranks_candidates_as_the_model_does(trained):
    folder, result = trained
    model, processor = result["model"], result["processor"]
    code = """
from PIL import Image
from transformers import pipeline
import json
image = Image.open(sys.argv[2])
pipe = pipeline(model=sys.argv[1], trust_remote_code=True)
texts = ["red and blue", "green and red", "left blue right green"]
hits = pipe(image=[image, image], candidates=texts, batch_size=2)
back = pipe(text="red and blue", candidates=[image, image.transpose(0)], top_k=1)
try:
    pipe(image=image, text="both", candidates=texts)
except ValueError as error:
    said = [str(error)]
for one in ("red", image):
    try:
        pipe(text="red and blue", candidates=one) if one is image else pipe(image=image, candidates=one)
    except ValueError as error:
        said.append(str(error))
again = pipe(image=image, candidates=iter(texts))
assert [hit["candidate"] for hit in again] == [hit["candidate"] for hit in hits[0]]
print(json.dumps([hits, len(back), sorted(back[0]), said]))
"""
    image = pair_rows(1)[0]["image"]
    image.save(folder.parent / "query.png")
    hits, count, keys, said = json.loads(
        run_as_stranger(code, folder, folder.parent / "query.png", cwd=folder.parent).splitlines()[-1]
    )
    texts = ["red and blue", "green and red", "left blue right green"]
    with torch.no_grad():
        features, _ = model.features(dict(processor(images=[image] * 3, text=texts)))
        expected, similarity = model.rank(features), model.similarity(features)
    order = expected.argsort(descending=True).tolist()
    for found in hits:
        assert [hit["index"] for hit in found] == order and [hit["candidate"] for hit in found] == [
            texts[i] for i in order
        ]
        assert [hit["score"] for hit in found] == pytest.approx(expected[order].tolist(), rel=1e-3, abs=1e-3)
        assert [hit["similarity"] for hit in found] == pytest.approx(similarity[order].tolist(), abs=1e-4)
    assert count == 1 and keys == ["candidate", "index", "score", "similarity"]
    assert (
        "exactly one of" in said[0]
        and "one str. Expected a list" in said[1]
        and "ImageFile. Expected a list" in said[2]
    )


def test_a_run_standardises_what_embeddings_see_of_frozen_encoders(tmp_path):
    run = recipe(tmp_path / "m")
    run.model["freeze"], run.training["num_train_epochs"] = ["vision"], 1
    rows = pair_rows(12)
    model = train(run, rows, rows.select(range(6)), write=lambda line: None, export=False)["model"]
    shortcuts = standardised_shortcuts(model)
    assert list(shortcuts) == ["vision"] and any(norm.shift.abs().sum() > 0 for norm in shortcuts["vision"].norms)


@pytest.mark.parametrize("freeze", [[], ["vision"]], ids=["raw", "cached"])
def test_a_run_fills_the_query_bank_with_embeddings_of_training_rows_as_they_are(tmp_path, freeze):
    run = recipe(tmp_path / "m", augment="mirror", token_cache=str(tmp_path / "tokens") if freeze else False)
    run.model["freeze"], run.training["num_train_epochs"] = freeze, 1
    run.model["config"] |= {"query_bank_size": 30, "query_bank_weight": 0.7}
    rows = pair_rows(12, texts=1)
    result = train(run, rows, rows.select(range(6)), write=lambda line: None)
    model, processor = (kind.from_pretrained(tmp_path / "m") for kind in (CrossModalForRetrieval, CrossModalProcessor))
    samples = RowDataset(rows, "retrieval")
    for name, other in (("vision", "text"), ("text", "vision")):
        own = features_of(model, processor, samples, name, progress=False).embeddings
        bank = getattr(model.query_bank, f"{name}_embeddings")
        # All 12 rows, and nothing else, in its 30 places.
        same = bank @ own.T > 1 - 1e-5
        assert len(bank) == 30 and same.any(dim=0).all() and same.any(dim=1).all()
        with torch.no_grad():
            near = model.query_bank.nearness(own, other, model.logit_scale())
        assert near.shape == (12,) and near.std() > 0
    metrics = result["metrics"]
    assert {"corrected_mean_r1", "contrastive_mean_r1", "mean_r1"} <= metrics.keys()
    again = evaluate_two_stages(model, processor, RowDataset(rows.select(range(6)), "retrieval"), progress=False)
    assert again["corrected_mean_r1"] == metrics["corrected_mean_r1"] and again["mean_r1"] == metrics["mean_r1"]
    model.config.query_bank_weight = 0.0
    without = evaluate_two_stages(model, processor, RowDataset(rows.select(range(6)), "retrieval"), progress=False)
    assert without["corrected_mean_r1"] == without["contrastive_mean_r1"] == again["contrastive_mean_r1"]


def test_rows_that_cannot_be_read_and_modalities_that_none_has_are_not_in_the_query_bank(tmp_path):
    run = recipe(tmp_path / "m", max_broken_samples=3)
    run.training["num_train_epochs"] = 1
    run.model["config"] |= {"query_bank_size": 30}
    run.model["encoders"]["eeg"] = {"model": {"model_type": "crossmodal_features", "input_size": 4, "hidden_size": 16}}
    rows, whole = pair_rows(12, texts=1), pair_rows(12, texts=1)
    images = list(rows.cast_column("image", datasets.Image(decode=False))["image"])
    images[4] = {"bytes": b"nothing", "path": None}
    rows = rows.remove_columns("image").add_column("image", images).cast_column("image", datasets.Image())
    train(run, rows, whole.select(range(6)), write=lambda line: None)
    model, processor = (kind.from_pretrained(tmp_path / "m") for kind in (CrossModalForRetrieval, CrossModalProcessor))
    own = features_of(model, processor, RowDataset(whole, "retrieval"), "vision", progress=False).embeddings
    kept = [row for row in range(12) if row != 4]
    bank = model.query_bank.vision_embeddings
    assert (bank @ own[kept].T > 1 - 1e-5).any(dim=1).all() and bank.any(dim=1).all()
    assert not model.query_bank.eeg_embeddings.any()


def test_an_adapter_holds_the_query_bank_that_its_merged_model_has(tmp_path):
    run = recipe(tmp_path / "m", lora={"preset": "text", "r": 2})
    run.training["num_train_epochs"] = 1
    run.model["config"] |= {"query_bank_size": 10}
    rows = pair_rows(12, texts=1)
    train(run, rows, rows.select(range(6)), write=lambda line: None)
    whole, adapter = (CrossModalForRetrieval.from_pretrained(tmp_path / part) for part in ("m", "m/adapter"))
    processor = CrossModalProcessor.from_pretrained(tmp_path / "m")
    assert whole.query_bank.text_embeddings.any(dim=1).all()
    with torch.no_grad():
        batch = dict(processor(images=rows["image"][:3], text=["red and blue", "green and red", "left blue"]))
        expected, found = (model.eval().rank(model.eval().features(batch)[0]) for model in (whole, adapter))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_where_embeddings_alone_were_trained_the_two_stages_are_those_of_the_query_bank(tmp_path):
    run = recipe(tmp_path / "m")
    run.training["num_train_epochs"] = 1
    run.model["config"] |= {"query_bank_size": 12, "query_bank_weight": 1.0, "matching_weight": 0.0}
    rows = pair_rows(12, texts=1)
    result = train(run, rows, rows.select(range(6)), write=lambda line: None)
    model, processor, metrics = result["model"].eval(), result["processor"], result["metrics"]
    assert metrics["mean_r1"] == metrics["corrected_mean_r1"] and metrics["i2t_map"] == metrics["corrected_i2t_map"]
    index = CrossModalIndex(tmp_path / "index", model, processor)
    images = rows["image"][:6]
    index.add("vision", images, [{"place": place} for place in range(6)])
    hits = index.search(text="red and blue", top_k=6)
    with torch.no_grad():
        batch = dict(processor(images=images, text=["red and blue"] * 6))
        expected = model.rank(model.features(batch)[0])
    assert [hit["place"] for hit in hits] == expected.argsort(descending=True).tolist()
    # The bank is of the order alone: what was indexed stays right.
    model.query_bank.fill({name: torch.zeros(1, 16) for name in ("vision", "text")})
    plain = CrossModalIndex(tmp_path / "index", model, processor).search(text="red and blue", top_k=6)
    with torch.no_grad():
        assert [hit["place"] for hit in plain] == model.similarity(model.features(batch)[0]).argsort(
            descending=True
        ).tolist()
