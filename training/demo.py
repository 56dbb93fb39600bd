"""The main job, `make demo`: a drawn world, a model and its baselines trained on it, a Hub folder, and a picture."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ..configs import load_preset
from .datasets import RowDataset
from .evaluate import task_of
from .publish import export_folder
from .recipes import Recipe
from .shapes import IMAGE_SIZE, KINDS, QUESTIONS_PER_IMAGE, SIMPLE_KINDS, shapes_dataset
from .tasks import predict_logits
from .train import train


# What each contender of the table changes. Encoders, data, stages, epochs and seed are the same for all.
CONTENDERS = {
    "CrossModal": {},
    "concat": {"config": {"fusion_type": "concat"}},
    "question only": {"only": "text"},
    "image only": {"only": "vision"},
}
_TRAINING = {
    "per_device_train_batch_size": 96,
    "per_device_eval_batch_size": 192,
    "learning_rate": 1.0e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.02,
    "warmup_steps": 0.05,
    # Measured once, at the end, on fresh pictures: nothing is chosen on the way.
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_steps": 20,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
}


_SEEING = {"num_train_epochs": 8, "per_device_train_batch_size": 24, "learning_rate": 3.0e-3}
_SIMPLE = {"num_train_epochs": 3}


def demo(output="outputs/demo", images=3600, epochs=2, seed=0, write=print):
    """Trains the `tiny` preset on the drawn world and shows what it learnt.

    Args:
        output: becomes a Hub folder, with `answers.png` beside the weights.
        images: of the training world, each with up to nine questions. epochs: over them. seed: of world and weights.
        write: takes each line of report.

    Returns:
        dict of test accuracy by contender, overall and by kind of question.
    """
    output = Path(output)
    write(f"Drawing {images:,} images for training and 500 each for validation and test ...")
    worlds = {split: shapes_dataset(n, split, seed) for split, n in
              (("train", images), ("validation", 500), ("test", 500))}  # fmt: skip
    table, trained = {}, {}
    with tempfile.TemporaryDirectory(prefix="crossmodal-demo-") as scratch:
        scratch = Path(scratch)
        for name, change in CONTENDERS.items():
            folder = output if name == "CrossModal" else scratch / name
            recipe = _recipe(name, change, folder, scratch, images, epochs, seed)
            result = train(
                recipe,
                worlds["train"],
                worlds["validation"],
                fresh=True,
                write=write,
                export=False,
                warm_up_folder=scratch / "stages",
            )
            table[name] = _accuracy_by_kind(result["model"], result["processor"], worlds["test"])
            table[name]["minutes"] = result["minutes"]
            trained[name] = result
            if name == "CrossModal":
                published = recipe
    table["most common answer"] = _majority(worlds)
    best = trained["CrossModal"] | {
        "metrics": {"accuracy": table["CrossModal"]["all"]},
        "majority": {"accuracy": table["most common answer"]["all"]},
        "baselines": {
            name: {"accuracy": row["all"]}
            for name, row in table.items()
            if name in CONTENDERS and name != "CrossModal"
        },
        "eval_rows": len(worlds["test"]),
    }
    published.name, published.eval_split = "crossmodal-tiny-shapes", "test"
    export_folder(best["model"], best["processor"], output, recipe=published, result=best)
    fresh = shapes_dataset(12, "test", seed + 1, questions_per_image=1)
    records = ask_in_clean_process(output, fresh)
    from .pictures import answer_grid

    answer_grid(
        records, output / "answers.png", title="Fresh images, answered from the saved folder in a clean process"
    )
    right = sum(record["answers"][0][0] == record["truth"] for record in records)
    write(f"Reloaded in a process without this package: {right} of {len(records)} fresh questions answered right.")
    return table


def _recipe(name, change, folder, scratch, images, epochs, seed):
    """The recipe of a contender. It first learns to see, if it has eyes, and then to answer what takes one look."""
    preset = load_preset("tiny")
    encoders = preset.pop("modalities")
    config = preset | change.get("config", {})
    if "only" in change:
        encoders, config = {change["only"]: encoders[change["only"]]}, preset | {"fusion_queries": None}
    stages = [{"dataset": "drawn:simple_shapes", "rows": images * len(SIMPLE_KINDS), "training": _SIMPLE}]
    stages[0]["rows_per_image"] = len(SIMPLE_KINDS)
    if "vision" in encoders:
        # Nothing between the encoder and the answers: it is the encoder that is to learn.
        alone = {"num_fusion_layers": 1, "fusion_type": "concat", "fusion_queries": None, "pooling": "mean"}
        seeing = {"dataset": "drawn:shape_facts", "rows": images * 3 // 4, "training": _SEEING}
        stages.insert(0, seeing | {"modalities": ["vision"], "config": alone, "freeze": [], "keep": ["vision"]})
    return Recipe(
        task="vqa",
        dataset="drawn:shapes",
        output_dir=str(folder),
        seed=seed,
        rows_per_image=QUESTIONS_PER_IMAGE,
        model={"encoders": encoders, "config": config, "freeze": ["vision"] if "vision" in encoders else []},
        processor={"image_size": [IMAGE_SIZE, IMAGE_SIZE], "tokenizer": "train"},
        token_cache=str(scratch / "tokens") if "vision" in encoders else None,
        warm_up=stages,
        training=_TRAINING | {"num_train_epochs": epochs},
        name=name,
    )


def _accuracy_by_kind(model, processor, rows):
    """Test accuracy of a model that may read only some of the modalities, overall and by kind of question."""
    samples = RowDataset(rows, "vqa")
    logits = predict_logits(model, processor, samples, progress=False)
    labels = task_of(model).id2label
    right = np.array(
        [labels[i] == truth for i, truth in zip(logits.argmax(-1).tolist(), samples.targets, strict=True)]
    )
    return _by_kind(right, rows["kind"])


def _by_kind(right, kinds):
    kinds = np.array(kinds)
    return {"all": float(right.mean())} | {kind: float(right[kinds == kind].mean()) for kind in KINDS}


def _majority(worlds):
    answers = worlds["train"]["answer"]
    common = max(set(answers), key=list(answers).count)
    return _by_kind(np.array([answer == common for answer in worlds["test"]["answer"]]), worlds["test"]["kind"])


# Runs where this package cannot be imported: what a stranger does with the folder.
_STRANGER = """
import json, sys
sys.modules["crossmodal"] = None
import torch
from transformers import pipeline
folder, questions = sys.argv[1], json.load(open(sys.argv[2]))
pipe = pipeline(model=folder, trust_remote_code=True)
found = []
for item in questions:
    record = pipe(item["image"], item["question"], top_k=3, return_modality_weights=True)
    batch = pipe.processor(images=item["image"], text=item["question"])
    with torch.no_grad():
        output = pipe.model(**batch, output_attentions=True)
    height, width = output.token_grids["vision"]
    seen = output.cross_attentions[-1]["text<-vision"][0].mean(dim=(0, 1))[-height * width:]
    record["attention"] = seen.view(height, width).tolist()
    found.append(record)
print("ANSWERS" + json.dumps(found))
"""


def ask_in_clean_process(folder, rows):
    """Records for `answer_grid`, answered by the pipeline of a folder in a process that has never heard of us.

    Raises:
        RuntimeError: with what that process said, if it failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        questions = []
        for index, row in enumerate(rows):
            path = Path(scratch) / f"{index}.png"
            row["image"].save(path)
            questions.append({"image": str(path), "question": row["question"]})
        listing = Path(scratch) / "questions.json"
        listing.write_text(json.dumps(questions))
        done = subprocess.run(
            [sys.executable, "-c", _STRANGER, str(Path(folder).resolve()), str(listing)],
            capture_output=True,
            text=True,
            cwd=scratch,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")},
        )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    if done.returncode or not answers:
        raise RuntimeError(f"the saved folder did not load in a clean process:\n{done.stderr[-2000:]}")
    return [
        {
            "image": row["image"],
            "question": row["question"],
            "truth": row["answer"],
            "answers": [(answer["answer"], answer["score"]) for answer in record["answers"]],
            "attention": np.array(record["attention"]),
            "modality_weights": record["modality_weights"],
        }
        for row, record in zip(rows, json.loads(answers[-1].removeprefix("ANSWERS")), strict=True)
    ]
