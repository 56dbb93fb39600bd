"""LoRA by tower: what is adapted and what is saved, over all heads and operators; merging, several adapters, wrong bases, recipes."""

import copy
import json
import shutil

import pytest
import torch
import zoo
from crossmodal.modeling.fusion_crossmodal import FUSIONS
from crossmodal.modeling.pooling_crossmodal import StandardisedNorm
from crossmodal.training.console import load_model
from crossmodal.training.lora import add_lora, describe, lora_config, merged, save_adapter, unloaded
from crossmodal.training.recipes import Recipe
from crossmodal.training.train import train
from crossmodal.training.trainer import component_of
from peft import PeftModel
from torch import nn
from transformers import BertConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available
from world import TINY_RECIPE, color_rows, picture, run_as_stranger

from crossmodal import (
    CrossModalForCaptioning,
    CrossModalForPointSegmentation,
    CrossModalForRetrieval,
    CrossModalForSequenceClassification,
    CrossModalForVQA,
    CrossModalTrainer,
    PointsConfig,
    TextDecoderConfig,
)


DECODER = TextDecoderConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_dropout=0.0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# With every part that owns a bare parameter somewhere: static gates, temperatures, latents, log variances, missing tokens.
HEADS = {
    CrossModalForVQA: {"auxiliary_loss_weight": 0.3, "missing_tokens": True, "pooled_features": True, "gate": "static"},
    CrossModalForSequenceClassification: {
        "auxiliary_loss_weight": 0.3, "modality_weighting": "uncertainty", "attention_kernel": "linear",
    },
    CrossModalForRetrieval: {
        "contrastive_loss": "sigmoid", "alignment_weight": 1.0, "loss_weighting": "learned", "num_unimodal_layers": 1,
    },
    CrossModalForCaptioning: {"decoder_config": DECODER, "attention_kernel": "latents"},
}  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def model_of(*names, head=CrossModalForVQA, seed=0, **options):
    torch.manual_seed(seed)
    return head(zoo.tiny_config(*names, hidden_dropout=0.0, classifier_dropout=0.0, **options)).eval()


def encoder_of(name):
    return getattr(zoo.tiny_config(name), f"{name}_config")


