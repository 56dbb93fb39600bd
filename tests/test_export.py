"""Exported graphs: they say what the model says, on rows of other sizes and with any modality missing; and what is refused."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from crossmodal.modeling.fusion_crossmodal import FUSIONS
from crossmodal.training import cli, export, profiling
from test_modeling import lively
from world import color_rows, picture, run_as_stranger, tiny_processor_and_model

from crossmodal import CrossModalConfig, CrossModalForCaptioning, CrossModalForRetrieval, CrossModalForVQA


FORMS = {"torch": (export.to_torch, export.run_torch), "onnx": (export.to_onnx, export.run_onnx)}
# ViT and BERT; MobileNetV2 and BERT; two sequences of features.
PAIRS = {"vit": ("vit", "bert"), "mobilenet_v2": ("mobilenet_v2", "bert"), "features": ("crossmodal_features",) * 2}


def model_of(pair, head=CrossModalForVQA, **overrides):
    torch.manual_seed(0)
    names = ("one", "two") if pair == "features" else ("vision", "text")
    modalities = {name: zoo.tiny_encoder(kind)[0] for name, kind in zip(names, PAIRS[pair], strict=True)}
    if pair == "features":
        modalities = {name: {**entry, "num_hidden_layers": 1} for name, entry in modalities.items()}
    config = CrossModalConfig(
        modalities=modalities, **{**zoo.TINY, "num_fusion_layers": 1, "num_labels": 5, **overrides}
    )
    return lively(head(config)).eval()


def batch_of(model, rows, length=6, missing=False):
    """Rows of all modalities, sequences of `length` with padding in the first; or each modality missing in one row."""
    config = model.config
    batch = zoo.tiny_batch(config, rows, seed=rows)
    for name in config.modality_names:
        if config.modality_settings[name]["type"] != "vision":
            values, mask = config.input_keys(name)
            batch[values], batch[mask] = batch[values][:, :length], torch.ones(rows, length, dtype=torch.long)
            batch[mask][0, -1] = 0
    if missing:
        batch["modality_mask"] = ~torch.eye(rows, len(config.modality_names), dtype=torch.bool)
    return batch


def largest_difference(model, form, folder, **options):
    """Of the graph of a classifier from the model, over batches of several sizes."""
    (graph,) = export.graphs_of(model, batch_of(model, 3), **options)
    write, load = FORMS[form]
    path = folder / f"graph{export.SUFFIXES[form]}"
    write(graph, path)
    run = load(path)
    sizes = [(1, 4), (4, 5)]
    batches = [batch_of(model, rows, length) for rows, length in sizes]
    if "modality_mask" in graph.example:
        batches.append(batch_of(model, 4, 3, missing=True))
    return max(export.difference(run, graph, graph.inputs(batch)) for batch in batches)


@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_every_fusion_is_exported_with_free_sizes_and_absences(fusion_type, tmp_path):
    assert largest_difference(model_of("features", fusion_type=fusion_type), "torch", tmp_path) < export.TOLERANCE


@pytest.mark.parametrize("pair", [pytest.param("vit", marks=pytest.mark.slow), "mobilenet_v2"])
def test_images_and_words_are_exported(pair, tmp_path):
    assert largest_difference(model_of(pair), "torch", tmp_path) < export.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("fusion_type", FUSIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_fusion_is_exported_to_onnx(pair, fusion_type, tmp_path):
    assert largest_difference(model_of(pair, fusion_type=fusion_type), "onnx", tmp_path) < export.TOLERANCE


@pytest.mark.slow
def test_rows_that_lack_nothing_need_no_modality_mask(tmp_path):
    model = model_of("vit")
    (graph,) = export.graphs_of(model, batch_of(model, 3), absences=False)
    assert "modality_mask" not in graph.example
    assert largest_difference(model, "onnx", tmp_path, absences=False) < export.TOLERANCE


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("window", {}),
        ("linear", {}),
        pytest.param("latents", {}, marks=pytest.mark.slow),
        ("exact", {"max_tokens": 3}),
    ],
)
def test_kernels_and_averaged_tokens_are_exported(kernel, options, tmp_path):
    entry = {"config": {**zoo.tiny_encoder("crossmodal_features")[0], "num_hidden_layers": 1}, **options}
    config = CrossModalConfig(
        modalities={"one": entry}, attention_kernel=kernel, attention_window=1, num_labels=5,
        **{**zoo.TINY, "num_fusion_layers": 1},
    )  # fmt: skip
    assert largest_difference(lively(CrossModalForVQA(config)).eval(), "torch", tmp_path) < export.TOLERANCE


def test_embeddings_have_a_graph_for_each_modality(tmp_path):
    model = model_of("features", CrossModalForRetrieval, projection_dim=8)
    graphs = export.graphs_of(model, batch_of(model, 3))
    assert [graph.name for graph in graphs] == ["one", "two"]
    assert [list(graph.example) for graph in graphs] == [["one_values", "one_mask"], ["two_values", "two_mask"]]
    for graph in graphs:
        export.to_torch(graph, tmp_path / "graph.pt2")
        run, batch = export.run_torch(tmp_path / "graph.pt2"), graph.inputs(batch_of(model, 5, 4))
        expected = model.get_modality_features(graph.name, **batch)
        torch.testing.assert_close(run(batch)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_embeddings_of_images_and_texts_are_exported_to_onnx(tmp_path):
    processor, found = tiny_processor_and_model()
    torch.manual_seed(0)
    model = lively(CrossModalForRetrieval(found.config)).eval()
    report = export.export_model(model, processor, tmp_path / "graphs", int8=True, write=lambda line: None)
    assert list(report) == ["vision.onnx", "vision_int8.onnx", "text.onnx", "text_int8.onnx"]
    batch = dict(processor(text=["what color is this?", "red"]))
    (found,) = export.run_onnx(tmp_path / "graphs" / "text.onnx")(batch)
    torch.testing.assert_close(found, model.get_text_features(**batch), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(processor, model, folder of its ONNX graphs in float32 and int8, report)."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    processor, model = tiny_processor_and_model(num_fusion_layers=1)
    lively(model)
    report = export.export_model(model, processor, folder / "graphs", int8=True, write=lambda line: None)
    return processor, model, folder / "graphs", report


def test_onnx_folder_says_what_the_model_says(exported):
    processor, model, folder, report = exported
    assert report["model.onnx"]["difference"] < export.TOLERANCE < report["model_int8.onnx"]["difference"] < 0.2
    assert report["model_int8.onnx"]["mib"] < 0.7 * report["model.onnx"]["mib"]
    config = json.loads((folder / "export_config.json").read_text())
    assert config["id2label"] == {"0": "red", "1": "green", "2": "blue"} and config["head"] == "CrossModalForVQA"
    inputs = config["graphs"]["model"]["inputs"]
    assert inputs["pixel_values"] == {"dtype": "float32", "shape": ["batch", 3, 32, 32]}
    assert inputs["attention_mask"] == {"dtype": "int64", "shape": ["batch", "text_length"]}
    assert inputs["modality_mask"] == {"dtype": "bool", "shape": ["batch", 2]}
    # Longer than anything that was traced or checked, with an absence.
    batch = dict(processor(images=[picture(), None], text=["what color is this? " * 4] * 2))
    with torch.no_grad():
        expected = model(**batch)
    found = export.run_onnx(folder / "model.onnx")(batch)
    torch.testing.assert_close(found[0], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected.modality_weights, rtol=1e-4, atol=1e-5)


def test_readme_of_an_export_runs_without_the_code_of_the_model(exported, tmp_path):
    processor, model, folder, _ = exported
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    picture().save(tmp_path / "image.png")
    code = code.replace('folder = "."', f"folder = {str(folder)!r}") + "\nprint(logits[0].tolist())"
    assert "onnxruntime" in code and "AutoProcessor" in code
    found = json.loads(run_as_stranger(code, cwd=tmp_path).splitlines()[-1])
    batch = processor(images=[picture()], text=["what is this?"])
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**batch).logits[0], rtol=1e-4, atol=1e-5)


def holds_a_path(data):
    return any(str(Path(module.__file__).parents[1]).encode() in data for module in (export, torch))


def test_no_path_of_this_machine_is_in_an_onnx_folder(exported):
    assert not any(holds_a_path(path.read_bytes()) for path in exported[2].iterdir())


def test_what_writes_or_has_no_head_is_refused():
    decoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 30,
    }
    model = CrossModalForCaptioning(zoo.tiny_config("vision", decoder_config=decoder))
    with pytest.raises(ValueError, match="writes word by word.*no graph holds its `generate`"):
        export.graphs_of(model, zoo.tiny_batch(model.config))
    with pytest.raises(ValueError, match="CrossModalModel neither embeds nor classifies"):
        export.graphs_of(model_of("features").crossmodal, {})


def test_an_encoder_that_looks_at_its_values_is_named(tmp_path):
    class Peeking(torch.nn.Module):
        level_sizes = [6]

        def forward(self, values, mask):
            return [values if values.sum() > 0 else -values], mask

    model = CrossModalForVQA.from_encoders(one={"model": Peeking(), "type": "features"}, num_labels=5, **zoo.TINY)
    (graph,) = export.graphs_of(model, {"one_values": torch.randn(2, 4, 6), "one_mask": torch.ones(2, 4).bool()})
    for write, _ in FORMS.values():
        with pytest.raises(ValueError, match="'model' cannot be exported: .*decides by the values"):
            write(graph, tmp_path / "graph")
    assert not any(tmp_path.iterdir())


def test_a_graph_that_says_otherwise_is_not_kept(tmp_path, monkeypatch):
    processor, model = tiny_processor_and_model(num_fusion_layers=1)
    written = []
    monkeypatch.setattr(export, "to_torch", lambda graph, path: written.append(path.write_bytes(b"")))
    monkeypatch.setattr(
        export, "run_torch", lambda path: lambda inputs: [v + 0.01 for v in model_outputs(model, inputs)]
    )
    with pytest.raises(ValueError, match="model.pt2 gives other outputs than the model: they differ by"):
        export.export_model(model, processor, tmp_path / "graphs", "torch", write=lambda line: None)
    assert written and not any(tmp_path.iterdir())


def model_outputs(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.logits, output.modality_weights


def run(*arguments):
    """Exit code of `crossmodal ...` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["crossmodal", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


def test_command_measures_the_graphs_beside_the_model(tmp_path, capsys):
    processor, model = tiny_processor_and_model(num_fusion_layers=1)
    lively(model).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    color_rows(24).to_parquet(tmp_path / "validation.parquet")
    arguments = ("export", tmp_path / "model", "--output", tmp_path / "graphs", "--format", "torch", "--json")
    assert run(*arguments, "--dataset", tmp_path, "--limit", 16, "--batch-size", 8, "--rounds", 1) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(said["files"]) == {"model.pt2"}
    own, graph = said["measured"]
    assert (own["model"], graph["model"]) == ("model, float32", "torch.export, float32")
    assert own["accuracy"] == graph["accuracy"] and min(own["samples_per_second"], graph["mib"]) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "graphs", "validation.parquet"}
    with zipfile.ZipFile(tmp_path / "graphs" / "model.pt2") as archive:
        assert not any(holds_a_path(archive.read(name)) for name in archive.namelist())
    # Bad input: a folder of something else, a form that nobody knows, a dataset that is not there.
    for given, words in (
        (("--output", tmp_path / "model"), "holds something else than an export"),
        (("--output", tmp_path / "new", "--format", "gguf"), "--format gguf is unknown"),
        (("--output", tmp_path / "new", "--dataset", tmp_path / "nowhere"), "nowhere"),
    ):
        assert run("export", tmp_path / "model", *given) == 2
        assert words in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "new").exists()


