"""Rows that are alike are fused apart: to the same outputs and gradients, at a lower price."""

import pytest
import torch
import zoo
from crossmodal.modeling import modeling_crossmodal
from crossmodal.modeling.fusion_crossmodal import FUSIONS
from crossmodal.modeling.grouping_crossmodal import alike_rows, of_rows
from test_modeling import CLOSE, lively
from torch.utils.flop_counter import FlopCounterMode

from crossmodal import CrossModalForVQA


NAMES = ("vision", "text", "eeg")
ROWS = 24


def model_of(*names, **overrides):
    torch.manual_seed(0)
    return lively(CrossModalForVQA(zoo.tiny_config(*(names or NAMES), **overrides)))


def ragged_batch(config):
    """24 rows of texts of 2 to 7 tokens and sequences of 3 to 9 steps, and which modalities each row has."""
    generator = torch.Generator().manual_seed(1)
    batch = zoo.tiny_batch(config, ROWS)
    for name in ("text", "eeg"):
        values, mask = config.input_keys(name)
        length = batch[values].shape[1]
        ends = torch.randint(length // 3, length + 1, (ROWS, 1), generator=generator)
        batch[mask] = (torch.arange(length) < ends).long()
    presence = torch.rand(ROWS, len(NAMES), generator=generator) < 0.6
    presence[:, 0] |= ~presence.any(dim=1)
    return batch, presence


@pytest.mark.parametrize("missing_tokens", [False, True], ids=["", "missing_tokens"])
@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_groups_give_the_outputs_and_gradients_of_the_whole_batch(monkeypatch, fusion_type, missing_tokens):
    model = model_of(fusion_type=fusion_type, missing_tokens=missing_tokens, auxiliary_loss_weight=0.5).eval()
    batch, presence = ragged_batch(model.config)
    # A row of which nothing is left but padding.
    presence[3] = torch.tensor([False, True, False])
    batch["attention_mask"][3] = 0
    labels = torch.arange(ROWS) % 5

    def run():
        model.zero_grad()
        output = model(**batch, modality_mask=presence, labels=labels)
        (output.loss + output.auxiliary_losses.sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return output.logits, output.modality_weights, {name: grad.clone() for name, grad in gradients.items()}

    apart, whole = zoo.with_and_without_groups(monkeypatch, run)
    # A layer that no group needed has no gradient, where the whole batch gave it zeros.
    whole[2].update({name: grad for name, grad in whole[2].items() if name in apart[2]})
    assert all(not grad.any() for name, grad in whole[2].items() if name not in apart[2])
    torch.testing.assert_close(apart[:2], whole[:2], **CLOSE)
    for name, gradient in apart[2].items():
        torch.testing.assert_close(gradient, whole[2][name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("missing_tokens", [False, True], ids=["", "missing_tokens"])
def test_of_a_modality_that_a_row_lacks_nothing_is_pooled(monkeypatch, missing_tokens):
    model = model_of(missing_tokens=missing_tokens).eval().crossmodal
    batch, presence = ragged_batch(model.config)
    run = lambda: model(**batch, modality_mask=presence, return_tokens=False).modality_embeddings  # noqa: E731
    for found in zoo.with_and_without_groups(monkeypatch, run):
        assert not found[~presence].any() and found[presence].any(dim=1).all()


@pytest.mark.parametrize("missing_tokens", [False, True], ids=["", "missing_tokens"])
def test_a_step_among_its_neighbours_is_pooled_at_its_own_place(monkeypatch, missing_tokens):
    config = zoo.tiny_config("text", "eeg", missing_tokens=missing_tokens)
    settings = {**config.modality_settings, "eeg": {**config.modality_settings["eeg"], "context": 4}}
    torch.manual_seed(0)
    model = lively(
        CrossModalForVQA(zoo.tiny_config("text", "eeg", missing_tokens=missing_tokens, modality_settings=settings))
    )
    batch, _ = ragged_batch(zoo.tiny_config(*NAMES))
    del batch["pixel_values"]
    presence = torch.ones(ROWS, 2, dtype=torch.bool)
    presence[::3, 1] = False
    # Groups that end before their own place, and at it.
    batch["eeg_mask"] = (torch.arange(9) < torch.tensor([3, 5]).repeat(ROWS // 2)[:, None]).long()
    assert model.crossmodal.poolings["eeg"].own_place == 4
    run = lambda: model.eval()(**batch, modality_mask=presence).logits  # noqa: E731
    torch.testing.assert_close(*zoo.with_and_without_groups(monkeypatch, run), **CLOSE)


@pytest.mark.parametrize("kernel", ["window", "linear"])
def test_kernels_for_long_inputs_do_not_mind_the_padding_that_groups_leave_out(monkeypatch, kernel):
    options = {"attention_kernel": kernel} | ({"attention_window": 2} if kernel == "window" else {})
    torch.manual_seed(0)
    config = zoo.tiny_config("text", "eeg", **options)
    model = lively(CrossModalForVQA(config)).eval()
    batch, presence = ragged_batch(config)
    run = lambda: model(**batch, modality_mask=presence[:, 1:] | ~presence[:, 1:].any(1, keepdim=True)).logits  # noqa: E731
    torch.testing.assert_close(*zoo.with_and_without_groups(monkeypatch, run), **CLOSE)


def test_inputs_that_rows_share_are_still_computed_once_in_each_group(monkeypatch):
    model = model_of("vision", "text", fusion_queries=["text"]).eval()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 7, (ROWS, 1), generator=generator)
    lengths[5] = 24
    texts = {"input_ids": torch.randint(5, 50, (ROWS, 24), generator=generator)}
    texts["attention_mask"] = (torch.arange(24) < lengths).long()
    images = zoo.tiny_batch(model.config, 3)["pixel_values"]
    index = torch.arange(ROWS) % 3
    once = texts | {"pixel_values": images, "pixel_values_index": index}
    sizes = []
    key = model.crossmodal.fusion.layers[0].cross_attn["vision"].k_proj
    key.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    apart, whole = zoo.with_and_without_groups(monkeypatch, lambda: model(**once).logits)
    assert max(sizes) <= 3 and len(sizes) > 2
    torch.testing.assert_close(apart, whole, **CLOSE)
    torch.testing.assert_close(apart, model(**texts, pixel_values=images[index]).logits, **CLOSE)


def test_a_row_costs_nothing_for_a_modality_that_it_lacks(monkeypatch):
    model = model_of("text", "eeg").eval()
    batch, _ = ragged_batch(zoo.tiny_config(*NAMES))
    batch = {key: value for key, value in batch.items() if key != "pixel_values"}
    presence = torch.ones(ROWS, 2, dtype=torch.bool)
    presence[: ROWS // 2, 1] = False

    def flops():
        with FlopCounterMode(display=False) as counter:
            model(**batch, modality_mask=presence)
        return counter.get_total_flops()

    apart, whole = zoo.with_and_without_groups(monkeypatch, flops)
    assert apart < 0.8 * whole


def test_all_rows_at_once_where_maps_or_tokens_of_all_are_asked_or_little_is_saved(monkeypatch):
    model = model_of().eval()
    batch, presence = ragged_batch(model.config)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_crossmodal, "alike_rows", lambda *_: pytest.fail("rows were put into groups"))
        maps = model(**batch, modality_mask=presence, output_attentions=True).cross_attentions
        tokens = model(**batch, modality_mask=presence, output_hidden_states=True).modality_tokens
    assert all(len(values) == ROWS for values in [*tokens.values(), *maps[0].values()])
    levels = {"text": [torch.zeros(512, 8, 4)], "eeg": [torch.zeros(512, 9, 4)]}
    full = {name: torch.ones(512, depths[0].shape[1], dtype=torch.bool) for name, depths in levels.items()}
    assert alike_rows(levels, full, {}, NAMES) is None
    assert alike_rows(levels, dict.fromkeys(levels), {}, NAMES) is None
    few = {name: depths[0][:8].new_zeros(8, depths[0].shape[1]).bool() for name, depths in levels.items()}
    assert alike_rows({name: [depths[0][:8]] for name, depths in levels.items()}, few, {}, NAMES) is None


def test_groups_are_all_rows_once_with_what_they_have_and_no_more():
    generator = torch.Generator().manual_seed(0)
    levels = {"text": [torch.randn(400, 20, 4)], "eeg": [torch.randn(400, 9, 4)]}
    ends = torch.randint(1, 21, (400,), generator=generator)
    there = torch.rand(400, generator=generator) < 0.5
    masks = {"text": torch.arange(20) < ends[:, None], "eeg": there[:, None].expand(-1, 9)}
    groups = alike_rows(levels, masks, {}, ("text", "eeg"))
    assert torch.cat(groups).sort().values.equal(torch.arange(400)) and len(groups) == 8
    for group in groups:
        own, own_masks, shared = of_rows(group, levels, masks, {}, {})
        assert own["text"][0].shape[1] == ends[group].max() and not shared
        assert ("eeg" in own) == bool(there[group].all()) == bool(there[group].any())
        assert own_masks["text"].sum() == ends[group].sum() and own_masks.get("eeg") is None
        assert own["text"][0].equal(levels["text"][0][group, : ends[group].max()])
