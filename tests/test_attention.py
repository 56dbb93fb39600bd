"""The attention module against torch's own, across backends, and with keys that must not count."""

import pytest
import torch
import zoo
from crossmodal.modeling.attention_crossmodal import Dropout, MultiHeadAttention
from torch import nn


B, TQ, TK, D, HEADS = 3, 5, 7, 16, 4


def attention(implementation="sdpa", **overrides):
    config = zoo.tiny_config(num_attention_heads=HEADS, **overrides)
    config._attn_implementation = implementation
    return MultiHeadAttention(config).eval()


def attend(module, query, keys, mask=None, output_attentions=False):
    return module(query, module.project_key_value(keys), mask, output_attentions)


def key_mask():
    mask = torch.ones(B, TK, dtype=torch.bool)
    mask[0, 4:] = mask[2, :2] = False
    return mask


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [None, key_mask()], ids=["whole", "padded"])
@pytest.mark.parametrize("query_length", [TQ, TK, 1])
def test_equals_torch_multihead_attention(implementation, mask, query_length):
    ours, theirs = attention(implementation), nn.MultiheadAttention(D, HEADS, batch_first=True).eval()
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    query, keys = torch.randn(B, query_length, D), torch.randn(B, TK, D)
    expected, maps = theirs(
        query, keys, keys, key_padding_mask=None if mask is None else ~mask, average_attn_weights=False
    )
    torch.testing.assert_close(attend(ours, query, keys, mask)[0], expected)
    output, weights = attend(ours, query, keys, mask, output_attentions=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, maps)


@pytest.mark.parametrize("mask", [None, key_mask()], ids=["whole", "padded"])
def test_backends_agree_and_maps_come_under_each(mask):
    eager, sdpa = attention("eager"), attention("sdpa")
    sdpa.load_state_dict(eager.state_dict())
    query, keys = torch.randn(B, TQ, D), torch.randn(B, TK, D)
    torch.testing.assert_close(attend(eager, query, keys, mask)[0], attend(sdpa, query, keys, mask)[0])
    maps = [attend(module, query, keys, mask, output_attentions=True)[1] for module in (eager, sdpa)]
    torch.testing.assert_close(*maps, rtol=0, atol=0)
    assert maps[0].shape == (B, HEADS, TQ, TK)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(B, HEADS, TQ))
    assert attend(sdpa, query, keys, mask)[1] is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("output_attentions", [False, True])
def test_a_row_without_any_key_gives_zero_and_finite_gradients(implementation, output_attentions):
    module = attention(implementation)
    query, keys = torch.randn(B, TQ, D, requires_grad=True), torch.randn(B, TK, D, requires_grad=True)
    mask = key_mask()
    mask[1] = False
    output, weights = attend(module, query, keys, mask, output_attentions)
    assert (output[1] == 0).all() and (output[0] != 0).all()
    if output_attentions:
        assert (weights[1] == 0).all()
    output.square().sum().backward()
    for tensor in (query, keys, *module.parameters()):
        assert tensor.grad.isfinite().all()
    assert (keys.grad[1] == 0).all() and (query.grad[1] == 0).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masking_a_key_equals_deleting_it(implementation):
    module = attention(implementation)
    query, keys = torch.randn(B, TQ, D), torch.randn(B, TK, D)
    mask = torch.ones(B, TK, dtype=torch.bool)
    mask[:, 3] = False
    kept = torch.cat([keys[:, :3], keys[:, 4:]], dim=1)
    torch.testing.assert_close(attend(module, query, keys, mask)[0], attend(module, query, kept)[0])
    changed = keys.clone()
    changed[:, 3] = 1e4
    torch.testing.assert_close(
        attend(module, query, changed, mask)[0], attend(module, query, keys, mask)[0], rtol=0, atol=0
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("query_length", [1, 3, TK, 2 * TK])
def test_every_query_sees_every_key_whatever_the_lengths(implementation, query_length):
    # transformers' sdpa path takes a module without `is_causal` for causal, and cuts the keys.
    module = attention(implementation)
    query = torch.randn(1, query_length, D)
    keys = torch.randn(1, TK, D, requires_grad=True)
    for position in {0, query_length - 1}:
        (gradient,) = torch.autograd.grad(attend(module, query, keys)[0][0, position].sum(), keys)
        assert (gradient.abs().sum(-1) > 0).all()


def test_dropout_of_attention_acts_in_training_only():
    module = attention("sdpa", attention_dropout=0.9)
    query, keys = torch.randn(B, TQ, D), torch.randn(B, TK, D)
    torch.testing.assert_close(attend(module, query, keys)[0], attend(module, query, keys)[0], rtol=0, atol=0)
    module.train()
    assert not torch.equal(attend(module, query, keys)[0], attend(module, query, keys)[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bfloat16_stays_close_to_float32(implementation):
    module = attention(implementation)
    query, keys = torch.randn(B, TQ, D), torch.randn(B, 300, D)
    exact = attend(module, query, keys)[0]
    module.to(torch.bfloat16)
    rounded = attend(module, query.bfloat16(), keys.bfloat16())[0]
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_that_of_torch_in_all_but_its_draws(p, dtype):
    torch.manual_seed(0)
    dropout, tokens = Dropout(p), torch.ones(101, 7, 131, dtype=dtype, requires_grad=True)
    dropped = dropout(tokens)
    dropped.sum().backward()
    assert dropped.dtype == dtype and tokens.grad.equal(dropped)
    dropped = dropped.detach()
    kept = (dropped != 0).double()
    assert dropped.max().item() == pytest.approx(1 / (1 - p), rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    # Five deviations of a mean of independent draws, over all and over each channel; and neighbours know nothing of each other.
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5)
    assert (kept.mean((0, 1)) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 707) ** 0.5
    flat = (kept - kept.mean()).flatten()
    for step in (1, 2, 3, 4, 131):
        assert (flat[step:] * flat[:-step]).mean().abs() < 5 * p * (1 - p) / flat.numel() ** 0.5
    torch.manual_seed(0)
    assert dropout(tokens).equal(dropped) and not dropout(tokens).equal(dropped)
    assert dropout.eval()(tokens) is tokens and Dropout(0.0)(tokens).equal(tokens) and not Dropout(1.0)(tokens).any()
    assert Dropout(0.9999999)(tokens).isfinite().all() and Dropout(p)(tokens[:0]).shape == (0, 7, 131)
