"""From a folder to the Hub and back: whole, resumable, pinned, and without a word about the machine it comes from."""

import getpass
import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from crossmodal.training import cli
from crossmodal.training.building import train_tokenizer
from crossmodal.training.card import addressed, interval, pinned_revision, put_section
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import RowDataset
from crossmodal.training.hub import publish, repo_files
from crossmodal.training.leaks import find_leaks
from crossmodal.training.publish import export_folder
from crossmodal.training.recipes import Recipe
from crossmodal.training.robustness import add_to_folder
from crossmodal.training.seeds import train_seeds
from crossmodal.training.tasks import VQATask
from crossmodal.training.train import train
from hub import READ_TOKEN, TOKEN, running_hub
from scipy.stats import norm
from transformers import TrainingArguments, ViTConfig, ViTImageProcessorPil
from world import TINY_RECIPE, color_rows, picture, run_as_stranger, tiny_processor_and_model

from crossmodal import (
    CrossModalClassificationPipeline,
    CrossModalConfig,
    CrossModalForCaptioning,
    CrossModalForSequenceClassification,
    CrossModalForVQA,
    CrossModalProcessor,
    CrossModalTrainer,
    CrossModalVQAPipeline,
    TextDecoderConfig,
)


@pytest.fixture(autouse=True)
def someone(monkeypatch):
    """A user whose name is no word of any file."""
    monkeypatch.setattr(getpass, "getuser", lambda: "mallorywilson")


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path / "cache") as running:
        yield running


def classifier():
    processor, model = tiny_processor_and_model()
    return CrossModalForSequenceClassification(model.config).eval(), processor


