"""Each fusion operator against its equation written out, row by row and without padding, and the identities of its paper."""

import math

import pytest
import torch
import zoo
from crossmodal.modeling.fusion_crossmodal import FUSIONS
from test_modeling import lively


NAMES = ("vision", "text", "eeg")
LENGTHS = {"vision": 6, "text": 5, "eeg": 4}
D, HEADS = 16, 2


def operator(fusion_type, names=NAMES, **overrides):
    torch.manual_seed(1)
    config = zoo.tiny_config(*names, fusion_type=fusion_type, **overrides)
    return lively(FUSIONS[fusion_type](config)).eval().double()


def streams(names=NAMES, rows=3):
    """Levels of two fusion layers and masks: row 0 whole, row 1 padded, row 2 without its second modality."""
    generator = torch.Generator().manual_seed(2)
    levels, masks = {}, {}
    for name in names:
        shape = (rows, LENGTHS[name], D)
        levels[name] = [torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(2)]
        masks[name] = torch.ones(shape[:2], dtype=torch.bool)
        masks[name][1, -2:] = False
    if len(names) > 1:
        masks[names[1]][2] = False
    return levels, masks


# The parts of a transformer layer, for one row: tokens (T,D).


def softmax_of(query, key):
    scores = query @ key.T / math.sqrt(query.shape[-1])
    weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
    return weights / weights.sum(dim=1, keepdim=True)


