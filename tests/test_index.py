"""The index: what it finds is what the model finds, it survives being cut off, and says what is wrong with it."""

import json
import sys

import pytest
import torch
from crossmodal.training.index import CrossModalIndex, nearest_by_product
from test_retrieval_evaluation import pair_rows, trained  # noqa: F401


@pytest.fixture(scope="module")
def world(trained):  # noqa: F811
    rows = pair_rows(6, texts=1)
    return (
        trained[1]["model"],
        trained[1]["processor"],
        [row["image"] for row in rows],
        [row["captions"][0] for row in rows],
    )


@pytest.fixture
def index(world, tmp_path):
    model, processor, images, texts = world
    index = CrossModalIndex(tmp_path / "index", model, processor)
    index.add("vision", images, [{"title": text} for text in texts], batch_size=4)
    index.add("text", texts, [{"text": text} for text in texts])
    return index


def test_search_finds_what_the_model_ranks_first_both_ways(index, world):
    model, processor, images, texts = world
    for image, text in zip(images, texts, strict=True):
        for query, others, shown in (
            ({"text": text}, {"images": images, "text": [text] * 6}, "title"),
            ({"images": image}, {"images": [image] * 6, "text": texts}, "text"),
        ):
            with torch.no_grad():
                expected = model.rank(model.features(dict(processor(**others)))[0])
            hits = index.search(**query, top_k=6)
            found = torch.tensor([hit["score"] for hit in hits])
            assert [hit[shown] for hit in hits] == [texts[i] for i in expected.argsort(descending=True)]
            # Tokens are kept in half precision.
            torch.testing.assert_close(found, expected.sort(descending=True).values, rtol=1e-2, atol=1e-2)


def test_several_queries_at_once_are_those_queries_one_by_one(index, world):
    texts = world[3]
    together = index.search(text=texts, top_k=3, rerank=2)
    for text, hits in zip(texts, together, strict=True):
        alone = index.search(text=text, top_k=3, rerank=2)
        assert [hit["title"] for hit in alone] == [hit["title"] for hit in hits]
        assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)
        assert [h["score"] for h in alone] == pytest.approx([h["score"] for h in hits], rel=1e-4)


def test_without_ranking_again_the_order_is_that_of_similarity(index, world):
    hits = index.search(text=world[3][0], top_k=6, rerank=0)
    assert [hit["score"] for hit in hits] == [hit["similarity"] for hit in hits]


def test_inputs_of_one_modality_are_compared_by_embedding(index, world):
    hits = index.search(images=world[2][2], target="vision", top_k=2)
    assert hits[0]["title"] == world[3][2] and hits[0]["similarity"] == pytest.approx(1.0, abs=1e-4)


def test_duplicates_are_left_out_and_more_than_there_is_may_be_asked_for(index, world):
    assert index.add("vision", world[2][:3] * 2) == 0
    assert index.sizes == {"vision": 6, "text": 6}
    assert len(index.search(text="red and blue", top_k=100, rerank=100)) == 6


def test_with_and_without_faiss_the_same_is_found(index, world, monkeypatch):
    pytest.importorskip("faiss")
    model, processor, _, texts = world
    found = []
    for use_faiss in (True, False):
        own = CrossModalIndex(index.folder, model, processor, use_faiss=use_faiss)
        found.append(own.search(text=texts[1], top_k=6, rerank=0))
        assert (own.stores["vision"]._faiss is not None) == use_faiss
    assert [hit["title"] for hit in found[0]] == [hit["title"] for hit in found[1]]
    assert [hit["score"] for hit in found[0]] == pytest.approx([hit["score"] for hit in found[1]], abs=1e-5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="FAISS is not installed"):
        CrossModalIndex(index.folder, model, processor, use_faiss=True)


def test_an_index_is_read_from_its_folder(index, world):
    again = CrossModalIndex(index.folder, world[0], world[1])
    assert again.sizes == index.sizes
    query = world[3][4]
    assert again.search(text=query, top_k=4) == index.search(text=query, top_k=4)