def captioner():
    tokenizer = train_tokenizer(["a red picture", "a blue picture"], 60)
    decoder = TextDecoderConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    config = CrossModalConfig(
        modalities={"vision": vision}, hidden_size=32, num_attention_heads=4, decoder_config=decoder
    )
    model = CrossModalForCaptioning(config).eval()
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return model, CrossModalProcessor.from_config(config, image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_folder(*classifier(), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def run(*arguments):
    """Exit code of `crossmodal ...` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["crossmodal", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


_STRANGER = """
import json, sys
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
lines, image, found = json.loads(sys.argv[1]), Image.open(sys.argv[2]), {}
for repo, line in lines.items():
    # As the card has it, revision included.
    exec(line)
    found[repo] = pipe(image, text="", max_new_tokens=4) if "image-text" in line else pipe({"text": "which color?", "image": image})
    if repo.endswith("pipe"):
        continue
    base = AutoModel.from_pretrained(repo, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    assert base(**processor(images=image)).pooler_output.shape == (1, 32)
print(json.dumps(found))
"""


def test_strangers_load_what_was_published_or_pushed_by_its_id(hub, exported, tmp_path, capsys):
    writer, words = captioner()
    export_folder(writer, words, tmp_path / "writer")
    assert run("publish", exported, "ada/colors", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run("publish", tmp_path / "writer", "ada/writer", "--private") == 0
    assert [hub.repos[name]["private"] for name in ("ada/colors", "ada/writer")] == [False, True]
    model, processor = classifier()
    CrossModalClassificationPipeline(model=model, processor=processor).push_to_hub("ada/pipe")
    model.push_to_hub("ada/halves")
    processor.push_to_hub("ada/halves")
    lines = {}
    for repo in hub.repos:
        files = hub.files(repo)
        assert {"config.json", "model.safetensors", "processor_config.json", "pipeline_crossmodal.py"} <= files.keys()
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        card = files["README.md"].decode()
        assert f'"{repo}"' in card and "automatically generated" not in card and "path/or" not in card
        pinned = re.search(r"pipe = pipeline\(.*", card)
        # What is pushed without a run's folder says how its parts load.
        lines[repo] = (
            pinned[0] if pinned else f'pipe = pipeline("crossmodal-classification", "{repo}", trust_remote_code=True)'
        )
    first = dict(hub.commits("ada/colors"))[told["revision"]]
    assert first.keys() | {"README.md"} == hub.files("ada/colors").keys()
    assert told["revision"] in lines["ada/colors"] and "LICENSE" in first
    picture("blue").save(tmp_path / "blue.png")
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    given = (json.dumps(lines), tmp_path / "blue.png")
    said = run_as_stranger(_STRANGER, *given, cwd=tmp_path, HF_HUB_DISABLE_XET="1", **environment)
    found = json.loads(said.splitlines()[-1])
    here = CrossModalClassificationPipeline(model=model, processor=processor)
    expected = here({"text": "which color?", "image": picture("blue")})
    # The same seed made the model that is pushed and the one that was exported.
    for repo in ("ada/pipe", "ada/halves"):
        assert found[repo][0]["label"] == expected[0]["label"]
        assert found[repo][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-6)
    assert found["ada/colors"][0]["label"] in model.config.label2id and "generated_text" in found["ada/writer"][0]


def test_an_upload_that_was_cut_off_goes_on_and_sends_nothing_twice(hub, folder, capsys):
    picture().resize((200, 200)).save(folder / "confusion.png")
    hub.uploads_left = 1
    assert run("publish", folder, "ada/colors") == 2
    error = capsys.readouterr().err
    assert "The same command goes on where it was" in error and "Traceback" not in error
    assert len(hub.uploads) == 1 and list(hub.files("ada/colors")) == [".gitattributes"]
    hub.uploads_left = None
    assert run("publish", folder, "ada/colors") == 0
    assert len(hub.uploads) == len(set(hub.uploads)) == 2
    assert hub.files("ada/colors")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_publishing_again_commits_what_changed_and_nothing_else(hub, folder):
    first = publish(folder, "ada/colors")
    assert len(hub.commits("ada/colors")) == 3
    assert publish(folder, "ada/colors") == first and len(hub.commits("ada/colors")) == 3
    put_section(folder / "README.md", "## Limits", "None at all.")
    assert publish(folder, "ada/colors") == first and len(hub.commits("ada/colors")) == 4
    assert "None at all." in hub.files("ada/colors")["README.md"].decode()
    (folder / "recipe.yaml").write_text("task: classification\n")
    second = publish(folder, "ada/colors")
    assert second["revision"] != first["revision"] and len(hub.commits("ada/colors")) == 6
    assert pinned_revision(hub.files("ada/colors")["README.md"].decode()) == second["revision"]
    assert len(hub.uploads) == 1


def test_weights_of_before_do_not_stay_beside_those_of_now_and_branches_stay_apart(hub, folder):
    publish(folder, "ada/colors")
    hub.files("ada/colors")["model-00001-of-00002.safetensors"] = b"old"
    hub.files("ada/colors")["training_args.bin"] = b"old"
    hub.files("ada/colors")["notes.md"] = b"mine"
    publish(folder, "ada/colors")
    assert {name for name in hub.files("ada/colors") if name.endswith((".safetensors", ".bin"))} == {
        "model.safetensors"
    }
    assert "notes.md" in hub.files("ada/colors")
    (folder / "recipe.yaml").write_text("task: classification\n")
    for _ in range(2):
        found = publish(folder, "ada/colors", revision="next")
    assert "recipe.yaml" in hub.files("ada/colors", "next") and "recipe.yaml" not in hub.files("ada/colors")
    assert found["revision"] in hub.files("ada/colors", "next")["README.md"].decode()


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (TOKEN[:-1] + "x", "ada/colors", "does not take this token"),
        (READ_TOKEN, "bob/colors", "the token may not write to 'bob/colors'"),
        (TOKEN, "bob/colors", "the token may not write to 'bob/colors'"),
        ("", "ada/colors", "Log in with `hf auth login`, or set HF_TOKEN"),
        (TOKEN, "ada/no spaces", "ada/no spaces"),
    ],
)
def test_what_the_hub_refuses_ends_with_one_line_and_no_repo(
    hub, folder, capsys, monkeypatch, tmp_path, token, repo, said
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert run("publish", folder, repo) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") == 1
    assert hub.repos == {} and hub.uploads == []


def test_a_repo_that_is_not_there_and_one_that_is_not_shown_are_named(hub, capsys, monkeypatch):
    assert run("evaluate", "ada/nothing", "--dataset", "rows") == 2
    assert "'ada/nothing' is no repo that the Hub hands out" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run("evaluate", "ada/nothing", "--dataset", "rows") == 2
    assert "does not take this token" in capsys.readouterr().err


def test_a_dataset_that_is_not_there_is_named(hub, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert run("train", "vqa_easy", "dataset=ada/nothing", f"output_dir={tmp_path / 'out'}") == 2
    assert "'ada/nothing' is neither a folder or file here nor a dataset of the Hub" in capsys.readouterr().err


def test_without_a_connection_or_a_hub_one_line_says_so(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run("publish", folder, "ada/colors") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run("publish", folder, "ada/colors") == 2
    assert "the connection to the Hub broke" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_nothing_is_sent(hub, exported, tmp_path, capsys, monkeypatch):
    bare = shutil.copytree(exported, tmp_path / "bare", ignore=lambda place, names: {"LICENSE"})

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert run("publish", bare, "ada/colors") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error and hub.repos == {}


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("model.safetensors", "model.safetensors"),
        ("config.json", "lacks config.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(hub, folder, capsys, gone, said):
    (folder / gone).unlink()
    assert run("publish", folder, "ada/colors") == 2
    assert said in capsys.readouterr().err and hub.repos == {}


def test_a_folder_of_seeds_says_which_to_publish(hub, folder, tmp_path, capsys):
    shutil.move(folder, tmp_path / "runs" / "seed-42")
    assert run("publish", tmp_path / "runs", "ada/colors") == 2
    assert "runs/seed-42'" in capsys.readouterr().err
    assert run("publish", tmp_path / "nowhere", "ada/colors") == 2
    assert "is no folder here" in capsys.readouterr().err


def test_what_save_pretrained_wrote_becomes_whole(hub, tmp_path, capsys):
    model, processor = classifier()
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    assert run("publish", tmp_path / "m", "ada/colors") == 0
    assert "it had no card" in capsys.readouterr().err
    card = hub.files("ada/colors")["README.md"].decode()
    assert "Not measured." in card and "## Intended use" in card and "LICENSE" in hub.files("ada/colors")


# What is not said


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("README.md", "trained by mallorywilson", "the user name mallorywilson"),
        ("recipe.yaml", "hub: hf_" + "A" * 34, "a token"),
        ("recipe.yaml", "key: sesame-open-now", "a token"),
        ("eval_results.json", '{"dataset": "{here}/rows"}', "the path"),
        ("modeling_crossmodal.py", "# {here}/model.py", "the path"),
        ("config.json", '{"note": "{home}/.cache/x"}', "the path"),
        ("picture.png", "\x89PNG {here}/plot.py", "the path"),
        ("model.safetensors", None, "the path"),
    ],
)
def test_tokens_paths_and_users_are_found_with_file_and_line(hub, folder, capsys, monkeypatch, file, text, what):
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-now")
    if text is None:
        from safetensors.torch import load_file, save_file

        save_file(load_file(folder / file), folder / file, metadata={"format": "pt", "made": str(Path.cwd() / "x")})
        line = 1
    else:
        text = text.replace("{here}", str(folder.parent)).replace("{home}", str(Path.home()))
        before = (folder / file).read_text() + "\n" if (folder / file).exists() and "{" not in text else ""
        (folder / file).write_text(before + text + "\n", encoding="latin-1" if file.endswith(".png") else "utf-8")
        line = before.count("\n") + 1
    found = find_leaks(folder, repo_files(folder), "ada/colors")
    assert [(name, number) for name, number, _ in found] == [(file, line)] and what in found[0][2]
    with pytest.raises(
        ValueError, match=rf"{re.escape(file)}, line {line}, holds {re.escape(what)}.*Nothing was published"
    ):
        publish(folder, "ada/colors")
    assert hub.repos == {}


def test_words_that_only_look_like_a_leak_are_left_alone(folder, monkeypatch):
    assert find_leaks(folder, repo_files(folder)) == []
    # Whoever is called like a label, a word of the vocabulary, or the owner of the repo.
    for name in ("red", "color"):
        monkeypatch.setattr(getpass, "getuser", lambda name=name: name)
        assert find_leaks(folder, ["config.json", "tokenizer.json", "modeling_crossmodal.py"]) == []
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    (folder / "README.md").write_text("see ada/colors, https://example.org/tmp/x, /usr/bin/env, and/or/not\n")
    assert find_leaks(folder, ["README.md"], "ada/colors") == []
    assert find_leaks(folder, ["README.md"], "bob/colors") == [("README.md", 1, "the user name ada")]


def test_no_published_file_tells_of_the_machine(hub, tmp_path, monkeypatch):
    """A whole run by paths: data, encoder and tokenizer in folders of this machine, and a token in its environment."""
    secret = tmp_path / "mallorywilson"
    (secret / "data").mkdir(parents=True)
    color_rows(24).to_parquet(secret / "data" / "train.parquet")
    color_rows(6).to_parquet(secret / "data" / "validation.parquet")
    processor, model = tiny_processor_and_model()
    model.base_model.encoders["vision"].save_pretrained(secret / "vision")
    processor.image_processor.save_pretrained(secret / "vision")
    model.base_model.encoders["text"].save_pretrained(secret / "words")
    processor.tokenizer.save_pretrained(secret / "words")
    values = TINY_RECIPE | {"dataset": str(secret / "data"), "output_dir": str(secret / "out"), "name": "colors"}
    values["model"] = {
        "encoders": {"vision": str(secret / "vision"), "text": str(secret / "words")},
        "freeze": ["vision"],
    }
    values["model"]["config"] = TINY_RECIPE["model"]["config"]
    values |= {"processor": {}, "token_cache": str(secret / "cache")}
    values["training"] = TINY_RECIPE["training"] | {"max_steps": 2, "push_to_hub": True, "hub_model_id": "ada/run"}
    said = []
    train(Recipe(**values), write=said.append)
    assert any(line.startswith("published: ") for line in said)
    publish(secret / "out", "ada/colors")
    pipe = CrossModalVQAPipeline(
        model=CrossModalForVQA.from_pretrained(secret / "out"),
        processor=CrossModalProcessor.from_pretrained(secret / "out"),
    )
    pipe.push_to_hub("ada/pipe")
    words = [TOKEN, "mallorywilson", str(tmp_path), str(Path.home()), str(Path.cwd())]
    for repo in ("ada/run", "ada/colors", "ada/pipe"):
        for sha, files in hub.commits(repo):
            for name, body in files.items():
                for word in words:
                    assert word.encode() not in body, f"{repo} at {sha}: {name} says {word}"
    assert "dataset: data" in hub.files("ada/colors")["recipe.yaml"].decode()
    assert not [name for name in hub.files("ada/run") if "/" in name or name.endswith(".bin")]


# Trainer


def trainer_of(folder, **options):
    processor, model = tiny_processor_and_model()
    task, rows = VQATask.from_config(model.config), RowDataset(color_rows(12), "vqa")
    arguments = TrainingArguments(
        str(folder), push_to_hub=True, hub_model_id="ada/trained", max_steps=2, use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, report_to="none", **options,
    )  # fmt: skip
    return CrossModalTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor,
        data_collator=SampleCollator(processor, task.encode_targets),
        compute_metrics=lambda found: task.score(found.predictions, rows.targets),
    )  # fmt: skip


def test_trainer_pushes_a_whole_repo_with_its_last_evaluation_and_no_pickle(hub, tmp_path):
    trainer = trainer_of(tmp_path / "out", eval_strategy="steps", eval_steps=1, save_steps=1, hub_token=TOKEN)
    trainer.train()
    # Every checkpoint was, with a card.
    assert len(hub.commits("ada/trained")) == 5 and "vqa_accuracy" in hub.files("ada/trained")["README.md"].decode()
    found = trainer.push_to_hub(dataset="colored pictures", blocking=False).result()
    files = hub.files("ada/trained")
    assert set(files) == {*repo_files(tmp_path / "out"), ".gitattributes"} and "training_args.bin" not in files
    assert (tmp_path / "out" / "training_args.bin").exists()
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    accuracy = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown == {"accuracy": pytest.approx(accuracy, abs=1e-4), "vqa_accuracy": pytest.approx(accuracy, abs=1e-4)}
    assert (
        "colored pictures" in card.text and f'revision="{found["revision"]}"' in card.text and "seed 42" in card.text
    )
    for body in files.values():
        assert TOKEN.encode() not in body and str(tmp_path).encode() not in body


def test_a_hub_that_is_away_does_not_stop_training(hub, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path / "out", save_steps=1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    trainer.train()
    assert trainer.state.global_step == 2 and len(hub.commits("ada/trained")) == 1
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        trainer.push_to_hub()


def test_trainer_does_not_push_checkpoints_and_says_what_is_wrong_with_a_token(hub, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hub_strategy='all_checkpoints' publishes checkpoints"):
        trainer_of(tmp_path, hub_strategy="all_checkpoints")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(ValueError, match="the token may not write to 'ada/trained'"):
        trainer_of(tmp_path)


# The card


def test_intervals_are_those_of_wilson():
    share, rows, z = 0.837, 451, norm.ppf(0.975)
    right = round(share * rows) / rows
    middle = (right + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * (right * (1 - right) / rows + z**2 / (4 * rows**2)) ** 0.5
    assert interval(share, rows) == pytest.approx((middle - half, middle + half))


def test_the_card_of_a_run_over_seeds_says_all_that_is_known(tmp_path):
    values = TINY_RECIPE | {
        "task": "classification",
        "dataset": "ada/rows",
        "output_dir": str(tmp_path),
        "name": "colors",
    }
    values["training"] = TINY_RECIPE["training"] | {"max_steps": 2}
    values["model"] = {"encoders": {"text": TINY_RECIPE["model"]["encoders"]["text"]}, "config": {"hidden_size": 32}}
    rows = color_rows(24).rename_column("answer", "label").rename_column("question", "text").remove_columns("image")
    found = train_seeds(Recipe(**values), 2, rows, rows.select(range(12)), write=lambda line: None)
    missing = {"modality": "text", "kind": "missing", "level": 0.5, "unit": "rate", "accuracy": 0.25}
    add_to_folder(tmp_path / "seed-43", [{"modality": None, "accuracy": 0.5}, missing], "accuracy", "`rows`")
    card = huggingface_hub.ModelCard.load(tmp_path / "seed-43" / "README.md")
    run = found["runs"][1]["metrics"]
    low, high = interval(run["accuracy"], 12)
    assert f"accuracy {low:.4f} to {high:.4f}" in card.text and "24 rows of split `train`" in card.text
    assert f"| accuracy | {found['metrics']['accuracy']:.4f} | {found['deviation']['accuracy']:.4f} |" in card.text
    assert f"{run['ece']:.4f} away" in card.text and "crossmodal train recipe.yaml" in card.text
    assert card.data.datasets == ["ada/rows"] and card.data.license == "apache-2.0"
    headings = re.findall("^## .*", card.text, flags=re.MULTILINE)
    assert headings[-3:] == ["## Over seeds", "## When a modality is missing or noisy", "## Limits"]
    assert {"## Use", "## Intended use", "## Reproduce", "## Results"} < set(headings)


def test_a_section_takes_the_place_of_its_elder_and_nothing_else(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# x\n\n## Use\n\nso\n\n## Limits\n\nmany\n")
    put_section(card, "## Over seeds", "one")
    put_section(card, "## Over seeds", "two")
    assert card.read_text() == "# x\n\n## Use\n\nso\n\n## Over seeds\n\ntwo\n\n## Limits\n\nmany\n"


def test_a_card_is_addressed_wherever_it_loads():
    text = 'pipeline(model="path/or/repo-id", trust_remote_code=True)\nhf download path/or/repo-id'
    assert addressed(text, "a/b", "f" * 40) == (
        f'pipeline(model="a/b", revision="{"f" * 40}", trust_remote_code=True)\nhf download a/b'
    )