def disturb(model):
    """Moves every parameter that is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for path, module in model.named_modules():
            if isinstance(module, StandardisedNorm) and "modules_to_save" in path:
                # What is taken from the training rows before.
                module.shift.add_(0.1)
    return model.eval()


def batch_of(model, seed=0):
    batch = zoo.tiny_batch(model.config, seed=seed)
    if model.config.decoder_config is not None:
        batch["labels"] = torch.arange(3, 23).view(4, 5)
    elif not hasattr(model, "towers"):
        batch["labels"] = torch.tensor([0, 1, 2, 3])
    return batch


def loss_of(model, batch):
    # Retrieval draws negatives.
    torch.manual_seed(0)
    return model(**batch).loss


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_all_that_is_trained_is_saved_loaded_and_merged(tmp_path, head, fusion_type):
    kernel = {} if fusion_type != "mutual" else {"attention_kernel": "exact"}
    model = model_of(head=head, fusion_type=fusion_type, **{**HEADS[head], **kernel})
    batch = batch_of(model)
    before = loss_of(model, batch)
    fresh = fusion_type in ("cross", "joint", "mutual")
    adapted = disturb(add_lora(model, "all-linear", r=2, fresh=fresh))
    for path, module in adapted.get_base_model().named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and ".encoders." not in path and not isinstance(module, nn.Linear | nn.Embedding):
            trained = (
                "modules_to_save" in path or "lora_" in path or path.endswith((".original_module", ".base_layer"))
            )
            assert trained, f"{path} holds {list(own)} and is not saved"
    expected = loss_of(adapted, batch)
    assert not torch.allclose(expected, before)
    save_adapter(adapted, tmp_path)
    torch.testing.assert_close(loss_of(head.from_pretrained(tmp_path).eval(), batch), expected, **CLOSE)
    whole = merged(adapted).eval()
    assert type(whole) is head and not any("lora" in name or "modules_to_save" in name for name in whole.state_dict())
    torch.testing.assert_close(loss_of(whole, batch), expected, **CLOSE)
    whole.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loss_of(head.from_pretrained(tmp_path / "merged").eval(), batch), expected, **CLOSE)


def test_class_tokens_and_the_decoder_of_points_are_saved_too(tmp_path):
    points = PointsConfig(feature_size=6, hidden_size=12, cell_sizes=[0.3, 0.6], extent=1.0)
    torch.manual_seed(0)
    model = CrossModalForPointSegmentation.from_encoders(
        points=points, vision=encoder_of("vision"), **zoo.TINY, num_unimodal_layers=1, voxel_size=0.5, num_labels=4
    ).eval()
    batch = {
        "points_values": torch.rand(2, 24, 6) * 2 - 1,
        "points_uv": torch.rand(2, 24, 1, 2),
        "pixel_values": torch.randn(2, 3, 64, 64),
    }
    for number, (preset, fresh) in enumerate((("decoder", False), ("vision", True))):
        adapted = disturb(add_lora(copy.deepcopy(model), preset, r=2, fresh=fresh))
        expected = adapted(**batch).logits
        assert not torch.allclose(expected, model(**batch).logits)
        save_adapter(adapted, tmp_path / str(number))
        loaded = CrossModalForPointSegmentation.from_pretrained(tmp_path / str(number)).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, **CLOSE)
        torch.testing.assert_close(merged(adapted).eval()(**batch).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("preset", "fresh", "towers"),
    [
        ("text", True, {"text"}),
        ("vision", True, {"vision"}),
        ("fusion", None, {"fusion"}),
        ("all", True, {"vision", "text"}),
        ("all", False, {"vision", "text", "fusion"}),
        ("all-linear", False, {"vision", "text", "fusion"}),
    ],
)
def test_a_preset_reaches_its_towers_and_what_is_small_is_trained_in_full(preset, fresh, towers):
    model = model_of(missing_tokens=True)
    config = lora_config(model, preset, fresh=fresh)
    assert {component_of(path) for path in config.target_modules} == towers
    attention = all("att" in path for path in config.target_modules)
    assert attention == (preset != "all-linear")
    for path in ("modality_types", "missing_tokens", "weighting.bias", "fusion.layers.0.gate.text.out_proj"):
        assert f"crossmodal.{path}" in config.modules_to_save
    assert "classifier.out_proj" in config.modules_to_save
    in_full = "crossmodal.projections.text.projections.0" in config.modules_to_save
    assert in_full == bool(fresh)
    assert not any(".encoders." in path for path in config.modules_to_save)


def test_a_decoder_that_was_trained_is_adapted_and_its_words_stay():
    model = model_of(head=CrossModalForCaptioning, decoder_config=DECODER)
    config = lora_config(model, "decoder")
    assert all(path.startswith("decoder.") for path in config.target_modules)
    assert not {"embed_tokens", "lm_head"} & set(config.modules_to_save)
    assert {"embed_tokens", "lm_head"} & set(lora_config(model, "text").modules_to_save)


@pytest.mark.parametrize(
    ("names", "preset", "options", "words"),
    [
        (("vision", "text"), "texts", {}, ["'texts' is no preset", "['text',", "all-linear"]),
        (("photo", "text"), "photo", {}, ["'photo' finds no linear layer", "convolutional"]),
        (("vision", "text"), "fusion", {"fresh": True}, ["starts from nothing", "model.checkpoint"]),
        (("vision", "text"), "text", {"frozen": True}, ["keeps frozen", "unfreeze"]),
    ],
)
def test_a_preset_that_cannot_be_is_refused(names, preset, options, words):
    frozen = ["text"] if options.pop("frozen", False) else []
    with pytest.raises(ValueError) as error:
        lora_config(model_of(*names, frozen_modalities=frozen), preset, **options)
    for word in words:
        assert word in str(error.value)


def test_encoders_that_are_not_adapted_are_frozen_and_stay_in_eval_mode():
    model = add_lora(model_of("photo", "text", frozen_modalities=["text"]), "text", r=2).train()
    base = model.get_base_model()
    assert base.config.frozen_modalities == ["photo"]
    assert not base.crossmodal.encoders["photo"].training and base.crossmodal.encoders["text"].training
    before = copy.deepcopy(base.crossmodal.encoders["photo"].state_dict())
    model(**batch_of(base)).loss.backward()
    assert all(
        torch.equal(value, before[key]) for key, value in base.crossmodal.encoders["photo"].state_dict().items()
    )
    reached = [n for n, p in model.named_parameters() if ".encoders." in n and p.grad is not None]
    assert reached and all(".encoders.text." in name and ".lora_" in name for name in reached)


def test_components_have_their_learning_rates_and_norms_under_peft(tmp_path):
    model = add_lora(model_of(), "text", r=2)
    rows = [{key: value[n] for key, value in batch_of(model).items()} for n in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, max_steps=1, logging_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = CrossModalTrainer(
        model=model, args=arguments, train_dataset=rows, learning_rates={"text": 1e-2, "fusion": 1e-4}
    )
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = 1e-2 if ".encoders.text." in name else 1e-4 if ".crossmodal." in name else 1e-3
            assert rates[id(parameter)] == wanted, name
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["gradient_norm_text"] > 0 and logged["gradient_norm_vision"] > 0 and "weight_text" in logged


def test_several_adapters_share_a_base_are_switched_and_taken_off(tmp_path):
    batch = batch_of(model_of())
    expected = {}
    for seed, preset in enumerate(("text", "vision")):
        adapted = add_lora(model_of(), preset, r=2, fresh=False)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * (seed + 1))
        expected[preset] = adapted.eval()(**batch).logits
        save_adapter(adapted, tmp_path / preset, hub_base="me/base")
    base = model_of()
    plain = base(**batch).logits
    for preset in expected:
        base.load_adapter(tmp_path / preset, adapter_name=preset)
    for preset in ("text", "vision", "text"):
        base.set_adapter(preset)
        torch.testing.assert_close(base(**batch).logits, expected[preset], **CLOSE)
    base.disable_adapters()
    torch.testing.assert_close(base(**batch).logits, plain, **CLOSE)
    # Taken off, the base is as it was; put on by peft itself, it is adapted.
    again = PeftModel.from_pretrained(model_of(), tmp_path / "text").eval()
    torch.testing.assert_close(again(**batch).logits, expected["text"], **CLOSE)
    torch.testing.assert_close(unloaded(again).eval()(**batch).logits, plain, **CLOSE)


def test_an_adapter_for_another_base_is_refused_in_one_line(tmp_path):
    adapted = disturb(add_lora(model_of(), "text", r=2))
    save_adapter(adapted, tmp_path, hub_base="me/base")
    cases = {
        "has no layer here": model_of("vision", "eeg"),
        "for a weight that has": model_of("vision", "text", hidden_size=32),
        "have other weights here": model_of(seed=7),
    }
    for words, other in cases.items():
        before = set(other.state_dict())
        with pytest.raises(ValueError, match="was made for another base") as error:
            other.load_adapter(tmp_path)
        assert words in str(error.value) and "\n" not in str(error.value)
        assert set(other.state_dict()) == before
    # The same base in half the bits is the same base.
    for dtype in (torch.bfloat16, torch.float16):
        half = model_of().to(dtype)
        half.load_adapter(tmp_path)
        assert "default" in half.peft_config


def test_an_adapter_beside_its_base_says_nothing_of_the_machine(tmp_path):
    model_of().save_pretrained(tmp_path / "base")
    adapted = add_lora(CrossModalForVQA.from_pretrained(tmp_path / "base"), "text", r=2)
    save_adapter(adapted, tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text(), path.name
    shutil.move(tmp_path / "adapter", tmp_path / "elsewhere")
    assert CrossModalForVQA.from_pretrained(tmp_path / "elsewhere").peft_config["default"].r == 2


def test_four_bits_without_bitsandbytes_say_what_to_install(monkeypatch):
    from crossmodal.training import lora

    monkeypatch.setattr(lora, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        add_lora(model_of(), "text", bits=4)
    with pytest.raises(ValueError, match="lora.bits=8. Expected 4"):
        add_lora(model_of(), "text", bits=8)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
def test_an_adapter_is_trained_in_four_bits_and_merged_into_whole_weights(tmp_path):
    # Four bits come in blocks of 64.
    wide = BertConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=60, max_position_embeddings=40
    )  # fmt: skip
    model, _ = model_of().with_modalities(swap={"text": wide})
    adapted = add_lora(model, "text", r=2, bits=4).train()
    layer = adapted.get_base_model().crossmodal.encoders["text"].encoder.layer[0].attention.self.query
    assert layer.base_layer.weight.dtype == torch.uint8
    batch = batch_of(model)
    with torch.no_grad():
        adapted.eval()(**batch)
    # Behind an evaluation, too.
    adapted.train()(**batch).loss.backward()
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0
    disturb(adapted)
    save_adapter(adapted, tmp_path, base=model)
    whole = merged(adapted, model).eval()
    loaded = CrossModalForVQA.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, whole(**batch).logits, **CLOSE)
    assert (adapted(**batch).logits - whole(**batch).logits).abs().max() < 0.1


# Recipes


def recipe(folder, **changes):
    values = copy.deepcopy(TINY_RECIPE) | {"task": "vqa", "dataset": "rows", "output_dir": str(folder), "name": "tiny"}
    values["training"] |= changes.pop("training", {})
    return Recipe(**values | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("trained"), []
    run = recipe(folder, lora="text", training={"num_train_epochs": 3})
    return folder, train(run, color_rows(24), color_rows(12), write=lines.append), lines


def test_a_recipe_trains_an_adapter_and_says_what_it_takes(trained):
    _, result, lines = trained
    line = next(line for line in lines if "LoRA" in line)
    assert "rank 8 on 8 layers of text: 4,096 parameters" in line and "MiB" in line
    assert result["trainable_parameters"] < result["parameters"] and result["metrics"]["accuracy"] > 0.6
    assert type(result["model"]) is CrossModalForVQA and result["model"].config.frozen_modalities == ["vision"]


def test_the_folder_of_a_run_is_the_merged_model_with_its_adapter_in_it(trained):
    folder, _, _ = trained
    whole, processor = load_model(str(folder))
    adapter, _ = load_model(str(folder / "adapter"))
    batch = processor(images=[picture("red")], text=["what color is this?"])
    torch.testing.assert_close(adapter.eval()(**batch).logits, whole.eval()(**batch).logits, **CLOSE)
    assert adapter.peft_config["default"].target_modules and not hasattr(whole, "peft_config")
    assert "(LoRA, `text`, merged into the weights)" in (folder / "README.md").read_text()
    # Not the base alone.
    adapter.disable_adapters()
    assert not torch.allclose(adapter(**batch).logits, whole(**batch).logits, **CLOSE)


STRANGER = """
import sys
from transformers import AutoModelForVisualQuestionAnswering, pipeline