def attention(queries, keys, query_side, key_side):
    """Multi-head attention by loops over heads. `*_side`: modules with the projections of each side."""
    query, key, value = query_side.q_proj(queries), key_side.k_proj(keys), key_side.v_proj(keys)
    heads = []
    for head in range(HEADS):
        part = slice(head * D // HEADS, (head + 1) * D // HEADS)
        heads.append(softmax_of(query[:, part], key[:, part]) @ value[:, part])
    return query_side.o_proj(torch.cat(heads, dim=1))


def self_block(block, x):
    normed = block.norm(x)
    return x + attention(normed, normed, block.attention, block.attention)


def mlp(block, x):
    hidden = block.feed_forward.fc1(block.norm(x))
    return x + block.feed_forward.fc2(torch.nn.functional.gelu(hidden))


def bilinear(gate, x, c):
    return c + gate.out_proj(gate.stream_proj(x) * gate.update_proj(c))


def cross_layer(layer, z):
    s = {n: self_block(layer.self_attn[n], x) if n in layer.self_attn else x for n, x in z.items()}
    new = dict(s)
    for m in layer.gate:
        for n in z:
            if m in z and n != m:
                query, keys = layer.cross_norm[m](s[m]), layer.cross_norm[n](s[n])
                seen = attention(query, keys, layer.cross_attn[m], layer.cross_attn[n])
                new[m] = new[m] + bilinear(layer.gate[m], query, seen)
    return {n: mlp(layer.mlp[n], x) if n in layer.mlp else x for n, x in new.items()}, None


def joint_layer(layer, z):
    whole = mlp(layer.mlp, self_block(layer.self_attn, torch.cat(list(z.values()))))
    return dict(zip(z, whole.split([len(x) for x in z.values()]), strict=True)), None


def mutual_layer(layer, z):
    return {
        m: sum(softmax_of(x, y) @ y for n, y in z.items() if n != m) if len(z) > 1 else x for m, x in z.items()
    }, None


def exchange_layer(layer, z, latents):
    new, collected = {}, []
    for n, x in z.items():
        whole = mlp(layer.mlp[n], self_block(layer.self_attn[n], torch.cat([x, latents])))
        new[n] = whole[: len(x)]
        collected.append(whole[len(x) :])
    return new, sum(collected) / len(collected)


def resample_layer(layer, z, latents):
    normed = {n: layer.token_norm[n](x) for n, x in z.items()}
    queries = layer.latent_norm(latents)
    keys = torch.cat([*normed.values(), queries])
    latents = mlp(layer.latent_mlp, latents + attention(queries, keys, layer.collect, layer.collect))
    new = {}
    for n, x in z.items():
        seen = attention(normed[n], layer.read_norm(latents), layer.read[n], layer.latent_key)
        new[n] = mlp(layer.mlp[n], x + bilinear(layer.gate[n], normed[n], seen))
    return new, latents


LAYERS = {
    "cross": (cross_layer, {}),
    "interlaced": (cross_layer, {"first_query": "text"}),
    "joint": (joint_layer, {}),
    "mutual": (mutual_layer, {}),
    "exchange": (exchange_layer, {"bottleneck": "exchange"}),
    "resample": (resample_layer, {"bottleneck": "resample"}),
    "concat": (lambda layer, z: (z, None), {}),
}


def reference(fusion, layer_function, levels, masks):
    """Tokens of every row, computed from its real tokens alone."""
    rows = []
    for row in range(3):
        z, latents = {}, fusion.latents.weight if hasattr(fusion, "latents") else None
        for index, layer in enumerate(fusion.layers):
            for name in levels:
                if masks[name][row].any():
                    x = levels[name][index][row][masks[name][row]]
                    z[name] = fusion.bridges[name][index](x if index == 0 else z[name] + x)
            z, latents = layer_function(layer, z) if latents is None else layer_function(layer, z, latents)
        rows.append({name: fusion.norms[name](x) for name, x in z.items()})
    return rows


@pytest.mark.parametrize("names", [("vision", "text"), NAMES], ids=["two", "three"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_an_operator_is_its_equation(name, names):
    layer_function, overrides = LAYERS[name]
    fusion = operator("bottleneck" if "bottleneck" in overrides else name, names, **overrides)
    levels, masks = streams(names)
    tokens, *_ = fusion(levels, masks)
    for row, expected in enumerate(reference(fusion, layer_function, levels, masks)):
        for modality, values in expected.items():
            found = tokens[modality][row][masks[modality][row]]
            torch.testing.assert_close(found, values, msg=lambda text, m=modality, r=row: f"row {r}, {m}: {text}")


@torch.no_grad()
def test_no_operator_was_forgotten():
    assert set(FUSIONS) - {"bottleneck"} | {"exchange", "resample"} == set(LAYERS)


@pytest.mark.parametrize(
    ("fusion_type", "overrides"),
    [("cross", {}), ("interlaced", {}), ("bottleneck", {"bottleneck": "resample"})],
    ids=["cross", "interlaced", "resample"],
)
@torch.no_grad()
def test_a_gate_of_zero_leaves_the_unimodal_stream(fusion_type, overrides):
    fusion = operator(fusion_type, ("vision", "text"), gate="static", **overrides)
    levels, masks = streams(("vision", "text"))
    open_gate, *_ = fusion(levels, masks)
    for name, parameter in fusion.named_parameters():
        if ".gate." in name:
            parameter.zero_()
    together, *_ = fusion(levels, masks)
    for name in levels:
        alone, *_ = fusion({name: levels[name]}, {name: masks[name]})
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=0)
        assert not torch.equal(together[name], open_gate[name])


def test_interlaced_lets_one_modality_look_in_each_layer():
    fusion = operator("interlaced", ("vision", "text"), num_fusion_layers=3, first_query="text")
    assert [list(layer.gate) for layer in fusion.layers] == [["text"], ["vision"], ["text"]]
    default = operator("interlaced", ("vision", "text"))
    assert [list(layer.gate) for layer in default.layers] == [["vision"], ["text"]]


@torch.no_grad()
def test_mutual_is_two_way_and_learns_nothing():
    fusion = operator("mutual", ("vision", "text"))
    assert not list(fusion.layers.parameters())
    x, y = torch.randn(2, 8, D, dtype=torch.double), torch.randn(2, 8, D, dtype=torch.double)
    found, _ = fusion.layers[0]({"vision": x, "text": y}, {"vision": None, "text": None})
    # MCA: A = softmax(D P^T / sqrt(d)) P, B = softmax(P D^T / sqrt(d)) D, F = A + B.
    scores = torch.einsum("bid,bjd->bij", x, y) / math.sqrt(D)
    expected = scores.softmax(2) @ y + scores.transpose(1, 2).softmax(2) @ x
    torch.testing.assert_close(found["vision"] + found["text"], expected)
    swapped, _ = fusion.layers[0]({"vision": y, "text": x}, {"vision": None, "text": None})
    torch.testing.assert_close(swapped["vision"] + swapped["text"], expected)


@torch.no_grad()
def test_bottleneck_modalities_meet_in_the_latents_alone():
    """What a modality learns of another in the first layer comes one layer later (MBT), and through L latents."""
    fusion = operator("bottleneck", ("vision", "text"), bottleneck="exchange", num_latents=2)
    layer, latents = fusion.layers[0], torch.randn(3, 2, D, dtype=torch.double)
    levels, _ = streams(("vision", "text"))
    tokens, masks = {n: x[0] for n, x in levels.items()}, {"vision": None, "text": None}
    changed = {**tokens, "text": tokens["text"].flip(0)}
    before, after = layer(tokens, latents, masks), layer(changed, latents, masks)
    torch.testing.assert_close(before[0]["vision"], after[0]["vision"], rtol=0, atol=0)
    assert not torch.equal(before[1], after[1])
    assert not torch.equal(fusion(levels, masks)[0]["vision"], fusion({**levels, "text": [
        x.flip(0) for x in levels["text"]]}, masks)[0]["vision"])  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_attention_maps_are_named_and_whole(name):
    overrides = LAYERS[name][1]
    fusion = operator("bottleneck" if "bottleneck" in overrides else name, **overrides)
    levels, masks = streams()
    _, layers, _ = fusion(levels, masks, output_attentions=True)
    plain, *_ = fusion(levels, masks)
    tokens, *_ = fusion(levels, masks, output_attentions=True)
    for modality in NAMES:
        torch.testing.assert_close(tokens[modality], plain[modality])
    for layer in layers:
        sums = {}
        for key, weights in layer.items():
            looking, looked_at = key.split("<-")
            lengths = [LENGTHS.get(part, 4) for part in (looking, looked_at)]
            assert weights.shape[0] == 3 and list(weights.shape[2:]) == lengths, key
            sums.setdefault(looking, {})[looked_at] = weights.sum(-1)
        for looking, parts in sums.items():
            if (name, looking) == ("exchange", "latents"):
                continue  # once per modality, and what they give to each other is left out
            if name in ("joint", "exchange") or looking == "latents":
                torch.testing.assert_close(sum(parts.values())[0], torch.ones_like(sum(parts.values())[0]))
            else:
                for looked_at, total in parts.items():
                    whole = torch.ones_like(total[0])
                    torch.testing.assert_close(total[0], whole, msg=lambda t, k=(looking, looked_at): f"{k}: {t}")
