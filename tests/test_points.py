"""Points from files to a labelled file: reading, the processor, the pipeline, the task, its data, the drawn rooms and the commands."""

import copy
import json

import datasets
import numpy as np
import plyfile
import pytest
import torch
from crossmodal.processing.reading_points_crossmodal import (
    class_colors,
    draw_from_above,
    point_values,
    read_points,
    write_labelled_ply,
)
from crossmodal.training.ablate import variants_of
from crossmodal.training.cli import app
from crossmodal.training.datasets import RowDataset
from crossmodal.training.evaluate import evaluate
from crossmodal.training.loading import hold_out
from crossmodal.training.points import PointSegmentationTask, pseudo_labelled
from crossmodal.training.recipes import Recipe
from crossmodal.training.rooms import ROOM_CLASSES, ROOM_POINTS, ROOM_VIEWS, draw_room, rooms_dataset, see
from crossmodal.training.rooms import camera as room_camera
from crossmodal.training.train import train
from PIL import Image
from transformers import ResNetConfig, ViTImageProcessorPil
from world import TINY_RECIPE, noise, picture, run_as_stranger

from crossmodal import (
    CrossModalForPointSegmentation,
    CrossModalPointSegmentationPipeline,
    CrossModalProcessor,
    PointsConfig,
)


LABELS = {0: "floor", 1: "chair", 2: "table"}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def tiny(feature_size=6, views=None, vision=True, **overrides):
    entry = {"model": ResNetConfig(**RESNET), "views": views} if views else ResNetConfig(**RESNET)
    encoders = {"points": PointsConfig(feature_size=feature_size, hidden_size=12, cell_sizes=[0.3])}
    encoders |= {"vision": entry} if vision else {}
    model = CrossModalForPointSegmentation.from_encoders(
        **encoders,
        **{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "id2label": LABELS} | overrides,
    )
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32}) if vision else None
    return CrossModalProcessor.from_config(model.config, image_processor=image_processor), model.eval()


def scene(count=20, seed=0, views=1, **parts):
    draw = np.random.default_rng(seed)
    made = {"coordinates": draw.uniform(-1, 1, (count, 3)), "colors": draw.integers(0, 256, (count, 3))}
    return made | {"uv": draw.uniform(0, 1, (count, views, 2))} | parts


# Reading


@pytest.mark.parametrize("text", [True, False])
def test_ply_files_are_read_ascii_or_binary(tmp_path, text):
    points = scene()
    names = [(n, "f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")] + [("alpha", "u1")]
    vertices = np.zeros(20, names)
    for axis in range(3):
        vertices["xyz"[axis]] = points["coordinates"][:, axis]
        vertices[("red", "green", "blue")[axis]] = points["colors"][:, axis]
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")], text=text).write(str(tmp_path / "a.ply"))
    read = read_points(tmp_path / "a.ply")
    np.testing.assert_allclose(read["coordinates"], points["coordinates"], rtol=1e-5)
    np.testing.assert_allclose(read["colors"], points["colors"] / 255, atol=1e-6)


def test_arrays_dicts_and_numpy_files_are_read_alike(tmp_path):
    points = scene(segments=np.repeat([7, 3], 10))
    np.savez(tmp_path / "a.npz", xyz=points["coordinates"], rgb=points["colors"], segments=points["segments"])
    read = read_points(tmp_path / "a.npz")
    for key in ("coordinates", "colors"):
        np.testing.assert_array_equal(read[key], read_points(points)[key])
    # Numbered from 0, whatever they were called.
    assert read["segments"].tolist() == [1] * 10 + [0] * 10
    array = read_points(torch.from_numpy(noise(5, 7)))
    assert array["coordinates"].shape == (5, 3) and array["features"].shape == (5, 4)
    values = point_values(read_points(points), 6)
    np.testing.assert_allclose(values[:, 3:], points["colors"] / 255 * 2 - 1, atol=1e-6)
    assert point_values(read_points(points), 3).shape == (20, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"colors": np.zeros((5, 3))}, r"has no coordinates: it has \['colors'\]"),
        (np.zeros((5, 2)), r"shape \(5, 2\)"),
        ({"coordinates": np.full((5, 3), np.nan)}, "coordinates of points contain NaN"),
        (np.zeros((1, 3)), "has 1 point. Expected at least 2"),
        (np.zeros((0, 3)), "has 0 points"),
        ({"coordinates": np.zeros((5, 3)), "colors": np.zeros((4, 3))}, "colors of points are 4, and there are 5"),
        ({"coordinates": np.zeros((5, 3)), "uv": np.zeros((5, 3))}, r"uv of points have shape \(5, 3\)"),
        ({"coordinates": [["a", "b", "c"]] * 3}, "are no numbers"),
        ("nowhere.ply", "there is no file 'nowhere.ply'"),
    ],
)
def test_points_that_cannot_be_read_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        read_points(given)


