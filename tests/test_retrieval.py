"""`CrossModalForRetrieval`: embeddings and ranking of one model, their losses, and any pattern of absence."""

import math

import pytest
import torch
import zoo
from test_modeling import CLOSE, lively
from torch import nn

from crossmodal import CrossModalForRetrieval


NAMES = ("vision", "text")
ALL_LOSSES = {"contrastive_weight": 1.0, "matching_weight": 0.7, "alignment_weight": 0.5, "cross_weight": 0.1}


def model_of(*names, seed=0, **overrides):
    torch.manual_seed(seed)
    config = zoo.tiny_config(*(names or NAMES), projection_dim=8, **overrides)
    return lively(CrossModalForRetrieval(config)).eval()


def test_embeddings_are_of_length_one_and_depend_on_their_own_modality_alone():
    model = model_of()
    batch = zoo.tiny_batch(model.config)
    output = model(**batch)
    for embeddings in (output.image_embeds, output.text_embeds):
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(model.get_image_features(batch["pixel_values"]), output.image_embeds, **CLOSE)
    torch.testing.assert_close(
        model.get_text_features(batch["input_ids"], batch["attention_mask"]), output.text_embeds, **CLOSE
    )
    scale = model.logit_scale.scale.exp()
    torch.testing.assert_close(output.logits_per_image, scale * output.image_embeds @ output.text_embeds.T, **CLOSE)


def test_embeddings_are_of_the_tokens_and_of_what_the_encoder_says_pooled():
    model = model_of()
    batch = zoo.tiny_batch(model.config)
    tower, encoded = model.towers["text"], model.crossmodal.encode(model.crossmodal._collect_inputs(batch))[0]["text"]
    tokens = tower.final_norm(tower.norm(sum(model.crossmodal.project({"text": encoded})[0]["text"])))
    expected = tower.projection(tower.pooling(tokens, encoded.mask))
    for row in range(4):
        real = encoded.mask[row]
        pooled = [values for x in encoded.levels for values in (x[row, real].mean(0), x[row, real].amax(0))]
        pooled = torch.cat([norm(vector) for norm, vector in zip(tower.shortcut.norms, pooled, strict=True)])
        expected[row] += tower.shortcut.out_proj(torch.nn.functional.gelu(tower.shortcut.in_proj(pooled)))
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(model(**batch).text_embeds, expected, **CLOSE)
    assert model_of(pooled_shortcut=False).towers["text"].shortcut is None


def test_one_image_and_many_texts_are_compared_without_a_loss():
    model = model_of()
    batch = zoo.tiny_batch(model.config)
    output = model(pixel_values=batch["pixel_values"][:1], input_ids=batch["input_ids"])
    assert output.logits_per_image.shape == (1, 4) and output.loss is None
    alone = model(pixel_values=batch["pixel_values"][:1], input_ids=batch["input_ids"][:1])
    torch.testing.assert_close(output.logits_per_image[:, :1], alone.logits_per_image, **CLOSE)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("fusion_type", ["cross", "joint", "bottleneck", "concat"])
@pytest.mark.parametrize("queries", [None, ["text"]], ids=["all_look", "text_looks"])
def test_ranking_pairs_from_features_equals_the_pairs_themselves(fusion_type, queries, layers):
    model = model_of(fusion_type=fusion_type, fusion_queries=queries, num_unimodal_layers=layers)
    batch = zoo.tiny_batch(model.config)
    features, _ = model.features(batch)
    images, texts = torch.tensor([0, 0, 1, 3, 2]), torch.tensor([0, 1, 1, 0, 3])
    pairs = {"vision": features["vision"].at(images), "text": features["text"].at(texts)}
    together = {"pixel_values": batch["pixel_values"][images], "input_ids": batch["input_ids"][texts]}
    together["attention_mask"] = batch["attention_mask"][texts]
    expected = model(**together, return_match=True)
    torch.testing.assert_close(model.match(pairs)[0], expected.match_logits, **CLOSE)
    similarity = (expected.image_embeds * expected.text_embeds).sum(-1)
    expected = expected.match_logits + model.logit_scale.scale.exp() * similarity
    torch.testing.assert_close(model.rank(pairs), expected, **CLOSE)
    model.config.rank_weight = 0.5
    torch.testing.assert_close(model.rank(pairs), expected - 0.5 * model.match(pairs)[0], **CLOSE)


