"""The guarantees of the model: absence, masks, weights, modes of running, losses. See section 3 of the design."""

import copy
import functools

import pytest
import torch
import zoo
from crossmodal.modeling.fusion_crossmodal import FUSIONS, CrossFusionLayer
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmodal import CrossModalForVQA, CrossModalModel


NAMES = ("photo", "text", "eeg")  # photo has batch norm; the order is not alphabetical
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
fusion_types = pytest.mark.parametrize("fusion_type", FUSIONS)


@functools.cache
def shared_model(fusion_type="cross"):
    """One model for the tests that only look."""
    torch.manual_seed(0)
    return lively(CrossModalForVQA(zoo.tiny_config(*NAMES, fusion_type=fusion_type))).eval()


def lively(model):
    """Weights off their starts, where gates and scores have special values and outputs could agree by luck."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def keys_of(model, name):
    return [key for key in model.config.input_keys(name) if key]


def without(model, batch, *names):
    left_out = {key for name in names for key in keys_of(model, name)}
    return {key: value for key, value in batch.items() if key not in left_out}


def rows_of(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def poison(model, batch, presence):
    """The batch with junk, NaN among it, wherever a row lacks a modality or a position is padding."""
    poisoned = {key: value.clone() for key, value in batch.items()}
    for column, name in enumerate(NAMES):
        values, mask = model.config.input_keys(name)
        junk = 49 if name == "text" else torch.nan
        poisoned[values][~presence[:, column]] = junk
        if mask:
            poisoned[values][poisoned[mask] == 0] = junk if name == "text" else torch.inf
    return poisoned


# At least one modality in each of four rows.
presences = st.lists(
    st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=4, max_size=4
).map(torch.tensor)  # fmt: skip
subsets = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)


def assert_same_output(one, other, tolerance):
    for key in ("logits", "modality_weights"):
        torch.testing.assert_close(one[key], other[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@fusion_types
@given(present=subsets)
def test_absent_key_none_masked_out_and_never_given_are_one(fusion_type, present):
    model = shared_model(fusion_type)
    batch = zoo.tiny_batch(model.config)
    absent = [name for name in NAMES if name not in present]
    never_given = model(**without(model, batch, *absent))
    given_none = model(**{**batch, **{key: None for name in absent for key in keys_of(model, name)}})
    assert_same_output(given_none, never_given, EXACT)
    mask = torch.tensor([name in present for name in NAMES]).expand(4, 3)
    masked = model(**batch, modality_mask=mask)
    assert_same_output(masked, never_given, EXACT)
    assert (never_given.modality_weights[:, ~mask[0]] == 0).all()


@fusion_types
def test_absent_modality_equals_a_model_that_never_had_it(fusion_type):
    whole = shared_model(fusion_type)
    part = CrossModalForVQA(zoo.tiny_config("photo", "text", fusion_type=fusion_type)).eval()
    state = {key: value for key, value in whole.state_dict().items() if key in part.state_dict()}
    for key in ("crossmodal.modality_types.weight", "crossmodal.weighting.bias.weight"):
        state[key] = state[key][:2]
    part.load_state_dict(state)
    batch = without(whole, zoo.tiny_batch(whole.config), "eeg")
    one, other = whole(**batch), part(**batch)
    torch.testing.assert_close(one.logits, other.logits, **CLOSE)
    torch.testing.assert_close(one.modality_weights[:, :2], other.modality_weights, **CLOSE)


@fusion_types
@given(presence=presences)
def test_masked_and_padded_content_cannot_change_any_output(fusion_type, presence):
    model = shared_model(fusion_type)
    batch = zoo.tiny_batch(model.config)
    clean = model(**batch, modality_mask=presence)
    poisoned = model(**poison(model, batch, presence), modality_mask=presence)
    assert_same_output(poisoned, clean, EXACT)
    torch.testing.assert_close(clean.modality_weights.sum(1), torch.ones(4))
    assert (clean.modality_weights[~presence] == 0).all() and clean.logits.isfinite().all()


@settings(max_examples=6)
@given(presence=presences)
def test_masked_and_padded_content_cannot_change_any_gradient(presence):
    # In training mode, with an encoder whose batch norm mixes rows. One lone row has no variance to be normalised by.
    original = CrossModalForVQA(zoo.tiny_config(*NAMES, hidden_dropout=0.0, classifier_dropout=0.0))
    batch = zoo.tiny_batch(original.config)
    for name in ("text", "eeg"):
        encoder = getattr(original.config, f"{name}_config")
        encoder.hidden_dropout_prob = encoder.attention_probs_dropout_prob = 0.0
    original = CrossModalForVQA(original.config)
    gradients = []
    for inputs in (batch, poison(original, batch, presence)):
        model = copy.deepcopy(original).train()
        model(**inputs, modality_mask=presence, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        gradients[-1] |= {name: b for name, b in model.named_buffers() if "running" in name}
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][name] is None, name
        else:
            assert gradient.isfinite().all(), name
            torch.testing.assert_close(gradient, gradients[1][name], **EXACT)


@fusion_types
@given(presence=presences)
def test_a_row_in_a_batch_equals_the_same_row_alone(fusion_type, presence):
    model = shared_model(fusion_type)
    batch = zoo.tiny_batch(model.config)
    together = model(**batch, modality_mask=presence)
    for row in range(4):
        absent = [name for name, here in zip(NAMES, presence[row], strict=True) if not here]
        alone = model(**without(model, rows_of(batch, [row]), *absent))
        torch.testing.assert_close(together.logits[row], alone.logits[0], **CLOSE)
        torch.testing.assert_close(together.modality_weights[row], alone.modality_weights[0], **CLOSE)


@fusion_types
def test_a_row_without_any_modality_is_a_clear_error(fusion_type):
    model = shared_model(fusion_type)
    batch = zoo.tiny_batch(model.config)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2] = False
    with pytest.raises(ValueError, match="row 2 of the batch has no modality"):
        model(**batch, modality_mask=mask)
    with pytest.raises(ValueError, match="No modality was given.*pixel_values"):
        model()


@fusion_types
def test_no_token_at_all_in_a_modality_that_is_there_gives_no_nan(fusion_type):
    model = shared_model(fusion_type)
    batch = zoo.tiny_batch(model.config)
    batch["attention_mask"][1] = batch["eeg_mask"][1] = batch["eeg_mask"][2] = 0
    assert model(**batch).logits.isfinite().all()
    assert model(**without(model, batch, "photo", "text")).logits.isfinite().all()


@pytest.mark.parametrize("pooling", ["attention", "mean", "first"])
@pytest.mark.parametrize("weighting", ["adaptive", "uniform"])
@pytest.mark.parametrize("gate", ["content", "static", "none"])
def test_weights_of_the_modalities_present_sum_to_one(pooling, weighting, gate):
    config = zoo.tiny_config("text", "eeg", pooling=pooling, modality_weighting=weighting, gate=gate)
    model = lively(CrossModalModel(config)).eval()
    presence = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    batch = zoo.tiny_batch(config)
    weights = model(**batch, modality_mask=presence).modality_weights
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert (weights[~presence] == 0).all() and (weights[presence] > 0).all()
    if weighting == "uniform":
        torch.testing.assert_close(weights[0], torch.tensor([0.5, 0.5]))
    # Padding on the left must not be what `first` takes.
    batch["eeg_mask"] = batch["eeg_mask"].flip(1)
    poisoned = {**batch, "eeg_values": batch["eeg_values"].masked_fill(batch["eeg_mask"][..., None] == 0, 99.0)}
    torch.testing.assert_close(model(**batch).pooler_output, model(**poisoned).pooler_output, **EXACT)


@fusion_types
def test_a_single_modality_is_a_model_too(fusion_type):
    if fusion_type == "interlaced":
        with pytest.raises(ValueError, match="alternates between modalities.*Add a modality"):
            zoo.tiny_config("text", fusion_type=fusion_type)
        return
    for name in NAMES:
        model = CrossModalForVQA(zoo.tiny_config(name, fusion_type=fusion_type))
        output = model(**zoo.tiny_batch(model.config), labels=torch.tensor([0, 1, 2, 3]))
        output.loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        torch.testing.assert_close(output.modality_weights, torch.ones(4, 1))


@fusion_types
def test_the_order_of_modalities_does_not_matter(fusion_type):
    one = shared_model(fusion_type)
    order = [2, 1, 0]
    names = [NAMES[i] for i in order]
    # Somebody has to look first.
    other = CrossModalForVQA(zoo.tiny_config(*names, fusion_type=fusion_type, first_query=NAMES[0])).eval()
    state = dict(one.state_dict())
    for key in ("crossmodal.modality_types.weight", "crossmodal.weighting.bias.weight"):
        state[key] = state[key][order]
    other.load_state_dict(state)
    batch = zoo.tiny_batch(one.config)
    first, second = one(**batch), other(**batch)
    torch.testing.assert_close(first.logits, second.logits, **CLOSE)
    torch.testing.assert_close(first.modality_weights[:, order], second.modality_weights, **CLOSE)


def tokens_of(model, batch):
    return model.crossmodal(**batch, output_hidden_states=True).modality_tokens


def test_concat_never_lets_one_stream_change_the_tokens_of_another():
    model = shared_model("concat")
    batch = zoo.tiny_batch(model.config)
    changed = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    before, after = tokens_of(model, batch), tokens_of(model, changed)
    assert not torch.equal(before["photo"], after["photo"])
    for name in ("text", "eeg"):
        torch.testing.assert_close(before[name], after[name], **EXACT)


def test_cross_lets_every_stream_change_the_tokens_of_every_other():
    model = shared_model("cross")
    batch = zoo.tiny_batch(model.config)
    for key in ("pixel_values", "input_ids", "eeg_values"):
        changed = {**batch, key: batch[key].flip(0)}
        before, after = tokens_of(model, batch), tokens_of(model, changed)
        assert all(not torch.equal(before[name], after[name]) for name in NAMES), key


def test_fusion_queries_alone_are_changed_by_what_they_look_at():
    model = lively(CrossModalForVQA(zoo.tiny_config(*NAMES, fusion_queries=["text"])))
    batch = zoo.tiny_batch(model.config)
    model.train()(**batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    changed = {key: value.flip(0) if "eeg" in key else value for key, value in batch.items()}
    before, after = tokens_of(model, batch), tokens_of(model, changed)
    torch.testing.assert_close(before["photo"], after["photo"], **EXACT)
    assert not torch.equal(before["text"], after["text"])
    maps = model(**batch, output_attentions=True).cross_attentions[0]
    assert {key for key in maps if "text<-" in key} == set(maps) and {"text<-photo", "text<-eeg"} <= set(maps)
    assert model(**without(model, batch, "text")).logits.isfinite().all()


def test_a_static_gate_starts_as_the_stream_without_cross_attention():
    layer = CrossFusionLayer(zoo.tiny_config(gate="static")).eval()
    tokens = {"vision": torch.randn(2, 4, 16), "text": torch.randn(2, 3, 16)}
    masks = {"vision": None, "text": None}
    together, _ = layer(tokens, masks)
    for name in tokens:
        alone, _ = layer({name: tokens[name]}, masks)
        torch.testing.assert_close(together[name], alone[name], **EXACT)
    with torch.no_grad():
        layer.gate["text"].weight.fill_(0.5)
    assert not torch.equal(layer(tokens, masks)[0]["text"], together["text"])


def test_a_content_gate_is_what_was_seen_and_its_product_with_what_looks():
    gate = CrossFusionLayer(zoo.tiny_config(gate="content")).gate["text"]
    stream, update = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    expected = update.clone()
    for row in range(2):
        for token in range(3):
            x = gate.stream_proj.weight @ stream[row, token] + gate.stream_proj.bias
            c = gate.update_proj.weight @ update[row, token] + gate.update_proj.bias
            expected[row, token] += gate.out_proj.weight @ (x * c) + gate.out_proj.bias
    torch.testing.assert_close(gate(stream, update), expected, **CLOSE)
    # Unlike a gate that scales, it can turn the sign of what was seen by what looks.
    assert not torch.allclose(gate(-stream, update), gate(stream, update))


def test_gradient_checkpointing_changes_no_loss_and_no_gradient():
    config = zoo.tiny_config(hidden_dropout=0.0, classifier_dropout=0.0)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    plain = CrossModalForVQA(config).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.crossmodal.fusion.modules())
    batch, labels = zoo.tiny_batch(config), torch.tensor([0, 1, 2, 3])
    losses = [model(**batch, labels=labels).loss for model in (plain, checkpointed)]
    torch.testing.assert_close(*losses, **EXACT)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_which_would_lose_gradients_is_refused():
    model = CrossModalForVQA(zoo.tiny_config())
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@fusion_types
def test_bfloat16_runs_forward_and_backward(fusion_type):
    model = CrossModalForVQA(zoo.tiny_config(*NAMES, fusion_type=fusion_type)).to(torch.bfloat16).train()
    batch = zoo.tiny_batch(model.config)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    presence = torch.tensor([[True, True, True], [True, False, True], [True, True, False], [False, True, True]])
    output = model(**batch, modality_mask=presence, labels=torch.tensor([0, 1, 2, 3]))
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_autocast_runs_forward_and_backward():
    model = CrossModalForVQA(zoo.tiny_config(*NAMES)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**zoo.tiny_batch(model.config), labels=torch.tensor([0, 1, 2, 3])).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "with modality_mask"])
def test_forward_compiles_into_one_graph(masked):
    config = zoo.tiny_config(num_fusion_layers=1)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    model = lively(CrossModalForVQA(config)).eval()
    batch = zoo.tiny_batch(model.config)
    if masked:
        batch["modality_mask"] = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
        batch["pixel_values"][2] = torch.nan
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
        torch.testing.assert_close(compiled.logits, model(**batch).logits, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_maps_come_whole_under_every_backend(implementation):
    model = CrossModalForVQA._from_config(zoo.tiny_config(*NAMES), attn_implementation=implementation).eval()
    batch = zoo.tiny_batch(model.config)
    output = model(**batch, output_attentions=True)
    lengths = {name: tokens.shape[1] for name, tokens in tokens_of(model, batch).items()}
    assert len(output.cross_attentions) == 2
    for layer in output.cross_attentions:
        assert set(layer) == {f"{m}<-{n}" for m in NAMES for n in NAMES}
        for key, weights in layer.items():
            looking, looked_at = key.split("<-")
            assert weights.shape == (4, 2, lengths[looking], lengths[looked_at])
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    torch.testing.assert_close(output.logits, model(**batch).logits, **CLOSE)
    assert model(**batch).cross_attentions is None
    assert (output.cross_attentions[0]["eeg<-text"][0, :, :, -2:] == 0).all()


def test_outputs_asked_for_by_the_config_come():
    config = zoo.tiny_config(output_hidden_states=True)
    config._attn_implementation = "eager"  # transformers lets a config ask for attentions under eager only
    config.output_attentions = True
    model = CrossModalForVQA(config).eval()
    output = model(**zoo.tiny_batch(config))
    assert output.cross_attentions is not None and output.modality_tokens is not None
    output = model(**zoo.tiny_batch(config), output_attentions=False, output_hidden_states=False)
    assert output.cross_attentions is None and output.modality_tokens is None


def test_rows_that_share_an_input_may_give_it_once():
    model = shared_model()
    batch = zoo.tiny_batch(model.config)
    index = torch.tensor([1, 0, 1, 1])
    shared = {**batch, "pixel_values": batch["pixel_values"][:2], "pixel_values_index": index}
    spread = {**batch, "pixel_values": batch["pixel_values"][index]}
    torch.testing.assert_close(model(**shared).logits, model(**spread).logits, **CLOSE)
    presence = torch.tensor([[True, True, True], [False, True, True], [False, True, False], [True, False, True]])
    one, other = (model(**inputs, modality_mask=presence) for inputs in (shared, spread))
    torch.testing.assert_close(one.logits, other.logits, **CLOSE)
    shared["pixel_values"][0] = torch.nan  # used by row 1 alone, which lacks the modality
    torch.testing.assert_close(model(**shared, modality_mask=presence).logits, one.logits, **CLOSE)


@fusion_types
@pytest.mark.parametrize("queries", [None, ["photo"]], ids=["all_look", "photo_looks"])
def test_rows_that_share_a_padded_input_get_its_outputs_and_give_it_their_gradients(fusion_type, queries):
    torch.manual_seed(0)
    asked = {"fusion_queries": queries} if fusion_type == "cross" else {}
    model = lively(
        CrossModalForVQA(zoo.tiny_config(*NAMES, fusion_type=fusion_type, auxiliary_loss_weight=0.5, **asked))
    ).eval()
    batch = zoo.tiny_batch(model.config)
    index = torch.tensor([1, 0, 1, 1])
    values, mask = model.config.input_keys("text")
    once = {**batch, values: batch[values][:2], mask: batch[mask][:2], f"{values}_index": index}
    often = {**batch, values: batch[values][index], mask: batch[mask][index]}
    presence = torch.tensor([[True, True, True], [True, False, True], [True, True, False], [True, True, True]])
    results = []
    for inputs in (once, often):
        model.zero_grad()
        output = model(**inputs, modality_mask=presence, labels=torch.tensor([0, 1, 2, 3]), output_hidden_states=True)
        (output.loss + output.auxiliary_losses.sum()).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append([output.logits, output.auxiliary_logits, output.modality_tokens["text"][[0, 2, 3]], gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    tokens = model.crossmodal(**once, modality_mask=presence)
    assert tokens.last_hidden_state.shape[:2] == tokens.attention_mask.shape
    assert model.crossmodal(**once, return_tokens=False).last_hidden_state is None


@fusion_types
def test_a_modality_by_itself_is_fused_once_for_all_rows_that_share_it(fusion_type):
    model = shared_model(fusion_type)
    images = zoo.tiny_batch(model.config)["pixel_values"]
    index = torch.tensor([1, 0, 1, 1])
    seen = []
    handle = model.crossmodal.fusion.norms["photo"].register_forward_hook(lambda m, i, out: seen.append(len(out)))
    shared = model(pixel_values=images[:2], pixel_values_index=index)
    handle.remove()
    assert seen == [2]
    torch.testing.assert_close(shared.logits, model(pixel_values=images[index]).logits, **CLOSE)


def test_output_comes_as_a_tuple_when_asked():
    model = shared_model()
    batch, labels = zoo.tiny_batch(model.config), torch.tensor([0, 1, 2, 3])
    output = model(**batch, labels=labels)
    as_tuple = model(**batch, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], output.loss, **EXACT)
    torch.testing.assert_close(as_tuple[1], output.logits, **EXACT)
    torch.testing.assert_close(model.crossmodal(**batch, return_dict=False)[0], model.crossmodal(**batch)[0], **EXACT)


def test_wrong_inputs_are_clear_errors():
    model = shared_model()
    batch = zoo.tiny_batch(model.config)
    labels = torch.tensor([0, 1, 2, 3])
    for wrong, error, part in [
        ({"pixel_value": batch["pixel_values"]}, TypeError, "'pixel_value'.*'pixel_values'"),
        ({"eeg_value": batch["eeg_values"]}, TypeError, "'eeg_value'.*'eeg_values'"),
        ({"input_features": torch.randn(4, 80, 10)}, TypeError, "'input_features'"),
        ({"pixel_values": batch["pixel_values"][:3]}, ValueError, "different batch sizes.*'photo': 3"),
        ({"modality_mask": torch.ones(4, 2)}, ValueError, r"modality_mask has shape \(4, 2\).*\(4, 3\)"),
        ({"eeg_values": torch.randn(4, 9, 7)}, ValueError, r"feature values of shape \(4, 9, 7\).*feature_size=6"),
        ({"labels": labels[:3]}, ValueError, r"labels of shape \(3,\)"),
        ({"labels": torch.rand(4, 6)}, ValueError, r"labels of shape \(4, 6\)"),
        ({"labels": labels[:, None]}, ValueError, r"labels of shape \(4, 1\)"),
        ({"labels": labels + 2}, ValueError, r"labels .*5.*num_labels=5"),
        ({"labels": labels - 1}, ValueError, r"labels .*-1.*num_labels=5"),
    ]:
        fresh = copy.deepcopy(model)
        with pytest.raises(error, match=f"(?s){part}"):
            fresh(**{**batch, **wrong})


def vqa(**overrides):
    model = CrossModalForVQA(zoo.tiny_config(**overrides)).eval()
    return model, zoo.tiny_batch(model.config)


def test_single_label_loss_is_the_mean_cross_entropy_of_the_rows_that_count():
    model, batch = vqa()
    labels = torch.tensor([3, -100, 0, 4])
    output = model(**batch, labels=labels)
    log_probabilities = output.logits.log_softmax(1)
    expected = -(log_probabilities[0, 3] + log_probabilities[2, 0] + log_probabilities[3, 4]) / 3
    torch.testing.assert_close(output.loss, expected)
    assert model.config.problem_type == "single_label_classification"
    nothing = model(**batch, labels=torch.full((4,), -100)).loss
    nothing.backward()
    assert nothing == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_soft_target_loss_is_binary_cross_entropy_summed_over_answers():
    model, batch = vqa(problem_type="multi_label_classification")
    targets = torch.tensor([[0, 0.3, 1, 0, 0], [0, 0, 0, 0, 0], [0.6, 0, 0, 0, 0.9], [1, 0, 0, 0, 0]])
    output = model(**batch, labels=targets)
    p = output.logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum() / 4
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**batch, labels=targets.double()).loss, expected)


def test_label_smoothing_is_that_of_torch():
    model, batch = vqa(label_smoothing=0.2)
    labels = torch.tensor([3, 1, 0, 4])
    output = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(output.loss, expected)


def test_labels_that_do_not_fit_the_problem_type_are_refused():
    model, batch = vqa(problem_type="single_label_classification")
    with pytest.raises(ValueError, match="problem_type='single_label_classification'"):
        model(**batch, labels=torch.rand(4, 5))


def test_trainer_is_told_whose_loss_is_a_mean_over_what_it_counts():
    assert CrossModalForVQA.accepts_loss_kwargs is True and CrossModalModel.accepts_loss_kwargs is False


@fusion_types
def test_eight_random_samples_are_learnt_by_heart(fusion_type):
    model = CrossModalForVQA(zoo.tiny_config(fusion_type=fusion_type, hidden_dropout=0.0)).train()
    batch, labels = zoo.tiny_batch(model.config, batch_size=8), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9 and (model.eval()(**batch).logits.argmax(1) == labels).all():
            return
        model.train()
    pytest.fail(f"loss is still {loss.item():.3f}")


def test_base_loads_from_the_folder_of_a_head(tmp_path):
    model = lively(CrossModalForVQA(zoo.tiny_config()))
    model.save_pretrained(tmp_path)
    base, report = CrossModalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and all("classifier" in key for key in report["unexpected_keys"])
    for key, value in base.state_dict().items():
        torch.testing.assert_close(value, model.crossmodal.state_dict()[key], **EXACT)


def test_a_head_loads_from_the_folder_of_a_base_with_its_own_weights_initialised(tmp_path):
    base = lively(CrossModalModel(zoo.tiny_config()))
    base.save_pretrained(tmp_path)
    model, report = CrossModalForVQA.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("classifier.") for key in report["missing_keys"]) and report["missing_keys"]
    for key, value in model.crossmodal.state_dict().items():
        torch.testing.assert_close(value, base.state_dict()[key], **EXACT)
    head = model.classifier
    assert (head.norm.weight == 1).all() and (head.norm.bias == 0).all() and (head.out_proj.bias == 0).all()
    for linear in (head.dense, head.out_proj):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert linear.weight.abs().max() <= bound and linear.weight.std() > 0.3 * bound


def test_every_parameter_that_a_checkpoint_lacks_is_initialised(tmp_path):
    config = zoo.tiny_config(*NAMES, gate="static")
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = CrossModalForVQA(config)
    from safetensors.torch import save_file

    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = CrossModalForVQA.from_pretrained(tmp_path)
    for (name, value), reference in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
        value, reference = value.float(), reference.float()
        assert value.isfinite().all(), name
        if value.numel() > 30:
            torch.testing.assert_close(
                value.std(), reference.std(), rtol=0.6, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}"
            )
        elif reference.std(unbiased=False) == 0:
            torch.testing.assert_close(value, reference, **EXACT, msg=lambda t, name=name: f"{name}: {t}")


def test_resized_word_embeddings_reach_the_text_encoder():
    model, batch = vqa()
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().weight.shape[0] == model.crossmodal.encoders["text"].config.vocab_size == 70
    model(**{**batch, "input_ids": batch["input_ids"] + 20})


@fusion_types
@given(presence=presences)
@settings(max_examples=8)
def test_backends_agree_on_the_whole_model_with_rows_that_lack_modalities(fusion_type, presence):
    model = copy.deepcopy(shared_model(fusion_type))
    batch = zoo.tiny_batch(model.config)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(model(**batch, modality_mask=presence))
    assert_same_output(*outputs, CLOSE)