def test_files_that_are_no_points_are_named(tmp_path):
    (tmp_path / "a.ply").write_bytes(b"nothing")
    (tmp_path / "a.npz").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text("1 2 3")
    for name, said in (("a.ply", "cannot be read as PLY"), ("a.npz", "cannot be read"), ("a.txt", "none of .ply")):
        with pytest.raises(ValueError, match=said):
            read_points(tmp_path / name)
    vertices = np.zeros(3, [("x", "f4"), ("y", "f4")])
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(str(tmp_path / "flat.ply"))
    with pytest.raises(ValueError, match="has no coordinates.*x, y and z"):
        read_points(tmp_path / "flat.ply")


def test_labelled_points_are_written_in_the_colors_of_the_legend(tmp_path):
    coordinates, ids = noise(6, 3), np.array([0, 1, 2, 2, 0, 1])
    write_labelled_ply(tmp_path / "deep" / "out.ply", coordinates, ids, list(LABELS.values()))
    data = plyfile.PlyData.read(str(tmp_path / "deep" / "out.ply"))
    vertices = data["vertex"].data
    assert vertices["label"].tolist() == ids.tolist() and "label 1 chair" in data.comments
    found = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=1)
    np.testing.assert_array_equal(found, class_colors(3)[ids])
    assert len({tuple(color) for color in class_colors(40).tolist()}) == 40
    np.testing.assert_allclose(read_points(tmp_path / "deep" / "out.ply")["coordinates"], coordinates)
    draw_from_above(tmp_path / "above.png", coordinates, ids, list(LABELS.values()))
    with Image.open(tmp_path / "above.png") as image:
        assert min(image.size) > 300
    with pytest.raises(ValueError, match="up='w'"):
        draw_from_above(tmp_path / "above.png", coordinates, ids, list(LABELS.values()), up="w")


# The processor


def test_scenes_are_padded_and_rows_may_lack_their_image():
    processor, model = tiny(point_projection="add")
    batch = processor(points=[scene(20), scene(12)], images=[None, picture()])
    assert batch["points_values"].shape == (2, 20, 6) and batch["points_mask"].sum(1).tolist() == [20, 12]
    assert batch["points_uv"].shape == (2, 20, 1, 2) and (batch["points_uv"][1, 12:] == -1).all()
    assert batch["modality_mask"].tolist() == [[True, False], [True, True]]
    assert model(**batch).logits.isfinite().all()
    one = processor(points=scene(20), images=picture())
    assert one["points_values"].shape == (1, 20, 6) and "modality_mask" not in one


def test_a_row_may_have_several_views():
    processor, model = tiny(views=3, point_projection="add")
    frames = [picture(color) for color in ("red", "green", "blue")]
    batch = processor(points=[scene(views=3), scene(views=3)], images=[frames, None])
    assert batch["pixel_values"].shape == (2, 3, 3, 32, 32) and model(**batch).logits.isfinite().all()
    one = processor(points=scene(views=3), images=frames)
    torch.testing.assert_close(one["pixel_values"][0], batch["pixel_values"][0])
    # Fewer are shown again, more are thinned out at even distances.
    again = processor(points=scene(views=3), images=[[frames[0]]])["pixel_values"]
    torch.testing.assert_close(again[0, 0], again[0, 2])
    thinned = processor(points=scene(views=3), images=[[f for f in frames for _ in range(3)]])["pixel_values"]
    torch.testing.assert_close(thinned, one["pixel_values"])


def test_inputs_that_do_not_fit_are_named():
    processor, _ = tiny()
    with pytest.raises(ValueError, match="image of row 1 has no point in view"):
        outside = scene(uv=np.full((20, 2), 300.0))
        processor(points=[scene(), outside], images=[picture(), picture()])
    processor(points=[scene(), outside], images=[picture(), None])
    with pytest.raises(ValueError, match="row 0 .'points'. have 3 numbers each .coordinates., and this model reads 6"):
        processor(points=[noise(5, 3)], images=[picture()])
    with pytest.raises(ValueError, match="row 1 has none. Give all, or none"):
        processor(points=[scene(segments=np.zeros(20)), scene()])
    with pytest.raises(ValueError, match="of .1, 2. views"):
        processor(points=[scene(), scene(views=2)])
    with pytest.raises(ValueError, match="has a list of no image"):
        tiny(views=2)[0](points=[scene(views=2)], images=[[]])
    processor.image_processor.do_center_crop = True
    with pytest.raises(ValueError, match="do_center_crop"):
        processor(points=scene(), images=picture())