@pytest.mark.parametrize("fusion_type, matching", [("cross", "ranking"), ("cross", "cosine"), ("joint", "classifier")])
def test_pairs_in_groups_of_like_length_score_as_all_at_once(monkeypatch, fusion_type, matching):
    overrides = {"missing_tokens": True} if matching == "ranking" else {"fusion_queries": ["text"]}
    model = model_of(fusion_type=fusion_type, matching=matching, **overrides)
    batch = zoo.tiny_batch(model.config, batch_size=8)
    length = 24
    batch["input_ids"] = torch.randint(5, 20, (8, length))
    batch["attention_mask"] = (torch.arange(length) < torch.tensor([3, 4, 5, 4, 3, 6, 24, 5])[:, None]).long()
    torch.manual_seed(1)
    images, texts = torch.randint(8, (2, 300))
    # Texts that are not there: the image alone is scored.
    there = torch.stack([torch.ones(300), torch.rand(300) < 0.9], dim=1).bool()

    def found():
        features, _ = model.features(batch)
        pairs = {"vision": features["vision"].at(images), "text": features["text"].at(texts, there[:, 1])}
        logits, weights, _ = model.match(pairs, there)
        model.zero_grad()
        (logits * torch.linspace(-1, 1, 300)).sum().backward()
        return logits, weights, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    apart, whole = zoo.with_and_without_groups(monkeypatch, found)
    torch.testing.assert_close(apart[:2], whole[:2], **CLOSE)
    # Sums over 300 pairs, in another order.
    torch.testing.assert_close(apart[2], whole[2], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("contrastive_loss", ["info_nce", "sigmoid", "triplet"])
@pytest.mark.parametrize("matching", ["classifier", "cosine", "ranking"])
@pytest.mark.parametrize("loss_weighting, alignment", [("fixed", "late_interaction"), ("learned", "recovery")])
def test_every_loss_is_there_and_reaches_every_parameter(contrastive_loss, matching, loss_weighting, alignment):
    options = {"contrastive_loss": contrastive_loss, "matching": matching, "loss_weighting": loss_weighting}
    options["alignment"] = alignment
    model = model_of(**ALL_LOSSES, **options, triplet_margin=5.0, num_unimodal_layers=1)
    output = model(**zoo.tiny_batch(model.config))
    assert {"contrastive", "matching", "alignment", "cross"} <= output.losses.keys()
    expected = sum(getattr(model.config, f"{n}_weight") * output.losses[n] for n in model.loss_names)
    if loss_weighting == "fixed":
        torch.testing.assert_close(output.loss.detach(), expected, **CLOSE)
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    unused = ("modality_types", "weighting", "classifier", "outputs") if matching == "cosine" else ()
    if contrastive_loss == "triplet":
        unused += ("logit_scale",)
    assert not [name for name in without if not any(part in name for part in unused)], without


@pytest.mark.parametrize("contrastive_loss", ["info_nce", "sigmoid", "triplet"])
def test_contrast_is_the_mean_over_what_is_there_whoever_is_absent(contrastive_loss):
    torch.manual_seed(0)
    model = model_of("vision", "text", "eeg", contrastive_loss=contrastive_loss, matching_weight=0.0)
    batch = zoo.tiny_batch(model.config, batch_size=6)
    two = {key: values for key, values in batch.items() if "eeg" not in key}
    features, _ = model.features(two)
    image, text = (features[name].embeddings for name in ("vision", "text"))

    def expected(image, text):
        scale, own = model.logit_scale(), torch.arange(len(image))[:, None]
        scores, bias = image @ text.T, getattr(model.logit_scale, "bias", None)
        if contrastive_loss == "info_nce":
            losses = [-(scale * matrix).log_softmax(1).diagonal().mean() for matrix in (scores, scores.T)]
        elif contrastive_loss == "sigmoid":
            signs = 2.0 * torch.eye(len(own)) - 1
            losses = [-torch.nn.functional.logsigmoid(signs * (scale * scores + bias)).sum(1).mean()]
        else:
            worst = scores - 9.0 * torch.eye(len(own))
            losses = [(0.2 - scores.diagonal() + worst.amax(axis)).clamp(min=0).mean() for axis in (1, 0)]
        return torch.stack(losses).mean()

    torch.testing.assert_close(model(**two).losses["contrastive"], expected(image, text), **CLOSE)
    if contrastive_loss == "triplet":
        # Rows without an image and without a text ask nothing, and are offered still.
        mask = torch.ones(6, 3, dtype=torch.bool)
        mask[:, 2], mask[1, 0], mask[4, 1] = False, False, False
        scores = image @ text.T
        losses = []
        for matrix, asks, offers in (
            (scores, [0, 2, 3, 5], [0, 1, 2, 3, 5]),
            (scores.T, [0, 2, 3, 5], [0, 2, 3, 4, 5]),
        ):
            for row in asks:
                worst = max(matrix[row, column].item() for column in offers if column != row)
                losses.append(max(0.0, 0.2 - matrix[row, row].item() + worst))
        found = model(**two, modality_mask=mask).losses["contrastive"]
        torch.testing.assert_close(found, torch.tensor(losses).mean(), **CLOSE)


def test_ranking_is_learnt_beside_the_embeddings_and_alone():
    # Two rows: the only negative of each is the other, whatever is drawn.
    model = model_of(matching="ranking", contrastive_weight=0.5, matching_negatives=3)
    batch = {key: values[:2] for key, values in zoo.tiny_batch(model.config).items()}
    features, _ = model.features(batch)
    scores, ranks = torch.zeros(2, 2), torch.zeros(2, 2)
    for image in range(2):
        for text in range(2):
            pair = {
                "vision": features["vision"].at(torch.tensor([image])),
                "text": features["text"].at(torch.tensor([text])),
            }
            scores[image, text], ranks[image, text] = model.match(pair)[0].item(), model.rank(pair).item()
    losses = [-table.log_softmax(axis).diagonal().mean() for table in (scores, ranks) for axis in (0, 1)]
    torch.testing.assert_close(model(**batch).losses["matching"], torch.stack(losses).mean(), **CLOSE)


def test_rows_that_share_an_image_or_a_text_are_no_negatives_of_each_other():
    model = model_of(matching_weight=0.0)
    batch = zoo.tiny_batch(model.config)
    output = model(**batch, labels=torch.tensor([[0, 0], [0, 1], [2, 2], [3, 0]]))
    logits = output.logits_per_image.double()
    positive = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]).double()
    one, other = (
        -((matrix.log_softmax(1) * positive).sum(1) / positive.sum(1)).mean() for matrix in (logits, logits.T)
    )
    torch.testing.assert_close(output.loss.double(), (one + other) / 2, rtol=1e-4, atol=1e-4)


