"""Ablations: variants are config keys, runs are resumed, the table is paired by seed."""

import copy
import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from crossmodal.training import ablate as module
from crossmodal.training.ablate import VARIANTS, ablate, summarise, variants_of
from crossmodal.training.building import config_of, encoders_and_config
from crossmodal.training.recipes import Recipe
from crossmodal.training.tasks import TASKS
from crossmodal.training.train import train
from crossmodal.training.warm_up import stage_of
from killing import at_work_in
from PIL import Image
from test_modeling import lively
from world import TINY_RECIPE, color_rows

import crossmodal
from crossmodal import CrossModalForVQA, configs


def recipe(folder, **changes):
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": "rows", "output_dir": str(folder), "name": "colors"}
    values["training"] |= {"num_train_epochs": 1}
    return Recipe(**values | changes)


def test_a_variant_is_one_key_of_the_config(tmp_path):
    run = recipe(tmp_path)
    variants = variants_of(run)
    assert list(variants) == [*VARIANTS, "vision alone", "text alone"]
    for name, change in VARIANTS.items():
        assert variants[name].model["config"] == run.model["config"] | change
        assert variants[name].model["encoders"] == run.model["encoders"]
    assert list(variants["text alone"].model["encoders"]) == ["text"]
    chosen = variants_of(run, ["hidden_dropout=0.5", "concat"])
    assert list(chosen) == ["full", "hidden_dropout=0.5", "concat"]
    assert chosen["hidden_dropout=0.5"].model["config"]["hidden_dropout"] == 0.5
    several = "modality_dropout={vision: 0.2, text: 0.1} gate=none"
    config = variants_of(run, [several])[several].model["config"]
    assert config["modality_dropout"] == {"vision": 0.2, "text": 0.1} and config["gate"] == "none"
    with pytest.raises(ValueError, match="the variant 'gate={a' has a value that is no YAML"):
        variants_of(run, ["gate={a"])
    with pytest.raises(ValueError, match="'conct' is no variant. Expected some of \\['concat'"):
        variants_of(run, ["conct"])


RECIPES = sorted(path.stem for path in (Path(configs.__file__).parent / "training").glob("*.yaml"))
WINDOW = ["joint", "mutual", "bottleneck"]
ONE = ["no cross-attention", "uniform weights", "interlaced"]
ONE_LAYER = ["single level"]
POINTS = ["single level", "concat", "joint", "interlaced", "mutual", "bottleneck", "vision alone"]
LEFT_OUT = {
    "captioning_coco": ONE,
    "captioning_fashion": ONE,
    "classification_clips": [*WINDOW, "audio alone", "video alone"],
    "classification_deap": [*ONE, *ONE_LAYER],
    "classification_digits": ONE_LAYER,
    "classification_eeg": [*ONE, *ONE_LAYER],
    "classification_mosi": ["no cross-attention", "uniform weights", "concat"],
    "classification_spoken_digits": [*ONE, *ONE_LAYER],
    "retrieval_clips": [*WINDOW, "audio alone", "video alone"],
    "retrieval_coco": ["vision alone", "text alone"],
    "retrieval_digits": [*ONE_LAYER, "audio alone", "vision alone"],
    "retrieval_fashion": ["vision alone", "text alone"],
    "retrieval_flickr30k": ["vision alone", "text alone"],
    "segmentation_driving": POINTS,
    "segmentation_room": POINTS,
}


@pytest.mark.parametrize("name", RECIPES)
def test_variants_of_every_recipe_are_checked_without_the_network(name, monkeypatch):
    def connect(*arguments):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", connect)
    loaded, lines = Recipe.load(name), []
    found = variants_of(loaded, write=lines.append)
    alone = [f"{m} alone" for m in encoders_and_config(loaded)[0]]
    every = list(loaded.variants) or [*VARIANTS, *(alone if len(alone) > 1 else [])]
    left_out = LEFT_OUT.get(name, [])
    assert list(found) == [each for each in dict.fromkeys(["full", *every]) if each not in left_out]
    said = [line.partition(" is left out: ")[0] for line in lines if " is left out: " in line]
    assert sorted(said) == sorted(map(repr, left_out))
    # What is left serves the head of the task.
    for run in found.values():
        getattr(crossmodal, TASKS[run.task].model_class).check_config(config_of(run))
    if loaded.compare:
        assert list(variants_of(loaded, loaded.compare)) == ["full", *loaded.compare]


