"""Two gloo ranks by torchrun against one process: losses, gradients, evaluation, and no hang where one rank lacks a modality."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from crossmodal.configs import accelerate_config
from test_cli import run
from world import TINY_RECIPE, color_rows


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two ranks found, once for all tests."""
    file = tmp_path_factory.mktemp("ranks") / "found"
    done = torchrun([ranks.__file__, file])
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{file}-{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    return ranks.everything()


def torchrun(arguments, launcher=("torch.distributed.run", "--standalone", "--nproc_per_node", "2")):
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def run_on_two(code, out, *arguments):
    """What `code` saved as `out` on two ranks; it is given the folder of the tests, `out` and the arguments."""
    script = out.with_suffix(".py")
    script.write_text(code)
    done = torchrun([script, Path(__file__).parent, out, *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def assert_same(found, expected, **close):
    for name, value in expected.items():
        there = found.get(name, torch.zeros_like(value))
        torch.testing.assert_close(there, value, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", [*ranks.COMPARED, "found unused"])
def test_losses_and_gradients_are_those_of_one_process_with_the_whole_batch(one, two, case):
    for rank in two:
        assert len(rank[case]["losses"]) == 2
        assert_same(rank[case], one[case], rtol=1e-4, atol=2e-6)


def test_ranks_of_the_second_step_count_unequally():
    """Else nothing above could fail."""
    for kind in ("ids", "numbers", "words"):
        labels = ranks.labels_of(kind)
        counts = ((labels != -100) & ~labels.isnan()).view(4, -1).sum(1)
        assert len(set(counts.tolist())) > 2, kind


@pytest.mark.parametrize("case", ranks.COMPARED)
def test_evaluation_counts_each_row_of_an_uneven_last_batch_once(one, two, case):
    expected = one[f"{case}, evaluated"]
    for rank in two:
        found = rank[f"{case}, evaluated"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for name in set(found) - {"loss"}:
            assert len(found[name]) == 7
        assert len({len(text) for text in found.get("texts", ["", "a"])}) > 1


def test_contrast_over_unequal_ranks_has_the_gradient_of_one_process_with_all_rows(one, two):
    assert len(one["contrast"]) > 300
    assert_same(two[0]["contrast"], one["contrast"], rtol=1e-4, atol=1e-6)


def test_pairs_are_matched_over_the_rows_of_all_ranks(one, two):
    """Also through the cache of gradients, which counts nothing twice."""
    assert len(one["matching"]) > 500
    for name in ("ranking", "classifier", "cosine"):
        assert one["matching"][f"{name}, False: loss"] == pytest.approx(one["matching"][f"{name}, True: loss"].item())
    assert_same(two[0]["matching"], one["matching"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", ranks.COMPARED)
def test_shards_of_layers_have_the_gradients_of_the_whole_model_though_one_rank_lacks_images(one, two, case):
    expected = one[f"{case}, sharded"]
    assert any(name.startswith("gradient_norm") for name in expected)
    assert_same(two[0][f"{case}, sharded"], expected, rtol=1e-4, atol=5e-6)


def test_an_epoch_of_unequal_parts_ends_on_all_ranks(two):
    losses = [rank["all losses"]["losses"] for rank in two]
    assert len(losses[0]) == 4 and losses[0].isfinite().all()
    assert torch.equal(*losses)


def test_processes_that_were_started_unlike_stop_with_one_message(one, two):
    (kind, said), (other_kind, _) = (rank["disagreed"]["config"] for rank in two)
    assert kind == "ValueError" and other_kind == "FailedElsewhere"
    assert "process 1 was started with config.intermediate_size = 48, and process 0 with 32" in said
    assert "config" not in one["disagreed"]


def test_what_stops_the_main_process_stops_all(two):
    assert [rank["disagreed"]["main"][0] for rank in two] == ["FileNotFoundError", "FailedElsewhere"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A recipe whose encoders see every row alone, with data that two processes share evenly in training and not in evaluation."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "data").mkdir()
    color_rows(24).to_parquet(folder / "data" / "train.parquet")
    color_rows(14).to_parquet(folder / "data" / "validation.parquet")
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": str(folder / "data"), "output_dir": str(folder / "out")}
    column = {
        key: values["model"]["encoders"]["text"][key]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    column |= {"intermediate_size": 64}
    values["model"]["encoders"]["vision"] = {"model_type": "vit", "image_size": 32, "patch_size": 8, **column}
    values["model"]["encoders"]["text"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values["model"]["config"]["classifier_dropout"] = 0.0
    values["training"] |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "optim": "sgd"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_the_command_line_trains_over_two_processes_as_in_one(tiny, capsys):
    launcher = ("accelerate.commands.launch", "--config_file", str(accelerate_config("ddp")), "--num_processes", "2")
    done = torchrun(["-m", "crossmodal.training.cli", "train", tiny / "tiny.yaml", "--json"], launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum("this model" in line for line in lines) == 1 == done.stderr.count("the model is in")
    two = json.loads(lines[-1])
    assert {"config.json", "model.safetensors", "README.md", "eval_results.json"} <= {
        p.name for p in (tiny / "out").iterdir()
    }
    whole = [f"output_dir={tiny / 'one'}", "per_device_train_batch_size=8", "--json"]
    assert run("train", tiny / "tiny.yaml", *whole) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-5) and one["majority"] == two["majority"]
    assert run("evaluate", tiny / "out", "--dataset", tiny / "data", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == two["metrics"]["accuracy"]


@pytest.mark.slow
def test_a_command_that_differs_between_processes_ends_with_one_line(tiny):
    command = (
        f"{sys.executable} -m crossmodal.training.cli train {tiny / 'tiny.yaml'} output_dir={tiny / 'none'} seed=$RANK"
    )
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python")
    done = torchrun(["bash", "-c", command], launcher)
    said = [line for line in done.stderr.splitlines() if line.startswith("crossmodal")]
    assert len(said) == 1 and "process 1 was started with recipe.seed = 1, and process 0 with 0" in said[0]
    assert done.returncode != 0 and not (tiny / "none").exists()


@pytest.mark.parametrize(
    ("name", "kind", "section"),
    [
        ("ddp", "MULTI_GPU", None),
        ("fsdp2", "FSDP", "fsdp_config"),
        ("deepspeed_zero2", "DEEPSPEED", "deepspeed_config"),
        ("deepspeed_zero3", "DEEPSPEED", "deepspeed_config"),
    ],
)
def test_accelerate_reads_the_configs_and_knows_every_key(name, kind, section):
    config = load_config_from_file(str(accelerate_config(name)))
    assert config.distributed_type == kind
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(getattr(config, section) if section else ()) <= set(known)
