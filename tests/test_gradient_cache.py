"""Contrast at scale: a batch in parts, and over several processes, has the gradient of the whole batch in one."""

import copy

import pytest
import torch
import zoo
from crossmodal.training.gradient_cache import _joined, _part, backward_in_parts
from crossmodal.training.recipes import Recipe
from crossmodal.training.train import train
from peft import LoraConfig, get_peft_model
from test_modeling import lively
from test_retrieval import ALL_LOSSES, NAMES, model_of
from test_retrieval_evaluation import pair_rows
from test_retrieval_evaluation import recipe as tiny_recipe

from crossmodal import CrossModalForRetrieval


CLOSE = {"rtol": 1e-3, "atol": 1e-5}
PRESENCE = torch.tensor([[True, True], [True, False], [False, True], [True, True], [True, True], [True, False]])


def batch_of(config, shared=False):
    batch = zoo.tiny_batch(config, batch_size=6)
    if shared:
        batch |= {
            "pixel_values": batch["pixel_values"][:3],
            "pixel_values_index": torch.tensor([1, 0, 1, 2, 2, 1]),
            "labels": torch.tensor([1, 0, 1, 2, 2, 1]),
        }
    return batch


def gradients(model):
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rows_at_once", [1, 2, 4, 6])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("kind", ["whole", "absent", "shared"])
@pytest.mark.parametrize("matching", ["classifier", "ranking"])
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole(rows_at_once, layers, kind, matching):
    model = model_of(**ALL_LOSSES, num_unimodal_layers=layers, fusion_queries=["text"], matching=matching)
    batch = batch_of(model.config, kind == "shared")
    if kind == "absent":
        batch["modality_mask"] = PRESENCE
    torch.manual_seed(5)
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    output = backward_in_parts(model, batch, rows_at_once)
    torch.testing.assert_close(output.loss, loss.detach(), **CLOSE)
    assert not output.loss.requires_grad
    assert_same(gradients(model), expected)


def test_a_scaled_loss_gives_scaled_gradients_everywhere():
    """As `GradScaler` scales it for half precision: once, in the encoders too."""
    model = model_of(**ALL_LOSSES, num_unimodal_layers=1)
    batch = batch_of(model.config)
    torch.manual_seed(5)
    backward_in_parts(model, batch, 2)
    expected = {name: 1024 * gradient for name, gradient in gradients(model).items()}
    model.zero_grad()
    torch.manual_seed(5)
    backward_in_parts(model, batch, 2, backward=lambda loss: (1024 * loss).backward())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-2)


def test_parts_are_encoded_again_with_the_same_random_numbers():
    torch.manual_seed(0)
    config = zoo.tiny_config(
        *NAMES, projection_dim=8, hidden_dropout=0.3, modality_dropout=0.3, num_unimodal_layers=1, **ALL_LOSSES
    )
    model = lively(CrossModalForRetrieval(config)).train()
    batch = batch_of(config)
    torch.manual_seed(9)
    collected = model.crossmodal._collect_inputs(batch)
    found = [model._features_of(*_part(collected, None, rows)) for rows in torch.arange(6).split(2)]
    presence = torch.cat([there for _, there in found])
    assert not presence.all()
    model._output(_joined([features for features, _ in found], [2, 2, 2]), presence).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(9)
    backward_in_parts(model, batch, 2)
    assert_same(gradients(model), expected)


def test_adapters_get_the_gradient_of_the_whole_batch():
    model = model_of(**ALL_LOSSES)
    lora = LoraConfig(
        target_modules=["query", "value", "q_proj"], modules_to_save=["matching"], init_lora_weights=False
    )
    model = get_peft_model(model, lora).eval()
    batch = batch_of(model.config)
    torch.manual_seed(5)
    model(**batch).loss.backward()
    expected = gradients(model)
    assert any("lora" in name and gradient.any() for name, gradient in expected.items())
    model.zero_grad()
    torch.manual_seed(5)
    backward_in_parts(model, batch, 2)
    assert_same(gradients(model), expected)


def test_a_recipe_trains_in_parts_as_it_does_at_once(tmp_path):
    losses = []
    for parts in (None, 5):
        run = tiny_recipe(tmp_path / str(parts), gradient_cache=parts)
        run.model["config"] |= {"classifier_dropout": 0.0, "matching_weight": 0.0}
        run.model["encoders"]["text"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        run.model["encoders"]["vision"] = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}  # fmt: skip
        run.training |= {"num_train_epochs": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
        rows = pair_rows(24)
        result = train(run, rows, rows.select(range(6)), write=lambda line: None, export=False)
        losses.append([entry["loss"] for entry in result["log"] if "loss" in entry])
        assert any("part_contrastive" in entry for entry in result["log"])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-4)


def test_gradient_caching_is_refused_where_it_means_nothing():
    values = copy.deepcopy(vars(tiny_recipe("out")))
    with pytest.raises(ValueError, match="gradient_cache=4 with task='vqa'"):
        Recipe(**values | {"task": "vqa", "gradient_cache": 4})