# The pipeline


def test_every_point_gets_a_label_and_a_file(tmp_path):
    processor, model = tiny(point_projection="add")
    pipe = CrossModalPointSegmentationPipeline(model=model, processor=processor, task="crossmodal-point-segmentation")
    found = pipe(points=scene(), image=picture(), output=tmp_path / "out.ply", picture=tmp_path / "above.png")
    assert len(found["labels"]) == 20 and set(found["labels"]) <= set(LABELS.values())
    assert [LABELS[index] for index in found["label_ids"]] == found["labels"]
    assert set(found["scene"]) == set(LABELS.values()) and sum(found["modality_weights"].values()) == pytest.approx(1)
    assert plyfile.PlyData.read(str(tmp_path / "out.ply"))["vertex"]["label"].tolist() == found["label_ids"].tolist()
    assert (tmp_path / "above.png").stat().st_size > 1000
    several = pipe([{"points": scene(), "image": picture()}, {"points": scene(12, 1)}], batch_size=2)
    assert [len(one["labels"]) for one in several] == [20, 12] and several[0]["labels"] == found["labels"]
    assert set(pipe(points=scene(), image=picture(), tags=["chair"])["labels"]) == {"chair"}
    with pytest.raises(ValueError, match="the tag 'sofa' is no class of this model"):
        pipe(points=scene(), tags=["sofa"])
    with pytest.raises(ValueError, match="are of one scene"):
        pipe([{"points": scene()}], output=tmp_path / "out.ply")
    with pytest.raises(ValueError, match="'colour' is no parameter"):
        pipe(points=scene(), colour=True)


# The task


def target(*labels):
    return {"labels": np.array(labels), "classes": tuple(LABELS.values())}


def test_miou_is_of_one_matrix_over_all_points_with_a_truth():
    task = PointSegmentationTask(LABELS)
    # In two scenes of different length; the padding behind the second says nothing.
    truth = [target(0, 0, 1, -1, 1), target(0, 1)]
    chosen = [np.array([0, 1, 1, 2, 2]), np.array([0, 0, 2, 2, 2])]
    found = task.score(chosen, truth)
    # floor: 2 right of 3, and one wrongly taken for it; chair: 1 right of 3, and one wrongly; no truth is a table.
    assert found["iou_floor"] == pytest.approx(2 / 4) and found["iou_chair"] == pytest.approx(1 / 4)
    assert found["miou"] == pytest.approx((2 / 4 + 1 / 4) / 2) and found["point_accuracy"] == pytest.approx(3 / 6)
    assert "iou_table" not in found
    assert task.confusion(chosen, truth).tolist() == [[2, 1, 0], [1, 1, 1], [0, 0, 0]]
    logits = np.full((2, 5, 3), -100.0)
    for row, ids in enumerate(chosen):
        logits[row, np.arange(5), ids] = 1.0
    assert task.score_outputs(logits, truth) == found
    common = task.majority(truth, truth)
    assert common["iou_floor"] == pytest.approx(3 / 6) and common["iou_chair"] == 0


def test_targets_become_padded_labels_and_other_classes_are_refused():
    task = PointSegmentationTask.from_targets([target(0, 2)])
    assert task.encode_targets([target(0, -1, 2), target(1)]).tolist() == [[0, -100, 2], [1, -100, -100]]
    other = {"labels": np.array([0, 1]), "classes": ("floor", "lamp")}
    with pytest.raises(ValueError, match="the class 'lamp'"):
        task.check_targets([other])
    assert task.encode_targets([other]).tolist() == [[0, -100]]
    with pytest.raises(ValueError, match="no point of these rows has a label"):
        task.check_targets([target(-1, -1)])
    weights = task.class_weights([target(0, 0, 0, 1, 2, 2)])
    assert weights == pytest.approx([6 / 9, 6 / 3, 6 / 6])


# Data