def test_a_build_that_was_cut_off_goes_on(index, world, tmp_path, monkeypatch):
    from crossmodal.training import index as module

    model, processor, images, texts = world
    monkeypatch.setattr(module, "_PART", 2)
    partial, calls = CrossModalIndex(tmp_path / "cut", model, processor), []
    whole = module.encode_batch

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(module, "encode_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        partial.add("vision", images, [{"title": text} for text in texts], batch_size=2)
    again = CrossModalIndex(tmp_path / "cut", model, processor)
    assert again.sizes == {"vision": 4}
    assert again.add("vision", images, [{"title": text} for text in texts], batch_size=2) == 2
    for text in texts:
        expected = index.search(text=text, top_k=6)
        assert [hit["title"] for hit in again.search(text=text, top_k=6)] == [hit["title"] for hit in expected]


def test_a_build_that_was_cut_off_in_its_first_part_goes_on_too(world, tmp_path, monkeypatch):
    from crossmodal.training import index as module

    model, processor, images, texts = world
    with monkeypatch.context() as patch:
        patch.setattr(module.np, "save", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            CrossModalIndex(tmp_path / "cut", model, processor).add("text", texts)
    (tmp_path / "cut" / "text").mkdir(exist_ok=True)
    (tmp_path / "cut" / "text" / "00000.tokens.npy").write_bytes(b"half")
    again = CrossModalIndex(tmp_path / "cut", model, processor)
    assert again.add("text", [*texts, None]) == 6 and again.sizes == {"text": 6}
    assert CrossModalIndex(tmp_path / "none", model, processor).add("text", []) == 0
    with pytest.raises(ValueError, match="is empty"):
        CrossModalIndex(tmp_path / "none", model, processor).search(text="a")


def test_an_index_belongs_to_its_model_wherever_that_lies(trained, world, tmp_path, monkeypatch):  # noqa: F811
    import shutil

    from crossmodal.training.console import load_model

    model, processor, images, texts = world
    folder = tmp_path / "index"
    built = CrossModalIndex(folder, model, processor, source=str(trained[0]))
    built.add("vision", images, [{"title": text} for text in texts])
    expected = built.search(text=texts[0], top_k=3)
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for source in (None, str(tmp_path / "copy"), "copy"):
        found = CrossModalIndex.load(folder, source).search(text=texts[0], top_k=3)
        assert [hit["title"] for hit in found] == [hit["title"] for hit in expected]
    built.save(tmp_path / "saved")
    assert CrossModalIndex.load(tmp_path / "saved").sizes == {"vision": 6}
    with pytest.raises(ValueError, match="is there already"):
        built.save(tmp_path / "saved")
    # An order by other weights is of the same features; smaller images are not.
    other, reader = load_model(str(trained[0]))
    other.config.rank_weight = 0.25
    assert CrossModalIndex(folder, other, reader).sizes == {"vision": 6}
    reader.image_processor.size = {"height": 8, "width": 8}
    with pytest.raises(ValueError, match="is of another model"):
        CrossModalIndex(folder, other, reader)


def test_many_queries_are_ranked_in_parts_and_untrained_parts_are_not_asked(index, world, monkeypatch):
    from crossmodal.training import index as module

    model, _, _, texts = world
    whole = index.search(text=texts, top_k=6)
    monkeypatch.setattr(module, "_PAIRS", 7)
    model.train()
    for hits, expected in zip(index.search(text=texts, top_k=6), whole, strict=True):
        assert [hit["title"] for hit in hits] == [hit["title"] for hit in expected]
        assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in expected], rel=1e-4, abs=1e-5)
    assert not model.training
    monkeypatch.setattr(model.config, "contrastive_weight", 0.0)
    every = index.search(text=texts[0], top_k=6, rerank=6)
    assert index.search(text=texts[0], top_k=1, rerank=1)[0] == every[0]
    monkeypatch.setattr(model.config, "contrastive_weight", 1.0)
    monkeypatch.setattr(model.config, "matching_weight", 0.0)
    assert all(hit["score"] == hit["similarity"] for hit in index.search(text=texts[0], top_k=6))