@pytest.mark.parametrize(
    ("changes", "chosen", "said"),
    [
        (
            {},
            "fusion_type=crosss",
            "the variant 'fusion_type=crosss' cannot be trained: fusion_type='crosss' is unknown",
        ),
        ({}, "fusion_typ=concat", "fusion_typ='concat' is not a key|fusion_typ is no field of CrossModalConfig"),
        ({}, "fusoin=concat", "model.config.fusoin is no field of CrossModalConfig"),
        ({}, "hidden_size=wide", "'hidden_size=wide' cannot be trained: .*hidden_size"),
        ({}, "fusion_type=cross", "'fusion_type=cross' cannot be trained: it is 'full' again"),
        ({"config": {"fusion_type": "joint"}}, "no cross-attention", "cannot be trained: gate='closed'"),
        ({"config": {"attention_kernel": "linear"}}, "mutual", "'mutual' is exact attention"),
        ({"task": "retrieval"}, "text alone", "'text alone' cannot be trained: CrossModalForRetrieval compares"),
    ],
)
def test_a_variant_that_was_named_and_cannot_be_trained_is_refused_before_any_run(changes, chosen, said, tmp_path):
    run = recipe(tmp_path)
    run = replace(run, task=changes.get("task", run.task))
    run.model["config"] |= changes.get("config", {})
    with pytest.raises(ValueError, match=said):
        ablate(run, ["concat", chosen], 1, color_rows(24), color_rows(12))
    assert not list(tmp_path.iterdir())
    # As one of the recipe's own, and where it is to stand beside a run.
    if "=" in chosen:
        key, _, value = chosen.partition("=")
        with pytest.raises(ValueError, match="the variant 'mine' cannot be trained"):
            variants_of(replace(run, variants={"mine": {f"model.config.{key}": value}}))
    with pytest.raises(ValueError, match=said):
        train(replace(run, output_dir=str(tmp_path / "run"), compare=[chosen]), color_rows(24), color_rows(12))
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_operators_without_a_gate_are_compared_with_concat_instead_and_nothing_is_trained_twice(tmp_path):
    run, lines = recipe(tmp_path), []
    run.model["config"] |= {"fusion_type": "bottleneck", "bottleneck": "resample"}
    found = variants_of(run, write=lines.append)
    assert found["no cross-attention"].model["config"]["fusion_type"] == "concat"
    assert "gate" not in found["no cross-attention"].model["config"]
    assert (
        not {"concat", "bottleneck"} & found.keys()
        and "'concat' is left out: it is 'no cross-attention' again" in lines
    )
    assert lines[0].startswith("'no cross-attention' is fusion_type='concat' here: gate='closed'")


def test_a_lone_modality_has_nothing_said_by_the_names_of_others(tmp_path):
    by_name = {"modality_dropout": {"vision": 0.1, "text": 0.2}, "modality_prior": {"vision": 0.5, "text": 1.0}}
    by_name |= {"fusion_queries": ["text"], "first_query": "text", "fusion_type": "interlaced"}
    stage = {"dataset": "drawn:shape_facts", "modalities": ["vision"], "keep": ["vision"]}
    stage["config"] = {"modality_dropout": {"vision": 0.1}, "fusion_type": "concat", "first_query": None}
    run = recipe(tmp_path, warm_up=[stage])
    run.model["config"] |= by_name
    alone = variants_of(run, ["vision alone", "text alone"])["vision alone"]
    config = config_of(alone)
    assert (config.modality_dropout, config.modality_prior) == ({"vision": 0.1}, {"vision": 0.5})
    assert (config.fusion_queries, config.first_query, config.fusion_type) == (None, None, "concat")
    stages = [config_of(stage_of(each, each.warm_up[0])) for each in (run, alone)]
    assert [stage.modality_prior for stage in stages] == [{"vision": 0.5}] * 2