def scannet_rows():
    draw = np.random.default_rng(0)
    rows = [
        {
            "scene_id": f"scene000{number // 2}_0{number % 2}",
            "points": draw.normal(size=(6, 3)).astype(np.float32).tolist(),
            "colors": draw.integers(0, 256, (6, 3)).tolist(),
            # 0 is unannotated, 40 other properties: neither is scored.
            "labels": [1, 2, 39, 0, 40, 36],
            "segments": [11, 11, 11, 42, 42, 7],
            "images": [picture("red"), picture("blue")],
        }
        for number in range(12)
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))


def test_scannet_is_read_in_its_own_numbers():
    samples = RowDataset(scannet_rows(), "point_segmentation")
    assert samples.adapter_name == "scannet"
    sample = samples[0]
    classes = sample["target"]["classes"]
    assert len(classes) == 20 and [classes[n] for n in sample["target"]["labels"] if n >= 0] == [
        "wall", "floor", "otherfurniture", "bathtub",
    ]  # fmt: skip
    assert (sample["target"]["labels"][[3, 4]] == -1).all()
    assert len(sample["images"]) == 2 and sample["images"][1].getpixel((0, 0)) == picture("blue").getpixel((0, 0))
    processor, model = tiny(views=2, id2label=dict(enumerate(classes)))
    batch = processor(points=[sample["points"]], images=[sample["images"]])
    # Its own segments are the supervoxels.
    assert model(**batch).segments.tolist() == [[1, 1, 1, 2, 2, 0]]
    # Two scans of one room stay together.
    kept, held = hold_out(scannet_rows(), "point_segmentation", 0.5)
    rooms = [{name.rpartition("_")[0] for name in part["scene_id"]} for part in (kept, held)]
    assert not rooms[0] & rooms[1]


def test_s3dis_is_read_with_its_thirteen_classes():
    rows = datasets.Dataset.from_list(
        [
            {
                "area": "Area_5",
                "room": "office_1",
                "points": noise(4, 3).tolist(),
                "colors": [[0, 0, 255]] * 4,
                "labels": [0, 12, 8, 13],
            }
        ]
    )
    sample = RowDataset(rows, "point_segmentation")[0]
    assert [sample["target"]["classes"][n] for n in sample["target"]["labels"][:3]] == ["ceiling", "clutter", "chair"]
    assert sample["target"]["labels"][3] == -1 and sample["points"]["colors"].shape == (4, 3)
    assert RowDataset(rows, "point_segmentation").adapter.subject(rows[0]) == "Area_5"


def driving_rows(count=10, recordings=("a", "b")):
    draw, rows = np.random.default_rng(0), []
    for recording in recordings:
        for frame in range(count):
            points = draw.uniform(-1, 1, (12, 3)).astype(np.float32)
            rows.append(
                {
                    "image": picture("red" if frame % 2 else "blue", (48, 24)),
                    "id": f"{recording}_{frame:06d}",
                    "points": points.reshape(-1).tolist(),
                    "uv": draw.uniform(0, 1, (12, 2)).astype(np.float32).reshape(-1).tolist(),
                    "labels": [0] * 6 + [1 if frame % 2 else 6] * 3 + [5] * 3,
                }
            )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_frames_are_held_out_by_time():
    rows = driving_rows()
    sample = RowDataset(rows, "point_segmentation")[1]
    assert sample["points"]["coordinates"].shape == (12, 3) and sample["points"]["uv"].shape == (12, 1, 2)
    names = sample["target"]["classes"]
    assert len(names) == 7 and [names[n] for n in sample["target"]["labels"][[6, 9]]] == [
        "vehicle",
        "building_wall_fence",
    ]
    assert (sample["target"]["labels"][:6] == -1).all()
    kept, held = hold_out(rows.shuffle(seed=0), "point_segmentation", 0.2, by="time")
    assert sorted(held["id"]) == ["a_000008", "a_000009", "b_000008", "b_000009"] and len(kept) == 16
    with pytest.raises(ValueError, match="parts of recordings"):
        hold_out(scannet_rows(), "point_segmentation", 0.2, by="time")