def test_what_is_wrong_with_an_index_or_a_query_is_said(index, world, tmp_path):
    model, processor, images, texts = world
    with pytest.raises(ValueError, match="Expected exactly one of"):
        index.search(audio="x")
    with pytest.raises(ValueError, match="Expected exactly one of"):
        index.search(text="a", images=images[0])
    empty = CrossModalIndex(tmp_path / "empty", model, processor)
    with pytest.raises(ValueError, match="is empty"):
        empty.search(text="a")
    empty.add("text", texts)
    with pytest.raises(ValueError, match="does not hold anything but 'text'.*It holds"):
        empty.search(text="a")
    with pytest.raises(ValueError, match="3 items for 6 inputs"):
        empty.add("text", texts, [{}] * 3)
    with pytest.raises(ValueError, match=r"items have \['key', 'score'\], which hits say by themselves"):
        empty.add("vision", images[:1], [{"score": 1, "key": "sku-0", "title": "a"}])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ValueError, match="is no index"):
        CrossModalIndex(tmp_path / "other", model, processor)
    tokens = next((index.folder / "vision").glob("*.tokens.npy"))
    tokens.write_bytes(tokens.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut off"):
        CrossModalIndex(index.folder, model, processor)
    tokens.unlink()
    with pytest.raises(ValueError, match="missing"):
        CrossModalIndex(index.folder, model, processor)


def test_an_index_of_another_model_is_refused(index, world):
    listing = index.folder / "index.json"
    listing.write_text(json.dumps(json.loads(listing.read_text()) | {"model": "another"}))
    with pytest.raises(ValueError, match="is of another model"):
        CrossModalIndex(index.folder, world[0], world[1])
    listing.write_text("{")
    with pytest.raises(ValueError, match="no listing of an index"):
        CrossModalIndex(index.folder, world[0], world[1])


def test_the_command_line_indexes_a_dataset_and_searches_it(trained, tmp_path, capsys):  # noqa: F811
    from PIL import Image
    from test_cli import run

    data, rows = tmp_path / "data", pair_rows(12)
    data.mkdir()
    rows.to_parquet(data / "train.parquet")
    rows[0]["image"].save(tmp_path / "query.png")
    where = ["--dataset", data]
    assert run("index", trained[0], *where, "--output", tmp_path / "shop", "--json") == 0
    # Pictures and captions repeat: each is there once.
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sizes"] == {"vision": 6, "text": 12}
    picture = tmp_path / "hits.png"
    command = ("search", tmp_path / "shop", "--top-k", 3, "--json")
    # The index knows its dataset.
    assert run(*command, "--text", "red and blue", "--output", picture) == 0
    hits = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(hits) == 3 and all("row" in hit and hit["texts"] for hit in hits)
    assert Image.open(picture).size[0] > 400
    assert run(*command, "--image", tmp_path / "query.png") == 0
    assert all(hit["text"] for hit in json.loads(capsys.readouterr().out.splitlines()[-1]))
    plain = CrossModalIndex(tmp_path / "plain", trained[1]["model"], trained[1]["processor"], source=str(trained[0]))
    plain.add("vision", [rows[0]["image"]], [{"title": "a picture"}])
    assert run("search", tmp_path / "plain", "--text", "a") == 0
    assert capsys.readouterr().out.endswith("a picture\n")
    small = tmp_path / "small"
    small.mkdir()
    rows.select([0]).to_parquet(small / "train.parquet")
    for arguments, said in (
        (("search", tmp_path / "shop"), "Give exactly one"),
        (("search", tmp_path / "nothing", "--text", "a"), "holds no index"),
        (("search", tmp_path / "plain", "--text", "a", "--output", picture), "Give it with --dataset"),
        ((*command, "--text", "a", "--dataset", small, "--output", picture), "hits are of rows that"),
    ):
        assert run(*arguments) == 2
        assert said in capsys.readouterr().err


def test_a_picture_whose_file_changed_is_another_one(world, tmp_path):
    model, processor, images, _ = world
    path = tmp_path / "picture.png"
    images[0].save(path)
    index = CrossModalIndex(tmp_path / "index", model, processor)
    assert index.add("vision", [str(path)]) == 1 and index.add("vision", [path.read_bytes()]) == 0
    images[1].save(path)
    assert index.add("vision", [str(path)]) == 1


@pytest.mark.parametrize("count", [0, 1, 3, 4, 300])
def test_the_nearest_of_few_queries_and_of_many_are_those_of_a_plain_product(count):
    generator = torch.Generator().manual_seed(0)
    queries, vectors = torch.randn(count, 16, generator=generator), torch.randn(500, 16, generator=generator)
    scores, rows = nearest_by_product(queries, vectors, 7)
    expected = (queries.double() @ vectors.double().T).topk(7, dim=1)
    assert rows.equal(expected.indices)
    torch.testing.assert_close(scores, expected.values.float(), rtol=1e-5, atol=1e-5)