def test_a_stage_that_hands_over_its_fusion_has_that_of_the_variant():
    found = variants_of(Recipe.load("classification_clips"), ["concat", "hidden_dropout=0.3"])
    for name, key, value in (("full", "fusion_type", "cross"), ("concat", "fusion_type", "concat")):
        stage = found[name].warm_up[0]
        assert stage["keep"] == ["audio", "video", "fusion"] and stage["config"] == {"projection_dim": 128}
        assert getattr(config_of(stage_of(found[name], stage)), key) == getattr(config_of(found[name]), key) == value
    assert config_of(stage_of(found["hidden_dropout=0.3"], stage)).hidden_dropout == 0.3


def test_what_cannot_be_known_without_the_network_is_no_reason_to_refuse(tmp_path):
    run, lines = recipe(tmp_path), []
    # Whether this is a sound, which the kernel serves, or an image, which it does not, only its config would tell.
    run.model["encoders"] = {"left": "nobody/left", "right": {"model": "nobody/right", "type": "vision"}}
    run.model["config"] |= {"attention_kernel": "window"}
    found = variants_of(run, ["concat", "gate=clsoed"], lines.append)
    assert list(found) == ["full", "concat", "gate=clsoed"]
    assert len(lines) == 1 and lines[0].startswith(
        "variants are not checked beforehand, for the encoders of ['left', 'right']"
    )
    run.model["encoders"]["right"] = {"model": "nobody/right", "type": "audio"}
    with pytest.raises(ValueError, match="gate='clsoed' is unknown"):
        variants_of(run, ["concat", "gate=clsoed"])
    run.model["encoders"] = TINY_RECIPE["model"]["encoders"]
    with pytest.raises(ValueError, match="attention_kernel='window' needs tokens in order"):
        variants_of(run, ["concat"])


def test_a_recipe_names_variants_of_any_of_its_keys(tmp_path):
    other = {"model_type": "vit", "image_size": 32, "patch_size": 8}
    named = {"with ViT": {"model.encoders.vision": other}, "slow": {"training.learning_rate": 1e-5, "seed": 3}}
    run = recipe(tmp_path, variants=named)
    variants = variants_of(run)
    assert list(variants) == ["full", "with ViT", "slow"] and not any(each.variants for each in variants.values())
    assert variants["with ViT"].model["encoders"] == {"vision": other, "text": run.model["encoders"]["text"]}
    assert (variants["slow"].training["learning_rate"], variants["slow"].seed) == (1e-5, 3)
    assert run.training["learning_rate"] == 3e-3 and variants["full"].model == run.model
    assert list(variants_of(run, ["slow", "concat"])) == ["full", "slow", "concat"]
    with pytest.raises(ValueError, match="'modle' is no key of a recipe"):
        variants_of(recipe(tmp_path, variants={"wrong": {"modle.preset": "tiny"}}))
    with pytest.raises(ValueError, match="variants: 'wrong' is 'tiny'. Expected keys and their values"):
        recipe(tmp_path, variants={"wrong": "tiny"})


def test_stages_that_hand_over_nothing_of_a_lone_modality_fall_away(tmp_path):
    see = {"dataset": "drawn:shape_facts", "modalities": ["vision"], "keep": ["vision"], "config": {"pooling": "mean"}}
    both = {"dataset": "drawn:shapes"}
    variants = variants_of(recipe(tmp_path, warm_up=[see, both]))
    assert variants["text alone"].warm_up == [both]
    for name in ("full", "vision alone", "concat"):
        first, second = variants[name].warm_up
        assert second == both and first.items() >= (see | {"config": first["config"]}).items()
        # The first stage has a model of its own: what a variant changes is as in `full` there.
        assert first["config"] == {
            "pooling": "mean",
            "fusion_type": "cross",
            "fusion_levels": "multi",
            "gate": "content",
            "modality_weighting": "adaptive",
        }


