"""A small world for tests: a model with its processor, rows of real schemas, and a process that lacks this package."""

import os
import subprocess
import sys

import numpy as np
from crossmodal.training.building import train_tokenizer
from PIL import Image
from transformers import BertConfig, ViTConfig, ViTImageProcessorPil

from crossmodal import CrossModalConfig, CrossModalForVQA, CrossModalProcessor


COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 220)}
QUESTIONS = ["what color is this?", "which color does the picture have?"]
_COLUMN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def picture(color="red", size=(32, 32)):
    """A picture of one color."""
    return Image.new("RGB", size, COLORS[color])


def tiny_processor_and_model(extra=None, **overrides):
    """A VQA model over 32-pixel images and questions (and `extra` modalities), with its processor."""
    tokenizer = train_tokenizer(QUESTIONS, 100)
    modalities = {
        "vision": ViTConfig(**_COLUMN, image_size=32, patch_size=8),
        "text": BertConfig(
            **_COLUMN,
            vocab_size=len(tokenizer),
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        **(extra or {}),
    }
    config = CrossModalConfig(
        modalities=modalities,
        **{"hidden_size": 32, "intermediate_size": 64, "hidden_dropout": 0.0, "classifier_dropout": 0.0}
        | {"id2label": dict(enumerate(COLORS)), "problem_type": "single_label_classification"}
        | overrides,
    )
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor = CrossModalProcessor.from_config(config, image_processor=image_processor, tokenizer=tokenizer)
    return processor, CrossModalForVQA(config).eval()


def color_rows(count=24, questions_per_image=2):
    """Rows of the schema of easy-VQA, learnable in a moment."""
    import datasets

    names, rows = list(COLORS), []
    for image_id in range(count // questions_per_image):
        name = names[image_id % len(names)]
        rows += [
            {"image": picture(name), "image_id": image_id, "question": QUESTIONS[i % 2], "answer": name}
            for i in range(questions_per_image)
        ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


TINY_RECIPE = {
    "task": "vqa",
    "model": {
        "encoders": {
            "vision": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                       "layer_type": "basic"},
            "text": {"model_type": "bert", **_COLUMN, "max_position_embeddings": 32},
        },
        "config": {"hidden_size": 32, "intermediate_size": 64, "hidden_dropout": 0.0},
    },
    "processor": {"image_size": [32, 32], "tokenizer": "train"},
    "training": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 3.0e-3,
        "use_cpu": True,
        "disable_tqdm": True,
    },
}  # fmt: skip


def run_as_stranger(code, *arguments, cwd, **environment):
    """Standard output of a Python process in which this package cannot be imported."""
    blocked = "import sys; sys.modules['crossmodal'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", blocked, *map(str, arguments)],
        cwd=cwd,
        env=os.environ
        | {"HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def noise(*shape, seed=0):
    """Float32 normal noise."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
