"""Kernels for long inputs: each against its equation written out, with padding, in a model, and with what it cannot do."""

import math

import pytest
import torch
import zoo
from crossmodal.modeling.kernels_crossmodal import KERNELS
from test_encoders import compose

from crossmodal import CrossModalConfig, CrossModalModel, FeatureSequenceConfig


HEADS, WIDTH = 2, 8


def kernel(name, **overrides):
    config = FeatureSequenceConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, **overrides)
    config._attn_implementation = "sdpa"
    made = KERNELS[name](config, HEADS)
    if name == "linear":
        made.features.copy_(made.draw_features())
    elif name == "latents":
        torch.nn.init.normal_(made.latents)
    return made.eval()


def states(num_queries, num_keys, rows=3, width=WIDTH):
    shapes = ((rows, HEADS, num_queries, width), *[(rows, HEADS, num_keys, width)] * 2)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def lengths_to_mask(lengths, size):
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def windowed_by_hand(query, key, value, key_mask, query_ends, window, front):
    """One query at a time, over plain lists of the keys that it may see."""
    output = torch.zeros(len(query), query.shape[2], HEADS, WIDTH)
    for row in range(len(query)):
        keys = int(key_mask[row].nonzero().max()) + 1
        for i in range(query_ends[row]):
            centre = math.floor((i + 0.5) * keys / query_ends[row])
            seen = [j for j in range(keys) if key_mask[row, j] and (abs(j - centre) <= window or j < front)]
            if seen:
                for head in range(HEADS):
                    scores = key[row, head, seen] @ query[row, head, i] / math.sqrt(WIDTH)
                    output[row, i, head] = scores.softmax(0) @ value[row, head, seen]
    return output