def test_rooms_are_seen_where_their_points_are():
    images, points, uv, labels = draw_room(np.random.default_rng(3))
    assert images.shape == (ROOM_VIEWS, 48, 48, 3) and points.shape == (ROOM_POINTS, 3)
    assert uv.shape == (ROOM_POINTS, ROOM_VIEWS, 2) and (labels == 0).any()
    np.testing.assert_allclose(points[labels == 0, 2], 0, atol=1e-4)
    assert (points[labels > 1, 2] > -1e-4).all()
    # Every point is seen by the view it was scanned in, and red things are red there.
    seen = ((uv >= 0) & (uv <= 1)).all(-1)
    assert seen.any(axis=1).mean() > 0.99
    reds = [n for n, name in enumerate(ROOM_CLASSES) if name.startswith("red")]
    for view in range(ROOM_VIEWS):
        own = seen[:, view] & np.isin(labels, range(2, len(ROOM_CLASSES)))
        x, y = np.minimum((uv[own, view] * 48).astype(int), 47).T
        pixels = images[view, y, x].astype(int)
        right = (pixels.argmax(axis=1) == 0) == np.isin(labels[own], reds)
        assert right.mean() > 0.8
    middle = room_camera(np.random.default_rng(0), (0, 0))
    place, depth = see(middle, (middle.place + 2 * middle.axes[2])[None])
    np.testing.assert_allclose(place, [[0.5, 0.5]])
    assert depth[0] == pytest.approx(2)


def test_the_rooms_of_a_split_are_always_the_same():
    first, second = rooms_dataset(3), rooms_dataset(3)
    assert first["points"][:] == second["points"][:] and first["room"][:] == [f"train-{n:04d}" for n in range(3)]
    assert rooms_dataset(3, "validation")["points"][0] != first["points"][0]
    sample = RowDataset(first, "point_segmentation")[0]
    assert sample["target"]["classes"] == ROOM_CLASSES and len(sample["images"]) == ROOM_VIEWS


# Training


def recipe_values(folder, **model):
    values = copy.deepcopy(TINY_RECIPE) | {"task": "point_segmentation", "dataset": "made", "output_dir": str(folder)}
    config = {
        "hidden_size": 16, "num_attention_heads": 2, "num_fusion_layers": 2, "num_unimodal_layers": 1, "intermediate_size": 16,
        "hidden_dropout": 0.0, "voxel_size": 0.3, "point_projection": "add",
    }  # fmt: skip
    values["model"] = {
        "encoders": {
            "points": {"model_type": "crossmodal_points", "feature_size": 3, "hidden_size": 12, "cell_sizes": [0.5]},
            "vision": {"model_type": "resnet", **RESNET},
        },
        "config": config | model,
    }
    values["processor"] = {"image_size": [24, 48]}
    values["training"] |= {"num_train_epochs": 3, "load_best_model_at_end": False}
    return values


def learnable_rows():
    """Points above are of one class, those below of another, which every second scene lacks."""

    def relabel(row, index):
        points = np.array(row["points"]).reshape(-1, 3)
        points[:, 2] += np.sign(points[:, 2])
        if index % 2:
            points[:, 2] = -np.abs(points[:, 2])
        return {"points": points.reshape(-1).tolist(), "labels": np.where(points[:, 2] > 0, 1, 5).tolist()}

    return driving_rows(12).map(relabel, with_indices=True)


def test_points_are_learnt_from_tags_and_a_stranger_labels_them(tmp_path):
    values = recipe_values(tmp_path / "m", class_token_weight=1.0)
    values |= {"eval_split": "train", "holdout": 0.25, "holdout_by": "time"}
    values |= {"pseudo_labels": {"training": {"num_train_epochs": 10}}}
    values["training"] |= {"num_train_epochs": 10, "learning_rate": 1e-2}
    said, rows = [], learnable_rows()
    rows.to_parquet(tmp_path / "train.parquet")
    values["dataset"] = str(tmp_path / "train.parquet")
    result = train(Recipe(**values, name="points"), write=said.append)
    assert result["eval_rows"] == 6 and result["metrics"]["miou"] > result["majority"]["miou"] + 0.2
    assert result["model"].config.supervision == "full" and "miou" in result["baselines"]["first stage"]
    assert any(line.startswith("pseudo-labels: ") for line in said)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "iou_vehicle" in card and "first stage" in card and (tmp_path / "m" / "confusion.png").exists()
    model = CrossModalForPointSegmentation.from_pretrained(tmp_path / "m")
    processor = CrossModalProcessor.from_pretrained(tmp_path / "m")
    assert evaluate(model, processor, rows, "x", progress=False)["miou"] > 0.5
    points, uv = (np.array(rows[0][key], dtype=np.float32) for key in ("points", "uv"))
    points, uv = points.reshape(-1, 3), uv.reshape(-1, 2)
    np.savez(tmp_path / "p.npz", coordinates=points, uv=uv)
    picture("blue").save(tmp_path / "p.png")
    out = run_as_stranger(
        """
import sys, json
from transformers import pipeline
pipe = pipeline(model=sys.argv[1], trust_remote_code=True)
found = pipe(points=sys.argv[2], image=sys.argv[3], output="out.ply")
print(json.dumps(found["labels"]))
""",
        tmp_path / "m",
        tmp_path / "p.npz",
        tmp_path / "p.png",
        cwd=tmp_path,
    )
    labels = json.loads(out.splitlines()[-1])
    pipe = CrossModalPointSegmentationPipeline(
        model=model.eval(), processor=processor, task="crossmodal-point-segmentation"
    )
    assert labels == pipe(points=str(tmp_path / "p.npz"), image=str(tmp_path / "p.png"))["labels"]
    assert (tmp_path / "out.ply").exists()
    command = ["predict", str(tmp_path / "m"), "--points", str(tmp_path / "p.npz"), "--image", str(tmp_path / "p.png")]
    app([*command, "--output", str(tmp_path / "o.ply"), "--picture", str(tmp_path / "o.png")], standalone_mode=False)
    written = plyfile.PlyData.read(str(tmp_path / "o.ply"))["vertex"]["label"]
    assert [model.config.id2label[index] for index in written.tolist()] == labels and (tmp_path / "o.png").exists()