def test_a_closed_gate_keeps_streams_apart_and_builds_nothing_for_them():
    model = lively(CrossModalForVQA(zoo.tiny_config(gate="closed"))).eval()
    assert not any("cross_attn" in name or "gate" in name for name, _ in model.named_parameters())
    batch = zoo.tiny_batch(model.config)
    changed = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    before, after = (
        model.crossmodal(**inputs, output_hidden_states=True).modality_tokens for inputs in (batch, changed)
    )
    torch.testing.assert_close(before["text"], after["text"], rtol=0, atol=0)
    assert not torch.equal(before["vision"], after["vision"])


def test_the_table_is_paired_by_seed():
    scores = {("full", 1): 0.8, ("full", 2): 0.6, ("concat", 1): 0.7, ("concat", 2): 0.5}
    results = {key: {"metrics": {"accuracy": value}, "parameters": 7} for key, value in scores.items()}
    full, concat = summarise(results, ["full", "concat"], [1, 2], "accuracy")
    assert full["mean"] == pytest.approx(0.7) and full["deviation"] == pytest.approx(0.1414, abs=1e-4)
    # Far apart over seeds, and yet the same difference in each.
    assert concat["difference"] == pytest.approx(-0.1) and concat["difference_deviation"] == pytest.approx(0)