@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(90, 90), (61, 190), (200, 50), (7, 300), (40, 1)])
def test_window_equals_the_loop_over_queries(num_queries, num_keys, front):
    query, key, value = states(num_queries, num_keys)
    ends = [num_queries, max(1, num_queries - 13), max(1, num_queries // 2)]
    query_mask = lengths_to_mask(ends, num_queries)
    mask = lengths_to_mask([num_keys, max(1, num_keys // 3), num_keys], num_keys)
    mask[2, num_keys // 4 : num_keys // 2] = False
    made = kernel("window", attention_window=3, attention_global_tokens=front)
    for key_mask, own_mask, own_ends in ((mask, query_mask, ends), (torch.ones_like(mask), None, [num_queries] * 3)):
        expected = windowed_by_hand(query, key, value, key_mask, own_ends, 3, front)
        given = None if own_mask is None else key_mask
        for maps in (False, True):
            output, weights = made(query, key, value, given, own_mask, maps)
            for row, end in enumerate(own_ends):
                torch.testing.assert_close(output[row, :end], expected[row, :end])
            assert (weights is not None) == maps
        torch.testing.assert_close(torch.einsum("bhqk,bhkd->bqhd", weights, value), output)


def test_window_in_blocks_has_the_gradients_of_the_dense_form():
    made = kernel("window", attention_window=4, attention_global_tokens=1)
    mask = lengths_to_mask([150, 111, 80], 150)
    gradients = []
    for maps in (False, True):
        torch.manual_seed(0)
        tensors = states(120, 150)
        made(*tensors, mask, None, maps)[0].square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for blocks, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(blocks, dense)


@pytest.mark.parametrize("ends", [[400, 1], [400, 5], [400, 390]], ids=str)
def test_window_costs_no_more_for_rows_with_few_queries(ends, monkeypatch):
    made, seen = kernel("window", attention_window=4), []
    real = made._in_blocks
    monkeypatch.setattr(made, "_in_blocks", lambda *given: seen.append(given[-2:]) or real(*given))
    query, key, value = states(400, 400, rows=2)
    made(query, key, value, torch.ones(2, 400, dtype=torch.bool), lengths_to_mask(ends, 400))
    size, span = seen[0]
    # Scores and gathered keys of all blocks, against those of rows without padding.
    made(query, key, value)
    whole_size, whole_span = seen[1]
    cost = [-(-400 // s) * k * (s + WIDTH) for s, k in ((size, span), (whole_size, whole_span))]
    assert cost[0] < (1.5 if ends[1] != 5 else 6) * cost[1], (seen, cost)


@pytest.mark.parametrize("name", KERNELS)
def test_padding_changes_nothing(name):
    made = kernel(name, attention_window=5)
    query, key, value = states(70, 130)
    plain = made(query, key, value)[0]
    pad = torch.nn.functional.pad
    padded = [pad(query, (0, 0, 0, 33)), pad(key, (0, 0, 0, 21), value=3.0), pad(value, (0, 0, 0, 21), value=1e3)]
    masks = lengths_to_mask([130] * 3, 151), lengths_to_mask([70] * 3, 103)
    for maps in (False, True):
        torch.testing.assert_close(made(*padded, *masks, maps)[0][:, :70], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_maps_are_what_the_output_is_made_of(name):
    made = kernel(name, attention_window=5)
    query, key, value = states(40, 60)
    mask = lengths_to_mask([60, 31, 5], 60)
    output, weights = made(query, key, value, mask, None, True)
    torch.testing.assert_close(torch.einsum("bhqk,bhkd->bqhd", weights, value), output, rtol=1e-4, atol=1e-5)
    assert (weights >= 0).all() and (weights.masked_select(~mask[:, None, None]) == 0).all()
    if name != "window":  # where a gap in the keys may leave a query with none
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, HEADS, 40))


def test_linear_approaches_softmax_of_the_cosine_with_more_features():
    """Error falls as 1 / sqrt(m) (Choromanski et al. 2021), and none is left of a masked key."""
    torch.manual_seed(0)
    query, key, value = (tensor.detach() for tensor in states(50, 200))
    mask = lengths_to_mask([200, 120, 60], 200)
    cosine = torch.nn.functional.normalize(query, dim=-1) @ torch.nn.functional.normalize(key, dim=-1).mT
    exact = cosine.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ value
    errors = {}
    for count in (64, 1024, 16384):
        runs = [kernel("linear", num_random_features=count)(query, key, value, mask)[0] for _ in range(8)]
        errors[count] = (
            torch.stack([(run.detach().transpose(1, 2) - exact).square().mean() for run in runs]).mean().sqrt()
        )
    assert errors[64] / errors[1024] == pytest.approx(4, rel=0.35)
    assert errors[1024] / errors[16384] == pytest.approx(4, rel=0.35)
    assert errors[1024] < 0.2 * exact.square().mean().sqrt()


def test_linear_temperature_is_bounded_and_learned():
    made = kernel("linear")
    query, key, value = states(10, 20)
    made(query, key, value)[0].square().sum().backward()
    assert (made.temperature.grad != 0).all()
    with torch.no_grad():
        made.temperature.fill_(1e4)
    output, weights = made(1e4 * query, 1e4 * key, value, None, None, True)
    assert output.isfinite().all() and weights.max() < 0.9


def test_linear_draws_features_in_training_only_and_keeps_rows_orthogonal():
    made = kernel("linear", num_random_features=WIDTH)
    tensors = states(5, 9)
    torch.testing.assert_close(made(*tensors)[0], made(*tensors)[0], rtol=0, atol=0)
    overlap = made.features @ made.features.T
    torch.testing.assert_close(overlap, torch.diag(overlap.diagonal()), rtol=0, atol=1e-4)
    made.train()
    assert not torch.equal(made(*tensors)[0], made(*tensors)[0])


def test_latents_equal_their_equation():
    made = kernel("latents", num_latents=3)
    query, key, value = states(5, 9, rows=2)
    mask = lengths_to_mask([9, 4], 9)
    output, _ = made(query, key, value, mask)
    for row, end in enumerate((9, 4)):
        for head in range(HEADS):
            collecting = (made.latents[head] @ key[row, head, :end].T / math.sqrt(WIDTH)).softmax(-1)
            keys, values = collecting @ key[row, head, :end], collecting @ value[row, head, :end]
            expected = (query[row, head] @ keys.T / math.sqrt(WIDTH)).softmax(-1) @ values
            torch.testing.assert_close(output[row, :, head], expected)


def sequences(**overrides):
    encoder = FeatureSequenceConfig(feature_size=3, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    return CrossModalConfig(
        modalities={"audio_track": encoder, "frames": encoder},
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_latents=5,
        attention_window=4,
        hidden_dropout=0.0,
        **overrides,
    )


@pytest.mark.parametrize("fusion_type", ["cross", "interlaced", "joint", "bottleneck"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_model_trains_saves_and_loads_with_it(name, fusion_type, tmp_path):
    if name == "window" and fusion_type in ("joint", "bottleneck"):
        pytest.skip("refused, see below")
    model = CrossModalModel(sequences(attention_kernel=name, fusion_type=fusion_type))
    lengths = lengths_to_mask([50, 31], 50), lengths_to_mask([120, 70], 120)
    batch = {
        "audio_track_values": torch.randn(2, 50, 3),
        "frames_values": torch.randn(2, 120, 3),
        "audio_track_mask": lengths[0],
        "frames_mask": lengths[1],
    }
    model(**batch).pooler_output.square().sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused, unused
    model.eval().save_pretrained(tmp_path)
    again = CrossModalModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(**batch, output_attentions=True)
        torch.testing.assert_close(again(**batch).pooler_output, model(**batch).pooler_output, rtol=0, atol=0)
    # Maps cost a dense form, and change nothing.
    torch.testing.assert_close(expected.pooler_output, model(**batch).pooler_output, rtol=1e-4, atol=1e-5)
    assert all(weights is not None for layer in expected.cross_attentions for weights in layer.values())
    # A row that lacks a modality neither breaks it nor is broken.
    present = torch.tensor([[True, True], [True, False]])
    lacking = model(**batch, modality_mask=present).pooler_output
    torch.testing.assert_close(lacking[0], model(**batch).pooler_output[0], rtol=1e-4, atol=1e-5)
    assert lacking.isfinite().all() and not torch.allclose(lacking[1], model(**batch).pooler_output[1])


def test_a_kernel_may_be_changed_on_a_trained_model(tmp_path):
    CrossModalModel(sequences()).save_pretrained(tmp_path)
    model = CrossModalModel.from_pretrained(tmp_path, attention_kernel="linear").eval()
    features = [b for n, b in model.named_buffers() if n.endswith("features")]
    assert features and all(b.isfinite().all() and 0.5 < b.std() < 1.5 for b in features)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_kernel": "linaer"}, "attention_kernel='linaer' is unknown. Expected one of .'linear'"),
        ({"attention_kernel": "window", "fusion_type": "joint"}, "fusion_type='joint' puts tokens of several"),
        ({"attention_kernel": "window", "fusion_type": "bottleneck"}, "'cross' or 'interlaced'"),
        ({"attention_kernel": "linear", "fusion_type": "mutual"}, "fusion_type='mutual' is exact"),
        ({"attention_kernel": "linear", "attention_dropout": 0.1}, "attention_dropout=0.1 cannot act"),
        ({"attention_kernel": "window", "attention_window": -1}, "attention_window=-1. Expected at least 0"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_before_any_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        sequences(**overrides) if "attention_window" not in overrides else FeatureSequenceConfig(**overrides)


def test_window_is_refused_where_an_axis_has_no_order():
    with pytest.raises(ValueError, match=r"modality 'vision' \(type 'vision'\) has none"):
        zoo.tiny_config(attention_kernel="window")
    spectrogram = compose("audio-spectrogram-transformer")[0].config.audio_config
    with pytest.raises(ValueError, match="modality 'audio'"):
        CrossModalConfig(modalities={"audio": spectrogram}, attention_kernel="window")
    points = FeatureSequenceConfig(feature_size=3, use_positions=False)
    with pytest.raises(ValueError, match="modality 'points'"):
        CrossModalConfig(modalities={"points": points}, attention_kernel="window")
    with pytest.raises(ValueError, match=r"'points' \(type 'points'\) has none"):
        zoo.tiny_config("points", "text", attention_kernel="window")
    with pytest.raises(ValueError, match="use_positions=False says that they have none"):
        FeatureSequenceConfig(use_positions=False, attention_kernel="window")
