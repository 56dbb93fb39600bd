"""Points: supervoxels, class tokens, the interlaced decoder, losses of tags, and a folder that a stranger loads."""

import math

import numpy as np
import pytest
import torch
from crossmodal.modeling.losses_crossmodal import (
    activation_loss_2d,
    activation_loss_3d,
    class_contrast_loss,
    point_loss,
    smoothness_loss,
    soft_margin_loss,
)
from crossmodal.modeling.points_crossmodal import (
    PointEncoder,
    mean_by_index,
    of_points,
    sample_views,
    segment_means,
    voxel_segments,
)
from crossmodal.modeling.segmentation_crossmodal import best_segments
from transformers import AutoModelForSemanticSegmentation, ResNetConfig, ViTConfig

from crossmodal import CrossModalConfig, CrossModalForPointSegmentation, PointsConfig


CLASSES = 4
FUSION = {
    "hidden_size": 16, "num_attention_heads": 2, "num_fusion_layers": 2, "num_unimodal_layers": 1, "intermediate_size": 16,
    "hidden_dropout": 0.0, "voxel_size": 0.5, "num_labels": CLASSES,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def tiny_model(views=None, vision=True, **overrides):
    entry = {"model": ResNetConfig(**RESNET), "views": views} if views else ResNetConfig(**RESNET)
    encoders = {"points": PointsConfig(feature_size=6, hidden_size=12, cell_sizes=[0.3, 0.6], extent=1.0)}
    encoders |= {"vision": entry} if vision else {}
    return CrossModalForPointSegmentation.from_encoders(**encoders, **{**FUSION, **overrides}).eval()


def tiny_scenes(rows=3, count=24, views=None, seed=0):
    """Points of which rows have fewer and fewer, and their images."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([count - 4 * row for row in range(rows)])
    shape = (rows, views, 3, 32, 32) if views else (rows, 3, 32, 32)
    return {
        "points_values": torch.rand(rows, count, 6, generator=generator) * 2 - 1,
        "points_mask": torch.arange(count) < lengths[:, None],
        "points_uv": torch.rand(rows, count, views or 1, 2, generator=generator),
        "pixel_values": torch.randn(*shape, generator=generator),
    }


def tags_of(*rows):
    return torch.tensor([[float(c in row) for c in range(CLASSES)] for row in rows])


def changed(batch, **values):
    return batch | values


def largest_difference(one, other):
    return (one - other).abs().max().item()


# Supervoxels


def test_supervoxels_are_means_over_the_cells_of_a_grid():
    torch.manual_seed(0)
    coordinates, mask = torch.rand(2, 30, 3) * 2 - 1, torch.ones(2, 30, dtype=torch.bool)
    mask[1, 20:] = False
    segments, features = voxel_segments(coordinates, mask, 0.5), torch.randn(2, 30, 5)
    means, there = segment_means(features, segments)
    for row in range(2):
        cells = {}
        for point in range(30):
            if mask[row, point]:
                place = tuple(math.floor(x / 0.5) for x in coordinates[row, point].tolist())
                cells.setdefault(place, []).append(point)
        # Numbered by place, from 0, without gaps.
        for number, place in enumerate(sorted(cells)):
            assert segments[row, cells[place]].unique().tolist() == [number]
            expected = sum(features[row, point] for point in cells[place]) / len(cells[place])
            torch.testing.assert_close(means[row, number], expected)
        assert there[row].tolist() == [number < len(cells) for number in range(means.shape[1])]
        assert (means[row, len(cells) :] == 0).all()
    assert (segments[1, 20:] == -1).all()
    spread = of_points(means, segments)
    torch.testing.assert_close(spread[0, 3], means[0, segments[0, 3]])
    assert (spread[1, 20:] == 0).all()


def test_an_empty_supervoxel_is_zero_and_not_nan():
    means, there = segment_means(torch.ones(1, 3, 2), torch.tensor([[0, 2, 2]]))
    assert means[0].tolist() == [[1, 1], [0, 0], [1, 1]] and there.tolist() == [[True, False, True]]
    assert mean_by_index(torch.ones(2, 1), torch.tensor([1, 1]), 3).tolist() == [[0], [1], [0]]


def test_image_features_are_those_of_the_patches_where_points_are_seen():
    patches = torch.arange(2 * 3 * 4, dtype=torch.float32).view(1, 2, 1, 3, 4)
    centre = torch.tensor([(1 + 0.5) / 4, (2 + 0.5) / 3])
    between = torch.tensor([2 / 4, 0.5 / 3])
    hidden = torch.tensor([-1.0, -1.0])
    uv = torch.stack([torch.stack([centre, hidden]), torch.stack([between, centre]), torch.stack([hidden, hidden])])[
        None
    ]
    found = sample_views(patches, uv)[0, :, 0]
    first, second = patches[0, 0, 0], patches[0, 1, 0]
    expected = [first[2, 1], ((first[0, 1] + first[0, 2]) / 2 + second[2, 1]) / 2, 0.0]
    assert found.tolist() == pytest.approx([float(value) for value in expected])


def test_features_of_a_point_depend_on_points_of_its_cells_and_on_no_other():
    encoder = PointEncoder(PointsConfig(feature_size=3, hidden_size=8, cell_sizes=[1.0])).eval()
    near = torch.tensor([[[0.1, 0.1, 0.1], [0.9, 0.2, 0.3], [5.5, 0.1, 0.1]]])
    base = encoder(near)[0][0]
    moved = near.clone()
    moved[0, 2] += 0.2
    assert largest_difference(encoder(moved)[0][0][:, :2], base[:, :2]) < 1e-6
    moved = near.clone()
    moved[0, 1] -= 0.1
    assert largest_difference(encoder(moved)[0][0][:, 0], base[:, 0]) > 1e-4


# Losses, against their equations


def test_the_soft_margin_is_its_equation_over_the_rows_that_count():
    torch.manual_seed(0)
    logits, tags = torch.randn(3, CLASSES), tags_of([0], [1, 2], [3])
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    losses = []
    for z, y in zip(logits.tolist(), tags.tolist(), strict=True):
        losses.append(
            -sum(t * math.log(sigmoid(v)) + (1 - t) * math.log(sigmoid(-v)) for v, t in zip(z, y, strict=True))
        )
    losses = [value / CLASSES for value in losses]
    assert soft_margin_loss(logits, tags).item() == pytest.approx(sum(losses) / 3, abs=1e-6)
    some = soft_margin_loss(logits, tags, torch.tensor([True, False, True]))
    assert some.item() == pytest.approx((losses[0] + losses[2]) / 2, abs=1e-6)
    assert soft_margin_loss(logits, tags, torch.zeros(3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_class_activation_losses_are_their_equations(power):
    torch.manual_seed(0)
    scores, tags = torch.randn(2, 5, CLASSES), tags_of([0, 1], [2])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    total = 0.0
    for row in range(2):
        real = [scores[row, s].softmax(0) for s in range(5) if mask[row, s]]
        for c in range(CLASSES):
            part = (sum(p[c].item() ** power for p in real) / len(real)) ** (1 / power)
            total -= math.log(part) if tags[row, c] else math.log(1 - part)
    assert activation_loss_3d(scores, tags, mask, power).item() == pytest.approx(total / (2 * CLASSES), abs=1e-5)
    means = torch.stack([scores[0].mean(0), scores[1, :2].mean(0)])
    assert activation_loss_2d(scores, tags, mask).item() == pytest.approx(
        soft_margin_loss(means, tags).item(), abs=1e-6
    )


@pytest.mark.parametrize("present", [False, True])
def test_the_class_contrast_is_its_equation(present):
    torch.manual_seed(0)
    scores, tags = torch.randn(2, 3, CLASSES, CLASSES), tags_of([0, 1], [2, 3, 1], [0])
    rows = torch.tensor([True, True, False])
    losses = []
    for layer in range(2):
        for row in (0, 1):
            classes = [c for c in range(CLASSES) if tags[row, c]] if present else list(range(CLASSES))
            own = scores[layer, row][classes][:, classes]
            for matrix in (own, own.T):
                losses.append([-math.log(matrix[i].softmax(0)[i].item()) for i in range(len(classes))])
    # Mean over layers, over both directions, and over all classes that take part.
    expected = sum(map(sum, losses)) / sum(map(len, losses))
    found = class_contrast_loss(scores, tags if present else None, rows)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_smoothness_and_cross_entropy_leave_out_what_is_not_there():
    torch.manual_seed(0)
    features, means = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    real = [((features[r, p] - means[r, p]) ** 2).mean().item() for r in range(2) for p in range(3) if mask[r, p]]
    assert smoothness_loss(features, means, mask).item() == pytest.approx(sum(real) / 4, abs=1e-6)
    logits, labels = torch.randn(2, 3, CLASSES), torch.tensor([[0, -100, 2], [-100, -100, -100]])
    expected = -(logits[0, 0].log_softmax(0)[0] + logits[0, 2].log_softmax(0)[2]) / 2
    assert point_loss(logits, labels).item() == pytest.approx(expected.item(), abs=1e-6)
    assert point_loss(logits, torch.full((2, 3), -100)).item() == 0


def test_pseudo_labels_are_the_tags_that_a_model_is_sure_of_and_the_best_place_of_each():
    probabilities = torch.tensor(
        [[[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.1, 0.0, 0.9], [0.0, 0.0, 1.0]]]
    )
    there = torch.tensor([[True, True, True, True, False]])
    chosen = best_segments(probabilities, torch.tensor([[1.0, 1.0, 0.0]]), there, 0.5)
    # Sure of class 0 twice; class 1 takes where it is likeliest; class 2 is no tag of the scene, and the last is empty.
    assert chosen.tolist() == [[0, 0, 1, -100, -100]]
    # Two tags with the same best place: the surer one has it, the other the next best.
    both = torch.tensor([[[0.2, 0.8], [0.1, 0.3]]])
    assert best_segments(both, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.9).tolist() == [[1, 0]]


# The head


@pytest.mark.parametrize("projection", ["none", "add"])
@pytest.mark.parametrize("supervision", ["tags", "full"])
def test_every_parameter_learns(projection, supervision):
    model = tiny_model(point_projection=projection, supervision=supervision, view_tokens="grid").train()
    labels = torch.randint(0, CLASSES, (3, 24))
    out = model(**tiny_scenes(), labels=labels)
    out.loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    expected = {"class_tokens", "contrast", "smoothness"}
    assert set(out.losses) == expected | ({"activation_3d", "activation_2d"} if supervision == "tags" else {"points"})
    assert out.loss.item() == pytest.approx(sum(out.losses.values()).item(), rel=1e-5)
    assert out.logits.shape == (3, 24, CLASSES) and out.class_scores.shape == (2, 3, CLASSES, CLASSES)


def test_points_of_a_supervoxel_have_the_label_of_it():
    out = tiny_model()(**tiny_scenes())
    for row in range(3):
        for number in out.segments[row].unique():
            if number >= 0:
                own = out.logits[row][out.segments[row] == number]
                assert largest_difference(own, own[:1].expand_as(own)) == 0
    given = torch.arange(24).expand(3, -1) // 6
    assert (tiny_model()(**tiny_scenes(), points_segments=given).segments[0] == given[0]).all()


def test_weak_supervision_sees_of_labels_which_classes_there_are_and_no_more():
    model, batch = tiny_model().train(), tiny_scenes()
    labels = torch.randint(0, 3, (3, 24)).masked_fill(~batch["points_mask"], -100)
    loss = model(**batch, labels=labels).loss
    shuffled = torch.stack([row[torch.randperm(24)] for row in labels])
    assert model(**batch, labels=shuffled).loss.item() == pytest.approx(loss.item(), rel=1e-6)
    tags = tags_of(*[set(row.tolist()) - {-100} for row in labels])
    assert model(**batch, labels=tags).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_roles_alternate_and_class_tokens_are_no_keys():
    for first, expected in (
        ("3d", ["points<-vision", "vision<-points"]),
        ("2d", ["vision<-points", "points<-vision"]),
    ):
        model = tiny_model(first_query=first)
        out = model(**tiny_scenes(), output_attentions=True)
        assert [name for layer in out.cross_attentions for name in layer] == expected
        raw = out.cross_attentions[0][expected[0]]
        # Before the softmax, of all tokens, class tokens first.
        torch.testing.assert_close(raw[:, :, :CLASSES, :CLASSES].mean(1), out.class_scores[0])
    layer = tiny_model().decoder[0]
    stream, other = torch.randn(1, CLASSES + 5, 16), torch.randn(1, CLASSES + 3, 16)
    masks = torch.ones(1, CLASSES + 5, dtype=torch.bool), torch.ones(1, CLASSES + 3, dtype=torch.bool)
    seen, scores, _ = layer(stream, masks[0], other, masks[1], CLASSES)
    replaced = other.clone()
    replaced[:, :CLASSES] = torch.randn(1, CLASSES, 16) * 100
    again, other_scores, _ = layer(stream, masks[0], replaced, masks[1], CLASSES)
    assert largest_difference(again, seen) < 1e-6 and largest_difference(other_scores, scores) > 1


def test_a_decoder_layer_is_its_equations():
    torch.manual_seed(0)
    layer = tiny_model().decoder[0]
    stream, other = torch.randn(1, CLASSES + 5, 16), torch.randn(1, CLASSES + 3, 16)
    ones = [torch.ones(1, tokens.shape[1], dtype=torch.bool) for tokens in (stream, other)]
    found = layer(stream, ones[0], other, ones[1], CLASSES)[0]
    stream = layer.self_attn(stream, ones[0])[0]
    attention, keys = layer.cross_attn, layer.key_norm(other[:, CLASSES:])
    q, k, v = attention.q_proj(layer.query_norm(stream)), attention.k_proj(keys), attention.v_proj(keys)
    heads = []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        heads.append((q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v[..., part])
    expected = layer.mlp(stream + attention.o_proj(torch.cat(heads, dim=-1)))
    assert largest_difference(found, expected) < 1e-5


def test_class_tokens_are_shared_and_the_scene_is_their_weighted_mean():
    model, batch = tiny_model(modality_weighting="uniform"), tiny_scenes()
    seen = {}
    for name, module in model.streams.items():
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: inputs[0][:, :CLASSES]}))
    out = model(**batch)
    assert largest_difference(seen["points"], seen["vision"]) == 0
    assert out.modality_weights.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("projection", ["none", "add"])
@pytest.mark.parametrize("supervision", ["tags", "full"])
def test_what_is_padding_or_absent_changes_nothing(projection, supervision):
    model = tiny_model(point_projection=projection, supervision=supervision)
    batch, labels = tiny_scenes(), torch.randint(0, CLASSES, (3, 24))
    labels = labels.masked_fill(~batch["points_mask"], -100)
    out = model(**batch, labels=labels)
    padding = ~batch["points_mask"]
    filled = batch["points_values"].masked_fill(padding[..., None], 7.0)
    other = model(**changed(batch, points_values=filled), labels=labels)
    assert largest_difference(other.logits, out.logits) < 1e-5 and other.loss.item() == pytest.approx(out.loss.item())
    # A row alone, without the padding of others.
    alone = model(**{key: value[2:, :16] if key.startswith("points") else value[2:] for key, value in batch.items()})
    assert largest_difference(alone.logits[0], out.logits[2, :16]) < 1e-4
    # A row without an image is as if there were none at all.
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    without = model(**batch, modality_mask=mask, labels=labels)
    never = {key: value[1:2] for key, value in batch.items() if key != "pixel_values"}
    never = model(**never)
    assert largest_difference(without.logits[1], never.logits[0]) < 1e-4
    assert without.modality_weights[1].tolist() == [1.0, 0.0] and without.loss.isfinite()
    filled = batch["pixel_values"].clone()
    filled[1] = 9.0
    again = model(**changed(batch, pixel_values=filled), modality_mask=mask, labels=labels)
    assert largest_difference(again.logits, without.logits) < 1e-5
    assert again.loss.item() == pytest.approx(without.loss.item(), rel=1e-5)


def test_permuted_points_have_permuted_labels():
    model, batch = tiny_model(point_projection="add"), tiny_scenes()
    order = torch.randperm(24)
    moved = {key: value[:, order] if key.startswith("points") else value for key, value in batch.items()}
    assert largest_difference(model(**moved).logits, model(**batch).logits[:, order]) < 1e-5


def test_points_are_labelled_by_images_where_they_are_seen():
    model, batch = tiny_model(point_projection="only"), tiny_scenes()
    out = model(**batch)
    elsewhere = batch["points_values"].clone()
    elsewhere[..., 3:] = 5.0
    # Nothing but uv and images counts (and which points share a supervoxel).
    assert largest_difference(model(**changed(batch, points_values=elsewhere)).logits, out.logits) < 1e-6
    moved = model(**changed(batch, points_uv=1 - batch["points_uv"]))
    assert largest_difference(moved.logits, out.logits) > 1e-4
    hidden = model(**changed(batch, points_uv=torch.full_like(batch["points_uv"], -1)))
    own = hidden.logits[0]
    assert largest_difference(own, own[:1].expand_as(own)) < 1e-6


def test_several_views_are_tokens_of_one_scene():
    model, batch = tiny_model(views=2, point_projection="add", view_tokens="grid"), tiny_scenes(views=2)
    out = model(**batch, output_attentions=True)
    # Class tokens, and two views of 4 x 4 patches.
    assert out.cross_attentions[0]["points<-vision"].shape[-1] == CLASSES + 2 * 16
    one = tiny_model(views=2)(**tiny_scenes(views=2), output_attentions=True)
    assert one.cross_attentions[0]["points<-vision"].shape[-1] == CLASSES + 2
    with pytest.raises(ValueError, match="points_uv is of 1 views, and 2 are given"):
        model(**changed(batch, points_uv=batch["points_uv"][:, :, :1]))


def test_patches_behind_a_class_token_are_where_points_are_seen():
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    points = PointsConfig(feature_size=6, hidden_size=12, cell_sizes=[0.3])
    model = CrossModalForPointSegmentation.from_encoders(
        points=points, vision=vit, point_projection="add", **FUSION
    ).eval()
    assert model(**tiny_scenes()).logits.isfinite().all()


def test_known_tags_keep_other_classes_away():
    for supervision in ("tags", "full"):
        out = tiny_model(supervision=supervision)(**tiny_scenes(), scene_tags=tags_of([1], [2], [0, 3]))
        chosen = out.logits.argmax(-1)
        assert (chosen[0, :24] == 1).all() and (chosen[1, :20] == 2).all()
        assert set(chosen[2, :16].tolist()) <= {0, 3}


def test_without_the_decoder_and_without_images_it_is_still_a_model():
    concat = tiny_model(fusion_type="concat")
    assert len(concat.decoder) == 0 and concat(**tiny_scenes()).class_scores is None
    alone = tiny_model(vision=False)
    scenes = {key: value for key, value in tiny_scenes().items() if key in ("points_values", "points_mask")}
    out = alone(**scenes, labels=tags_of([0], [1], [2]))
    assert out.modality_weights.tolist() == [[1.0]] * 3 and set(out.losses) == {
        "class_tokens",
        "activation_3d",
        "smoothness",
    }
    bare = tiny_model(vision=False, class_token_weight=0.0, smoothness_weight=0.0)
    assert set(bare(**scenes, labels=tags_of([0], [1], [2])).losses) == {"activation_3d"}


def test_a_folder_gives_the_same_labels_again(tmp_path):
    model = tiny_model(views=2, point_projection="add", first_query="2d")
    expected = model(**tiny_scenes(views=2)).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded) is CrossModalForPointSegmentation and loaded.config.first_query == "vision"
    assert largest_difference(loaded(**tiny_scenes(views=2)).logits, expected) == 0


def test_gradient_checkpointing_changes_no_gradient():
    model, labels = tiny_model().train(), tags_of([0], [1], [2])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**tiny_scenes(), labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.gradient_checkpointing_enable()
    assert largest_difference(*gradients) < 1e-6


# What cannot work


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"fusion_type": "cross"}, "'interlaced' .MIT., or not at all in 'concat'"),
        ({"gate": "closed"}, "has no gate. Choose fusion_type='concat'"),
        ({"fusion_type": "interlaced", "vision": False}, "alternates between modalities"),
        ({"vision": False, "point_projection": "add"}, "needs images"),
        ({"point_projection": "both"}, "point_projection='both' is unknown"),
        ({"voxel_size": 0}, "voxel_size=0"),
        ({"modality_dropout": 0.3}, "would take the points"),
        ({"modality_weighting": "uncertainty", "auxiliary_loss_weight": 0.1}, "not for points"),
    ],
)
def test_configs_that_cannot_work_are_named(overrides, said):
    with pytest.raises(ValueError, match=said):
        tiny_model(**overrides)


def test_modalities_that_are_no_points_are_named():
    with pytest.raises(ValueError, match="Expected one of type 'points'"):
        CrossModalForPointSegmentation.from_encoders(vision=ResNetConfig(**RESNET), **FUSION)
    with pytest.raises(ValueError, match="views=0"):
        CrossModalConfig(modalities={"vision": {"config": ResNetConfig(**RESNET), "views": 0}})
    with pytest.raises(ValueError, match="feature_size=2. Expected at least 3"):
        PointsConfig(feature_size=2)
    with pytest.raises(ValueError, match="cell_sizes"):
        PointsConfig(cell_sizes=[0.0])


def test_inputs_that_cannot_be_labelled_are_named():
    model, batch = tiny_model(point_projection="add"), tiny_scenes()
    with pytest.raises(ValueError, match="there are no points to label"):
        model(pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="points_uv was not given"):
        model(**{key: value for key, value in batch.items() if key != "points_uv"})
    with pytest.raises(ValueError, match="row 1 of the batch has no point"):
        model(**batch, modality_mask=torch.tensor([[True, True], [False, True], [True, True]]))
    with pytest.raises(ValueError, match="row 2 of the batch has no point"):
        model(**changed(batch, points_mask=torch.tensor([[True], [True], [False]]).expand(3, 24)))
    with pytest.raises(ValueError, match="labels hold 9, which is no class"):
        model(**batch, labels=torch.full((3, 24), 9))
    with pytest.raises(ValueError, match=r"labels of shape \(3, 5\)"):
        model(**batch, labels=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="learns from labels of points"):
        tiny_model(supervision="full")(**batch, labels=tags_of([0], [1], [2]))
    with pytest.raises(ValueError, match="has class activation"):
        tiny_model(supervision="full").pseudo_labels(tags_of([0], [1], [2]), **batch)
    with pytest.raises(ValueError, match="Expected .batch, points, 6."):
        model(**changed(batch, points_values=torch.rand(3, 24, 4)))
    with pytest.raises(ValueError, match="belongs to a head that fuses by itself"):
        model.crossmodal(**{key: value for key, value in batch.items() if key != "points_uv"})
    with pytest.raises(ValueError, match="knows the classes"):
        model.resize_answers({0: "a", 1: "b"})


def test_frozen_encoders_of_images_may_be_read_from_a_cache():
    model = tiny_model(point_projection="add", views=2)
    model.freeze("vision")
    batch = tiny_scenes(views=2)
    expected = model(**batch).logits
    tokens, mask = model.crossmodal.encode_tokens("vision", batch.pop("pixel_values"))
    assert tokens.shape[:4] == (3, 2, 4, 4) and mask is None
    assert largest_difference(model(**batch, vision_tokens=tokens).logits, expected) < 1e-6


def test_points_are_read_by_other_heads_too():
    from crossmodal import CrossModalForSequenceClassification

    encoders = {"points": PointsConfig(feature_size=6, hidden_size=12), "vision": ResNetConfig(**RESNET)}
    model = CrossModalForSequenceClassification.from_encoders(
        **encoders, hidden_size=16, num_attention_heads=2, intermediate_size=16, num_labels=3
    ).eval()
    batch = tiny_scenes()
    batch.pop("points_uv")
    logits = model(**batch).logits
    filled = batch["points_values"].masked_fill(~batch["points_mask"][..., None], 3.0)
    assert largest_difference(model(**changed(batch, points_values=filled)).logits, logits) < 1e-5
    assert np.isfinite(logits.detach().numpy()).all()