def test_torch_int8_loads_by_from_pretrained_and_is_near(tmp_path):
    pytest.importorskip("torchao")
    processor, model = tiny_processor_and_model(num_fusion_layers=1)
    report = export.export_model(model, processor, tmp_path / "graphs", "torch", int8=True, write=lambda line: None)
    assert report["int8"]["difference"] < 0.2 and report["int8"]["mib"] < 0.7 * report["model.pt2"]["mib"]
    again = CrossModalForVQA.from_pretrained(tmp_path / "graphs" / "int8").eval()
    batch = dict(processor(images=[picture()], text=["what color is this?"]))
    with torch.no_grad():
        assert (again(**batch).logits - model(**batch).logits).abs().max() < 0.2


def test_profile_prints_time_and_memory_by_batch_and_what_fits(capsys):
    assert run("profile", "tiny", "--batch", 2, "--batch", 1, "--words", 4, "--memory", "4GiB", "--json") == 0
    out, err = capsys.readouterr()
    (found,) = json.loads(out.splitlines()[-1])
    model = CrossModalForVQA(CrossModalConfig.from_preset("tiny"))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert [row["batch"] for row in found["rows"]] == [1, 2] and "4GiB hold a batch of" in err
    for row in found["rows"]:
        assert row["step_ms"] > row["forward_ms"] > 0
        # Weights, gradients and two moments, and what is above.
        assert row["step_mib"] > 3.9 * found["weights_mib"] and row["forward_mib"] >= found["weights_mib"]
    assert run("profile", "tinny") == 2 and "'tinny' is not among the models" in capsys.readouterr().err
    assert (
        run("profile", "tiny", "--memory", "8") == 2 and "Expected a number with MiB or GiB" in capsys.readouterr().err
    )


def test_batches_that_would_not_fit_are_left_out_of_a_profile(monkeypatch):
    monkeypatch.setattr(profiling, "_free", lambda device: 0.0)
    said = []
    found = profiling.profile("tiny", (1, 2, 4), 4096, words=4, device="cpu", write=said.append)
    assert [row["forward_ms"] is None for row in found["rows"]] == [False, True, True]
    assert "would take" in said[1] and "0 are free" in said[1] and found["largest_step"] is None


def test_the_largest_batch_lies_on_the_line_of_the_peaks():
    assert profiling.largest_batch([(1, 110.0), (8, 180.0), (32, 420.0)], 1100) == 100
    assert profiling.largest_batch([(1, 110.0), (8, 180.0)], 50) == 0
    assert profiling.mebibytes("1.5GiB") == 1536 and profiling.mebibytes("512 MiB") == 512
