"""Writes the fixture of a release: `python tests/make_release.py`, once, before a version is published.

A folder `tests/releases/<version>/<head>` has a model of a few kB with its processor, as that release saved them, and in `outputs.json`
what it made of some raw inputs. test_releases.py loads them with the code of today.
"""

import json
import sys
from pathlib import Path

import torch
from crossmodal.training.building import train_tokenizer
from transformers import BertConfig, ResNetConfig, ViTImageProcessorPil
from world import COLORS, picture

import crossmodal


RELEASES = Path(__file__).parent / "releases"
_SIZE = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
# What the fixture is to hold of each head: keys whose names or shapes a later version might change.
HEADS = {
    "CrossModalForVQA": {"auxiliary_loss_weight": 0.3, "missing_tokens": True, "pooled_features": True},
    "CrossModalForSequenceClassification": {"fusion_type": "bottleneck", "gate": "static", "num_latents": 2},
    "CrossModalForRetrieval": {"fusion_type": "joint", "projection_dim": 8, "alignment_weight": 1.0},
    "CrossModalForCaptioning": {"fusion_type": "interlaced", "num_fusion_layers": 2, "modality_weighting": "uniform"},
    "CrossModalForPointSegmentation": {
        "fusion_type": "interlaced",
        "fusion_levels": "single",
        "num_unimodal_layers": 1,
        "voxel_size": 0.5,
        "point_projection": "add",
    },
}
TEXTS = ["a red one", None, "blue"]


def inputs(processor):
    """A batch of raw inputs, of which the second row lacks its text and the third its image."""
    if "points" in processor.modality_names:
        places = torch.linspace(-1, 1, 24).view(8, 3)
        scene = {"coordinates": places, "uv": places[:, :2].abs()}
        return processor(points=[scene, scene, scene], images=[picture("red"), picture("blue"), None])
    return processor(images=[picture("red"), picture("blue"), None], text=TEXTS)


@torch.no_grad()
def outputs(model, batch):
    """{name: list} of what a head makes of a batch."""
    if model.config.decoder_config is not None:
        written = model.generate(**batch, max_new_tokens=4, do_sample=False)
        return {"written": written.tolist(), "logits": model(**batch).logits.flatten().tolist()}
    found = model(**batch)
    if hasattr(model, "towers"):
        return {name: vectors.flatten().tolist() for name, vectors in found.modality_embeds.items()}
    return {"logits": found.logits.flatten().tolist(), "modality_weights": found.modality_weights.flatten().tolist()}


def make(head, folder):
    """Writes the fixture of one head."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text for text in TEXTS if text], 40)
    modalities = {
        "vision": ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        "text": BertConfig(**_SIZE, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=8),
    }
    if head == "CrossModalForPointSegmentation":
        modalities["points"] = crossmodal.PointsConfig(feature_size=3, hidden_size=8, cell_sizes=[0.5], extent=1.0)
        tokenizer = modalities.pop("text") and None
    options = {**_SIZE, "num_fusion_layers": 1, "id2label": dict(enumerate(COLORS)), **HEADS[head]}
    if head == "CrossModalForCaptioning":
        ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        options["decoder_config"] = crossmodal.TextDecoderConfig(
            **_SIZE, **ids, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=8
        )
    config = crossmodal.CrossModalConfig(modalities=modalities, **options)
    model = getattr(crossmodal, head)(config).eval()
    with torch.no_grad():
        # No weight is what it would be at the start.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    image_processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor = crossmodal.CrossModalProcessor.from_config(
        config, image_processor=image_processor, tokenizer=tokenizer
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in folder.iterdir():
        # The code of the release lies in its tag; what is tested is that of today.
        if path.suffix in (".py", ".md"):
            path.unlink()
    (folder / "outputs.json").write_text(json.dumps(outputs(model, inputs(processor))) + "\n")


def main():
    place = RELEASES / crossmodal.__version__
    if place.exists():
        sys.exit(f"{place} is there already: what a release wrote does not change. Raise __version__ first.")
    for head in HEADS:
        make(head, place / head)
    print(place)


if __name__ == "__main__":
    main()