def test_predict_prints_how_many_points_have_which_label(tmp_path, capsys):
    processor, model = tiny(feature_size=3, vision=False)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    np.savez(tmp_path / "p.npz", coordinates=noise(30, 3))
    command = ["predict", str(tmp_path / "m"), "--points", str(tmp_path / "p.npz")]
    app([*command, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["labels"]) == 30 and sum(found["points"].values()) == 30
    app(command, standalone_mode=False)
    assert "points" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--points FILE"):
        app(["predict", str(tmp_path / "m"), "--image", "a.png"], standalone_mode=False)


def test_pseudo_labels_use_tags_alone():
    processor, model = tiny(feature_size=3, id2label=dict(enumerate(ROOM_CLASSES)), views=4, point_projection="add")
    rows = rooms_dataset(2)
    samples = RowDataset(rows, "point_segmentation")
    task = PointSegmentationTask.from_targets(samples.targets)
    found = pseudo_labelled(model, processor, task, samples)
    shuffled = rows.map(lambda row: {"labels": row["labels"][::-1]})
    again = pseudo_labelled(model, processor, task, RowDataset(shuffled, "point_segmentation"))
    for one, other, truth in zip(found.targets, again.targets, samples.targets, strict=True):
        np.testing.assert_array_equal(one["labels"], other["labels"])
        assert set(one["labels"]) - {-1} == set(truth["labels"])
    assert found[0]["target"] is found.targets[0] and found[0]["points"]["coordinates"].shape == (ROOM_POINTS, 3)


def test_recipes_that_cannot_work_are_named(tmp_path):
    values = recipe_values(tmp_path)
    for change, said in (
        ({"holdout_by": "place"}, "holdout_by='place' is unknown"),
        ({"task": "vqa", "pseudo_labels": {"training": {"num_train_epochs": 1}}}, "pseudo_labels with task='vqa'"),
        ({"pseudo_labels": {"epochs": 3}}, "pseudo_labels.epochs is no key"),
        ({"pseudo_labels": {"training": {"num_epochs": 3}}}, "training.num_epochs is no argument"),
    ):
        with pytest.raises(ValueError, match=said):
            Recipe(**{**values, **change})


def test_recipes_of_points_and_their_variants_are_whole():
    for name in ("segmentation_driving", "segmentation_room"):
        recipe = Recipe.load(name)
        chosen = ["points alone", "points alone class activation", "points alone voxel_size=1", "concat"]
        found = variants_of(recipe, chosen)
        assert list(found) == ["full", *chosen]
        for name_alone in chosen[:3]:
            model = found[name_alone].model
            assert list(model["encoders"]) == ["points"] and model["config"]["point_projection"] == "none"
            # Nothing is frozen that could be cached.
            assert model["freeze"] == [] and found[name_alone].token_cache is None
        assert found[chosen[1]].model["config"]["class_token_weight"] == 0
        assert found[chosen[2]].model["config"]["voxel_size"] == 1
        assert "class activation" not in variants_of(recipe)
        assert found["concat"].model["config"]["fusion_type"] == "concat"