def test_a_sweep_is_resumed_and_reported(tmp_path, monkeypatch):
    trained = []
    real = module.train

    def counted(run, **options):
        trained.append((run.name, run.seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(run, **options)

    monkeypatch.setattr(module, "train", counted)
    arguments = (["concat"], 2, color_rows(24), color_rows(12))
    with pytest.raises(KeyboardInterrupt):
        ablate(recipe(tmp_path / "sweep"), *arguments)
    assert trained == [("full", 42), ("concat", 42), ("full", 43)]
    table = ablate(recipe(tmp_path / "sweep"), *arguments)
    assert trained[3:] == [("full", 43), ("concat", 43)]
    assert [row["variant"] for row in table] == ["full", "concat"] and all(row["runs"] == 2 for row in table)
    assert table[0]["difference"] == 0 and table[0]["parameters"] > table[1]["parameters"]
    text = (tmp_path / "sweep" / "ablation.md").read_text()
    assert "| full |" in text and "| concat |" in text and "±" in text
    with open(tmp_path / "sweep" / "ablation.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("full", "42"),
        ("concat", "42"),
        ("full", "43"),
        ("concat", "43"),
    ]
    assert not list((tmp_path / "sweep").rglob("checkpoint-*"))
    with Image.open(tmp_path / "sweep" / "ablation.png") as plot:
        assert plot.width > 600
    # Another recipe is another run.
    ablate(recipe(tmp_path / "sweep", min_answer_count=2), *arguments)
    assert len(trained) == 9


def test_a_run_that_was_cut_off_makes_room_for_another_recipe_and_is_gone_on_with_by_its_own(tmp_path, monkeypatch):
    given = []
    real = module.train

    def cut_off(run, **options):
        real(replace(run, training={**run.training, "max_steps": 1, "save_steps": 1}), **options)
        (Path(run.output_dir) / "checkpoints" / "recipe.json").write_text(json.dumps(run.stated(("output_dir",))))
        raise KeyboardInterrupt

    def noted(run, **options):
        given.append(options["fresh"])
        return real(run, **options)

    arguments = (["full"], 1, color_rows(24), color_rows(12))

    def sweep(train, **changes):
        monkeypatch.setattr(module, "train", train)
        return ablate(recipe(tmp_path / "sweep", **changes), *arguments)

    with pytest.raises(KeyboardInterrupt):
        sweep(cut_off)
    assert sweep(noted, min_answer_count=2)[0]["runs"] == 1 and given == [True]
    # Beside the result of another recipe too, a run that was cut off is gone on with.
    with pytest.raises(KeyboardInterrupt):
        sweep(cut_off)
    sweep(noted)
    assert given == [True, False]


def test_reports_are_written_whole_by_the_main_process(tmp_path, monkeypatch):
    arguments = (["concat"], 1, color_rows(24), color_rows(12))
    ablate(recipe(tmp_path / "sweep"), *arguments)
    reports = [tmp_path / "sweep" / f"ablation.{kind}" for kind in ("md", "csv", "png")]
    written = [file.read_bytes() for file in reports]
    # Whoever reads while they are written anew has the old file open, and it stays as it was.
    handles = [file.open("rb") for file in reports]
    with monkeypatch.context() as context:
        context.setattr(module, "is_main", lambda: False)
        ablate(recipe(tmp_path / "sweep"), *arguments)
        assert [os.fstat(handle.fileno()).st_nlink for handle in handles] == [1, 1, 1]
    ablate(recipe(tmp_path / "sweep"), *arguments)
    assert [os.fstat(handle.fileno()).st_nlink for handle in handles] == [0, 0, 0]
    assert [file.read_bytes() for file in reports[:2]] == written[:2] == [handle.read() for handle in handles[:2]]
    assert not [file for file in (tmp_path / "sweep").iterdir() if file.name.startswith(".")]


def test_processes_share_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WAIT", 0.1)
    trained = []
    real = module.train

    def counted(run, **options):
        trained.append((run.name, run.seed))
        if len(trained) == 3:
            other.kill()
            other.wait()
        return real(run, **options)

    monkeypatch.setattr(module, "train", counted)
    sweep = tmp_path / "sweep"
    with at_work_in(sweep / "full" / "seed-42") as other:
        table = ablate(recipe(sweep), ["concat"], 2, color_rows(24), color_rows(12))
    # What the other process was at comes last, once that is gone.
    assert trained == [("concat", 42), ("full", 43), ("concat", 43), ("full", 42)]
    assert [row["variant"] for row in table] == ["full", "concat"] and all(row["runs"] == 2 for row in table)
    with open(sweep / "ablation.csv") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["full", "concat"] * 2


def test_the_first_stage_is_shared_by_runs_whose_stage_is_the_same(tmp_path, monkeypatch):
    color_rows(24).to_parquet(tmp_path / "other.parquet")
    stage = {"dataset": str(tmp_path / "other.parquet"), "modalities": ["vision"], "keep": ["vision"]}
    stage |= {"training": {"max_steps": 1}, "config": {"fusion_type": "concat"}}
    run = recipe(tmp_path / "sweep", warm_up=[stage])
    ablate(run, ["uniform weights", "vision alone"], 2, color_rows(24), color_rows(12))
    # One per seed, whatever the variant changes afterwards.
    assert len(list((tmp_path / "sweep" / "warm_up").iterdir())) == 2


def test_a_sweep_may_also_score_rows_that_lack_a_modality(tmp_path):
    run = recipe(tmp_path / "sweep")
    chosen = ["modality_dropout=0.4 missing_tokens=true", "text alone"]
    assert variants_of(run, chosen)[chosen[0]].model["config"]["missing_tokens"] is True
    full, dropped, alone = ablate(run, chosen, 1, color_rows(24), color_rows(12), missing_rate=1.0)
    assert full["missing"].keys() == dropped["missing"].keys() == {"vision", "text"} and "missing" not in alone
    assert full["missing"]["vision"]["loss"] == pytest.approx(full["mean"] - full["missing"]["vision"]["mean"])
    text = (tmp_path / "sweep" / "ablation.md").read_text()
    assert "| modality_dropout=0.4 missing_tokens=true | vision |" in text and "missing in 100% of rows" in text
    assert "vqa_accuracy, vision missing" in (tmp_path / "sweep" / "ablation.csv").read_text()
    # From cached tokens, the same rows lose the same.
    cached = recipe(tmp_path / "cached", token_cache=True, model=run.model | {"freeze": ["vision", "text"]})
    plain = recipe(tmp_path / "plain", model=run.model | {"freeze": ["vision", "text"]})
    scores = [ablate(r, ["full"], 1, color_rows(24), color_rows(12), missing_rate=0.5)[0] for r in (cached, plain)]
    assert scores[0]["missing"] == scores[1]["missing"]