def test_matching_tells_rows_from_the_same_rows_with_another_image_or_text(monkeypatch):
    from crossmodal.modeling import retrieval_crossmodal as module

    model = model_of(contrastive_weight=0.0)
    batch = zoo.tiny_batch(model.config)
    wanted = iter([torch.tensor([1, 0, 3, 2]), torch.tensor([2, 3, 0, 1])])
    monkeypatch.setattr(
        module,
        "draw_negatives",
        lambda scores, positive, count: (next(wanted)[:, None], torch.ones(4, count, dtype=torch.bool)),
    )
    output = model(**batch)
    own, images, texts = torch.arange(4), torch.tensor([1, 0, 3, 2]), torch.tensor([2, 3, 0, 1])
    pairs = {
        "pixel_values": batch["pixel_values"][torch.cat([own, images, own])],
        "input_ids": batch["input_ids"][torch.cat([own, own, texts])],
        "attention_mask": batch["attention_mask"][torch.cat([own, own, texts])],
    }
    logits = model(**pairs, return_match=True, return_loss=False).match_logits
    truth = torch.cat([torch.ones(4), torch.zeros(8)])
    torch.testing.assert_close(
        output.loss, torch.nn.functional.binary_cross_entropy_with_logits(logits, truth), **CLOSE
    )


