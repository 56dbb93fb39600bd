"""The command line: what it prints, and how it ends on bad input (one line, exit code 2, no traceback)."""

import json
import sys

import pytest
import yaml
from crossmodal.training import cli
from world import TINY_RECIPE, color_rows, picture


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data, a recipe, and the model it trained by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    data = folder / "data"
    data.mkdir()
    color_rows(48).to_parquet(data / "train.parquet")
    color_rows(12).to_parquet(data / "validation.parquet")
    values = TINY_RECIPE | {"dataset": "data", "output_dir": "out"}
    values["training"] = values["training"] | {"num_train_epochs": 6}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    picture().save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "empty").mkdir()
    return folder


def run(*arguments):
    """Exit code of `crossmodal ...` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["crossmodal", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


@pytest.fixture(scope="module")
def model(world):
    code = run("train", world / "tiny.yaml", f"dataset={world / 'data'}", f"output_dir={world / 'model'}", "--json")
    assert code == 0
    return world / "model"


def test_evaluate_prints_one_json_object_last(model, world, capsys):
    assert run("evaluate", model, "--dataset", world / "data", "--split", "validation", "--json") == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(metrics) == {"accuracy", "vqa_accuracy"} and metrics["accuracy"] > 0.9


def test_evaluate_takes_a_file_by_path(model, world, capsys):
    file = world / "data" / "validation.parquet"
    assert run("evaluate", model, "--dataset", file, "--split", "test", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["vqa_accuracy"] > 0.9


def test_predict_answers_with_scores_and_weights(model, world, capsys):
    assert run("predict", model, "--image", world / "red.png", "--text", "what color is this?", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["answers"][0]["answer"] == "red" and set(found["modality_weights"]) == {"vision", "text"}
    assert run("predict", model, "--image", world / "red.png", "--text", "what color is this?", "--top-k", 1) == 0
    assert "red" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(model, world, capsys):
    before = (model / "model.safetensors").read_bytes()
    assert run("train", world / "tiny.yaml", f"dataset={world / 'data'}", f"output_dir={model}") == 0
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "vqa_eazy"], "vqa_easy"),
        (["train", "vqa_easy", "datset=x"], "Did you mean 'dataset'"),
        (["train", "vqa_easy", "dataset={w}/nowhere.parquet", "output_dir={w}/o1"], "does not exist"),
        (["train", "vqa_easy", "dataset={w}/empty", "output_dir={w}/o2"], "is empty"),
        (["train", "nowhere.yaml"], "does not exist"),
        (["explain", "{m}"], "nothing to explain"),
        (["explain", "{m}", "--text", "what?", "--dataset", "{w}/data"], "or else --dataset"),
        (
            ["explain", "{m}", "--text", "what?", "--word", "horse", "--output", "{w}/no.png"],
            "the text has no word 'horse'",
        ),
        (["explain", "{m}", "--array", "x=nowhere.npy"], "Expected NAME=FILE.npy"),
        (["evaluate", "{w}/empty", "--dataset", "{w}/data"], "no config.json"),
        (["evaluate", "{w}/nowhere", "--dataset", "{w}/data"], "neither a folder here nor a repo"),
        (["evaluate", "{m}", "--dataset", "{w}/data", "--split", "test"], "no split 'test'"),
        (["evaluate", "{m}", "--dataset", "{w}/data", "--rerank", "8"], "rerank does not go with CrossModalForVQA"),
        (["predict", "{m}"], "nothing to predict from"),
        (["predict", "{m}", "--image", "{w}/broken.png", "--text", "what color?"], "broken.png"),
        (["predict", "{m}", "--image", "{w}/red.png", "--text", ""], "at least one word"),
        (["predict", "{m}", "--image", "{w}/missing.png", "--text", "what color?"], "missing.png"),
        (["predict", "{m}", "--imag", "x"], "No such option"),
    ],
)
def test_bad_input_ends_with_one_clear_line_and_exit_code_2(model, world, capsys, arguments, said):
    code = run(*(str(a).format(w=world, m=model) for a in arguments))
    error = capsys.readouterr().err
    assert code == 2, error
    assert said in error and "Traceback" not in error


def test_labels_outside_the_vocabulary_are_refused_unless_they_may_be_wrong(model, world, capsys):
    rows = color_rows(6)
    answers = ["mauve", *rows["answer"][1:]]
    rows.remove_columns("answer").add_column("answer", answers).to_parquet(world / "mauve.parquet")
    assert run("evaluate", model, "--dataset", world / "mauve.parquet") == 2
    assert "'mauve' of row 0 is outside" in capsys.readouterr().err
    assert run("evaluate", model, "--dataset", world / "mauve.parquet", "--unknown-answers-wrong", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == pytest.approx(5 / 6)


def test_a_fault_of_ours_is_not_dressed_up_as_bad_input(monkeypatch):
    def broken(*args):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "load_model", broken)
    monkeypatch.setattr(sys, "argv", ["crossmodal", "predict", "x", "--text", "y"])
    with pytest.raises(KeyError):
        cli.main()


def test_explain_draws_one_answer_or_tests_by_deletion(model, world, capsys):
    out = world / "why.png"
    asked = ["--image", world / "red.png", "--text", "what color is this?", "--word", "color", "--output", out]
    assert run("explain", model, *asked, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["answers"][0][0] == "red" and out.is_file()
    assert run("explain", model, "--dataset", world / "data", "--json") == 0
    tables = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tables.keys() == {"vision", "text"} and [row["fraction"] for row in tables["text"]] == [0.1, 0.2, 0.3, 0.5]


def test_benchmark_of_an_unknown_size_is_refused(capsys):
    assert run("benchmark", "--size", "huge") == 2
    assert "Expected one of ['base', 'tiny']" in capsys.readouterr().err


def test_benchmark_of_kernels_prints_table_growth_and_errors(monkeypatch, capsys):
    from crossmodal.training import benchmark

    real = benchmark.kernels
    monkeypatch.setattr(benchmark, "kernels", lambda write: real(lengths=(64, 128), device="cpu", write=write))
    monkeypatch.setattr(benchmark, "feature_errors", lambda: {"exact output": 0.03, 64: 0.01})
    over_time = benchmark.fusion_over_time
    monkeypatch.setattr(benchmark, "fusion_over_time", lambda rounds: over_time(64, 48, 4, 16, 2, rounds, "cpu"))
    assert run("benchmark", "--kernels", "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert [row["kernel"] for row in found["clips"]] == ["exact", "window"]
    assert all(row["training_seconds"] > row["forward_seconds"] > 0 for row in found["clips"])
    assert {row["kernel"] for row in found["kernels"]} >= {
        "exact",
        "window",
        "linear",
    }
    assert "linear: time grows with the power" in printed.err
    assert run("benchmark", "seed=1") == 2
    assert "Name one with --cached RECIPE or --train RECIPE" in capsys.readouterr().err


@pytest.mark.parametrize("columns, others", ((3, 1), (12, 1), (13, 1), (20, 1), (20, 19)))
def test_a_table_shows_every_number_whole_however_many_there_are(columns, others, capsys):
    from crossmodal.training.console import print_table

    labels = ["this model, embeddings", *(f"contender {n}" for n in range(others))]
    rows = {label: {f"i2t_r{n}": 40.125 + n for n in range(columns)} for label in labels}
    rows["contender 0"]["mean_r1"] = 1.875
    print_table("validation", rows)
    out = capsys.readouterr().out
    assert "…" not in out and "1.875" in out
    assert [out.count(f"{40.125 + n:.3f}") for n in range(columns)] == [len(labels)] * columns
    assert others > 1 or max(map(len, out.splitlines())) <= 120