picture, answers = sys.argv[1], []
for folder in sys.argv[2:]:
    pipe = pipeline(model=folder, trust_remote_code=True)
    answers.append(pipe(picture, "what color is this?", top_k=3))
    model = AutoModelForVisualQuestionAnswering.from_pretrained(folder, trust_remote_code=True)
    print(hasattr(model, "peft_config"), type(model).__module__.startswith("transformers_modules"))
print(max(abs(a["score"] - b["score"]) for a, b in zip(*answers)) < 1e-5, [a["answer"] for a in answers[0]] == [b["answer"] for b in answers[1]])
"""


def test_adapter_folders_load_by_auto_classes_and_pipelines_without_the_package(trained, tmp_path):
    picture("blue").save(tmp_path / "picture.png")
    said = run_as_stranger(STRANGER, tmp_path / "picture.png", trained[0], trained[0] / "adapter", cwd=tmp_path)
    assert said.splitlines() == ["False True", "True True", "True True"]


def test_a_trained_model_is_adapted_to_other_rows(trained, tmp_path):
    folder, _, _ = trained
    rows = color_rows(24).filter(lambda row: row["answer"] != "green")
    changes = {"model": {"checkpoint": str(folder)}, "processor": {}, "lora": {"preset": "fusion", "r": 4}}
    run = recipe(tmp_path / "run", **changes, training={"num_train_epochs": 1})
    lines = []
    result = train(run, rows, rows, write=lines.append)
    assert set(result["model"].config.label2id) == {"red", "blue"} and result["metrics"]["accuracy"] == 1.0
    assert any("rank 4" in line and "layers of fusion" in line for line in lines)
    before, _ = load_model(str(folder))
    name = "crossmodal.projections.text.projections.0.weight"
    # What the preset does not reach is as it was.
    assert torch.equal(result["model"].state_dict()[name], before.state_dict()[name])
    assert str(tmp_path) not in (tmp_path / "run" / "recipe.yaml").read_text()
    told = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == ""


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path):
    def cut_off(line):
        if line.startswith("epoch   2.00"):
            raise KeyboardInterrupt

    options = {"lora": {"preset": "text", "dropout": 0.1}, "training": {"num_train_epochs": 2}}
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path / "run", **options), color_rows(24), color_rows(6), write=cut_off)
    lines = []
    resumed = train(recipe(tmp_path / "run", **options), color_rows(24), color_rows(6), write=lines.append)
    assert "resuming from checkpoint-3." in lines
    whole = train(recipe(tmp_path / "whole", **options), color_rows(24), color_rows(6), write=print, export=False)
    for name, value in whole["model"].state_dict().items():
        torch.testing.assert_close(resumed["model"].state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"r": 4}}, ["lacks its preset", "lora=text"]),
        ({"lora": "txet"}, ["lora.preset has 'txet'", "['text',"]),
        ({"lora": {"preset": "text", "rank": 4}}, ["lora.rank", "'r'"]),
        ({"model": {"checkpoint": "me/model", "preset": "tiny"}}, ["either", "checkpoint"]),
        (
            {"model": {"checkpoint": "me/model"}, "compare": ["concat"], "processor": {}},
            ["compare", "'me/model' is trained"],
        ),
        ({"model": {"checkpoint": "me/model"}}, ["processor", "'me/model' is trained"]),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        recipe(tmp_path, **changes)
    for word in words:
        assert word in str(error.value)


def test_only_a_trained_fusion_is_adapted(tmp_path):
    with pytest.raises(ValueError, match="starts from nothing.*model.checkpoint"):
        train(recipe(tmp_path, lora="fusion"), color_rows(12), color_rows(6), write=print)


def test_what_is_trained_and_what_it_takes_is_told():
    line = describe(add_lora(model_of(), "text", r=2))
    trained = sum(p.numel() for p in add_lora(model_of(), "text", r=2).parameters() if p.requires_grad)
    low = 8 * 2 * (32 + 32)
    assert f"{low:,} parameters, and {trained - low:,} in full" in line