@pytest.mark.parametrize("matching", ["classifier", "cosine"])
@pytest.mark.parametrize("names", [NAMES, ("photo", "text", "eeg")], ids=["two", "three"])
def test_what_a_row_lacks_changes_no_loss_and_no_gradient(names, matching):
    model = model_of(*names, **ALL_LOSSES, matching=matching)
    batch = zoo.tiny_batch(model.config)
    presence = torch.ones(4, len(names), dtype=torch.bool)
    presence[1, 0] = presence[2, 1] = False
    results = []
    for noise in (0, 7):
        torch.manual_seed(3)
        for column, name in enumerate(names):
            values, _ = model.config.input_keys(name)
            batch[values] = batch[values].clone()
            lacking = batch[values][~presence[:, column]]
            batch[values][~presence[:, column]] = (lacking + noise) % 50 if "ids" in values else lacking + noise
        model.zero_grad()
        torch.manual_seed(3)
        output = model(**batch, modality_mask=presence)
        output.loss.backward()
        results.append([output.loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
        assert output.loss.isfinite()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_batch_without_any_pair_has_a_loss_of_nothing():
    model = model_of(**ALL_LOSSES)
    presence = torch.tensor([[True, False], [False, True], [True, False], [False, True]])
    output = model(**zoo.tiny_batch(model.config), modality_mask=presence, labels=torch.arange(4))
    assert output.losses["matching"] == 0 and output.losses["alignment"] == 0
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("detached, trained", [("detach_global", "fusion"), ("detach_local", "towers")])
def test_a_branch_that_is_detached_trains_nothing_that_both_stand_on(detached, trained):
    other = {"detach_global": "contrastive_weight", "detach_local": "matching_weight"}[detached]
    silent = {"contrastive_weight": "matching_weight", "matching_weight": "contrastive_weight"}[other]
    model = model_of(**{other: 1.0, silent: 0.0, detached: True})
    model(**zoo.tiny_batch(model.config)).loss.backward()
    shared = [p for n, p in model.named_parameters() if "encoders" in n or "projections" in n]
    assert all(p.grad is None or not p.grad.any() for p in shared)
    own = {"detach_global": model.towers, "detach_local": model.crossmodal.fusion}[detached]
    assert any(p.grad is not None and p.grad.any() for p in own.parameters())


def test_images_that_rows_share_are_encoded_once_and_give_the_same_loss():
    model = model_of(**ALL_LOSSES)
    batch = zoo.tiny_batch(model.config)
    index, labels = torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 1, 1])
    losses = []
    for inputs in (
        {**batch, "pixel_values": batch["pixel_values"][:2], "pixel_values_index": index},
        {**batch, "pixel_values": batch["pixel_values"][index]},
    ):
        torch.manual_seed(0)
        losses.append(model(**inputs, labels=labels).loss)
    torch.testing.assert_close(*losses, **CLOSE)


def test_a_few_pairs_are_learnt_by_heart_by_contrast_and_by_cross_attention():
    torch.manual_seed(0)
    config = zoo.tiny_config(*NAMES, projection_dim=16, hidden_dropout=0.0, classifier_dropout=0.0)
    model = CrossModalForRetrieval(config)
    batch = zoo.tiny_batch(config, batch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    features, _ = model.features(batch)
    images, texts = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    pairs = {"vision": features["vision"].at(images.flatten()), "text": features["text"].at(texts.flatten())}
    with torch.no_grad():
        for scores in (model.similarity(pairs), model.match(pairs)[0]):
            assert (scores.view(8, 8).argmax(1) == torch.arange(8)).float().mean() >= 0.9


def test_wrong_inputs_are_clear_errors():
    model = model_of()
    batch = zoo.tiny_batch(model.config)
    with pytest.raises(ValueError, match="has one. Give two"):
        CrossModalForRetrieval(zoo.tiny_config("vision"))
    with pytest.raises(ValueError, match="labels of shape"):
        model(**batch, labels=torch.arange(3))
    with pytest.raises(ValueError, match="as many rows"):
        model(pixel_values=batch["pixel_values"][:1], input_ids=batch["input_ids"], return_match=True)
    with pytest.raises(ValueError, match="different batch sizes"):
        model(
            pixel_values=batch["pixel_values"][:1],
            input_ids=batch["input_ids"],
            modality_mask=torch.ones(4, 2, dtype=torch.bool),
        )
    with pytest.raises(ValueError, match="no input of modality 'vision'"):
        model.get_modality_features("vision", input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="contrastive_loss='infonce'.*'info_nce'"):
        zoo.tiny_config(contrastive_loss="infonce")


def test_what_is_near_to_everything_is_taken_from_scores_by_the_query_bank():
    model = model_of(query_bank_size=6, query_bank_weight=0.3, matching="ranking")
    plain = model_of(matching="ranking")
    with torch.no_grad():
        model.query_bank.fill({name: torch.zeros(1, 8) for name in NAMES})
    plain.load_state_dict(model.state_dict(), strict=False)
    features, _ = model.features(zoo.tiny_batch(model.config))
    pairs = {
        "vision": features["vision"].at(torch.tensor([0, 0, 2])),
        "text": features["text"].at(torch.tensor([1, 3, 2])),
    }
    # An empty bank changes nothing.
    torch.testing.assert_close(model.rank(pairs), plain.rank(pairs), **CLOSE)
    bank = {name: nn.functional.normalize(torch.randn(4, 8), dim=-1) for name in NAMES}
    model.query_bank.fill(bank)
    scale = model.logit_scale.scale.exp()
    expected = plain.rank(pairs)
    for name, other in (NAMES, NAMES[::-1]):
        own = pairs[name].spread(pairs[name].embeddings)
        # Four rows fill six places: the first two count twice.
        alike = torch.cat([own @ bank[other].T, own @ bank[other][:2].T], dim=1)
        expected = expected - 0.3 * (scale * alike).exp().mean(dim=1).log()
    torch.testing.assert_close(model.rank(pairs), expected, **CLOSE)
    with pytest.raises(ValueError, match="query_bank_size=6 corrects log odds"):
        model_of(query_bank_size=6, matching="cosine")
    for key in ("query_bank_size", "query_bank_weight", "matching_hardness"):
        with pytest.raises(ValueError, match=f"{key}=-1. Expected 0 or more"):
            model_of(**{key: -1})


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_negatives_are_drawn_by_chance_or_by_how_alike_they_are(hardness):
    model = model_of(matching="ranking", matching_negatives=1, matching_hardness=hardness)
    torch.manual_seed(0)
    alike = torch.tensor([0.0, 4.0, 0.0, 0.0]).expand(2000, -1)
    positive = torch.tensor([True, False, False, False]).expand(2000, -1)
    drawn, found = model._negatives(alike, positive, torch.ones(4, dtype=torch.bool))
    assert found.all()
    share = (drawn == 1).float().mean().item()
    assert share == pytest.approx(1 / 3 if hardness == 0 else math.exp(4) / (math.exp(4) + 2), abs=0.04)


def test_rows_that_lack_a_modality_take_no_negatives_from_the_others():
    model = model_of(matching="ranking", matching_negatives=1)
    torch.manual_seed(0)
    # Those that lack it have embeddings of 0, which lie nearer than any negative that there is.
    alike = torch.tensor([-20.0, -15.0, -25.0, 0.0, 0.0]).expand(500, -1)
    positive = torch.tensor([True, False, False, False, False]).expand(500, -1)
    drawn, found = model._negatives(alike, positive, torch.tensor([True, True, True, False, False]))
    assert found.all() and (drawn == 1).float().mean() > 0.98
    for hardness in (0.0, 1.0):
        model.config.matching_hardness = hardness
        drawn, found = model._negatives(alike, positive, torch.tensor([True, True, False, False, False]))
        assert (drawn == 1).all() and found.all()


def test_the_query_bank_is_exact_under_autocast_and_counts_pairs_that_a_row_has():
    names = ("vision", "text", "eeg")
    model = model_of(*names, query_bank_size=16, query_bank_weight=1.0)
    bank = {name: nn.functional.normalize(torch.randn(16, 8), dim=-1) for name in names}
    model.query_bank.fill(bank)
    with torch.no_grad():
        model.logit_scale.scale.fill_(math.log(100))
        own = {name: nn.functional.normalize(torch.randn(4, 8), dim=-1) for name in names}
        scale = model.logit_scale()
        expected = model.query_bank(own, scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model.query_bank(own, scale), expected, **CLOSE)
        own["eeg"][0] = 0
        pair = {name: own[name][:1] for name in names[:2]}
        found = model.query_bank(own, scale)
        # One pair of three.
        torch.testing.assert_close(found[:1], model.query_bank(pair, scale) / 3, **CLOSE)
        torch.testing.assert_close(found[1:], expected[1:], **CLOSE)
