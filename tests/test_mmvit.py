"""MMViT: its attention and layers against loops, the identities of its views, padding, weights of images in models of sound."""

import copy
import io
import json
import math

import datasets
import numpy as np
import pytest
import soundfile
import torch
import zoo
from crossmodal.modeling.mmvit_crossmodal import CrossViewBlock, PoolingAttention, _Stage
from crossmodal.training.ablate import variants_of
from crossmodal.training.benchmark import flops_of
from crossmodal.training.building import build
from crossmodal.training.recipes import Recipe
from crossmodal.training.tasks import TASKS
from crossmodal.training.train import train
from safetensors.torch import load_file, save_file
from test_modeling import lively
from transformers import AutoModel, WhisperFeatureExtractor
from world import TINY_RECIPE, picture, run_as_stranger

from crossmodal import (
    CrossModalConfig,
    CrossModalForSequenceClassification,
    CrossModalModel,
    CrossModalProcessor,
    MMViTConfig,
    MMViTEncoder,
)


EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Three views of an image that is not square, on grids of 6 x 11, 6 x 6 and 3 x 6.
VIEWS = {
    "image_size": [12, 22],
    "patch_size": [3, [3, 5], 5],
    "patch_stride": [2, [2, 4], 4],
    "embed_dim": 8,
    "num_heads": 2,
    "depths": [1, 2, 1],
    "key_value_stride": 2,
    "cross_view_gate": 0.7,
    "drop_path_rate": 0.0,
}
SOUND = VIEWS | {"num_channels": 1}


def encoder(**changes):
    return lively(MMViTEncoder(MMViTConfig(**VIEWS | changes))).eval()


# Loops that know nothing of the code under test but the names of its weights.


def loop_norm(vector, norm):
    vector = vector - vector.mean()
    return vector / (vector.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def loop_pooled(maps, pooling, stride):
    """maps (h,w,d) of one head: a sum over 3 x 3 cells, channel by channel."""
    height, width, _ = maps.shape
    pooled = []
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            total = 0
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        total = total + pooling.conv.weight[:, 0, dy + 1, dx + 1] * maps[y + dy, x + dx]
            pooled.append(((y, x), loop_norm(total, pooling.norm)))
    return pooled


def loop_attention(attention, maps, heads, query_stride, key_stride):
    """maps (h,w,input) to {(y, x): (D,)}; places are those of the grid that was pooled."""
    width = attention.o_proj.in_features
    projected = maps @ attention.qkv_proj.weight.T + attention.qkv_proj.bias
    d, found = width // heads, {}
    unit = math.gcd(query_stride, key_stride)
    tables = [positions.table.weight for positions in (attention.rows, attention.columns)]
    for head in range(heads):
        query, key, value = (
            loop_pooled(projected[..., part * width + head * d :][..., :d], attention.poolings[part], stride)
            for part, stride in enumerate((query_stride, key_stride, key_stride))
        )
        for place, q in query:
            scores = []
            for other, k in key:
                score = q @ k / math.sqrt(d)
                for axis in (0, 1):
                    middle = len(tables[axis]) // 2
                    score = score + q @ tables[axis][middle + (place[axis] - other[axis]) // unit]
                scores.append(score)
            weights = torch.stack(scores).softmax(0)
            seen = sum(weight * v for weight, (_, v) in zip(weights, value, strict=True)) + q
            found.setdefault(place, []).append(seen)
    return {place: attention.o_proj(torch.cat(parts)) for place, parts in found.items()}


def loop_layer(layer, maps, heads, query_stride, key_stride):
    """maps (h,w,D) to (h',w',D')."""
    height, width, _ = maps.shape
    normed = torch.stack([torch.stack([loop_norm(cell, layer.norm) for cell in row]) for row in maps])
    rows = []
    attended = loop_attention(layer.attention, normed, heads, query_stride, key_stride)
    for y in range(0, height, query_stride):
        rows.append([])
        for x in range(0, width, query_stride):
            kept = maps[y, x]
            if query_stride > 1:
                near = [
                    layer.skip_proj(normed[r, c])
                    for r in range(max(0, y - 1), min(height, y + 2))
                    for c in range(max(0, x - 1), min(width, x + 2))
                ]
                kept = torch.stack(near).amax(0)
            kept = kept + attended[y, x]
            hidden = torch.nn.functional.gelu(layer.mlp.fc1(loop_norm(kept, layer.mlp_norm)))
            rows[-1].append(kept + layer.mlp.fc2(hidden))
    return torch.stack([torch.stack(row) for row in rows])


def loop_mvit(view, config, image):
    """A plain MViTv2 over an image (C,H,W): the maps (h,w,D) of every level."""
    kernel, (size, stride) = view.patch_embeddings.weight, (config.patch_size[0], config.patch_stride[0])
    _, height, width = image.shape
    maps = []
    for y in range(0, height, stride):
        maps.append([])
        for x in range(0, width, stride):
            total = view.patch_embeddings.bias
            for dy in range(size):
                for dx in range(size):
                    r, c = y + dy - size // 2, x + dx - size // 2
                    if 0 <= r < height and 0 <= c < width:
                        total = total + kernel[:, :, dy, dx] @ image[:, r, c]
            maps[-1].append(total)
    levels = [torch.stack([torch.stack(row) for row in maps])]
    for stage, depth in enumerate(config.depths):
        maps = levels[-1]
        for layer in range(depth):
            heads, key_stride = config.num_heads * 2**stage, max(1, config.key_value_stride // 2**stage)
            begins = stage > 0 and layer == 0
            maps = loop_layer(view.stages[stage][layer], maps, heads, 2 if begins else 1, key_stride)
        levels.append(maps)
    levels[-1] = torch.stack([torch.stack([loop_norm(cell, view.norm) for cell in row]) for row in levels[-1]])
    return levels


# The layers


@pytest.mark.parametrize(("query_stride", "key_stride"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_pooling_attention_is_its_equation(query_stride, key_stride):
    config = MMViTConfig(**VIEWS | {"key_value_stride": key_stride})
    attention = lively(PoolingAttention(config, 6, _Stage(config, 0), (5, 7), query_stride))
    maps = torch.randn(1, 5, 7, 6)
    expected = loop_attention(attention, maps[0], 2, query_stride, key_stride)
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        found = attention(maps)[0]
        assert found.shape == (-(-5 // query_stride), -(-7 // query_stride), 8)
        for (y, x), vector in expected.items():
            torch.testing.assert_close(found[y // query_stride, x // query_stride], vector, **CLOSE)


def test_one_view_is_a_plain_multiscale_vision_transformer():
    one = encoder(patch_size=[3], patch_stride=[2], depths=[1, 2])
    image = torch.randn(3, 12, 22)
    assert not one.crossings
    for (stream,), expected in zip(one.streams(image[None]), loop_mvit(one.views[0], one.config, image), strict=True):
        torch.testing.assert_close(stream[0][0], expected, **CLOSE)


def test_views_look_at_each_other_through_a_gate():
    config = MMViTConfig(**VIEWS)
    block = lively(CrossViewBlock(config, _Stage(config, 1), _Stage(config, 0)))
    streams = [(torch.randn(1, 5, 6, 8), None), (torch.randn(1, 3, 4, 8), None), (torch.randn(1, 2, 2, 8), None)]
    for view, (found, _) in enumerate(block(streams)):
        attention, query = block.attentions[view], block.norms[view](streams[view][0])
        seen = [
            vector
            for other, (maps, _) in enumerate(streams)
            if other != view
            for _, vector in loop_pooled(maps[0], block.poolings[other], 1)
        ]
        keys, values = (proj(torch.stack(seen)) for proj in (attention.k_proj, attention.v_proj))
        asked, heads = attention.q_proj(query[0]), []
        for head in (slice(0, 4), slice(4, 8)):
            weights = (asked[..., head] @ keys[:, head].T / 2).softmax(-1)
            heads.append(weights @ values[:, head])
        update = attention.o_proj(torch.cat(heads, dim=-1))
        expected = streams[view][0][0] + block.gates[view].weight.tanh() * update
        torch.testing.assert_close(found[0], expected, **CLOSE)


def alone(model, view):
    """The model of one view of another, with its weights."""
    config = copy.deepcopy(model.config)
    config.patch_size, config.patch_stride = [config.patch_size[view]], [config.patch_stride[view]]
    single, prefix = MMViTEncoder(config).eval(), f"views.{view}."
    state = {key.replace(prefix, "views.0."): value for key, value in model.state_dict().items() if prefix in key}
    single.load_state_dict(state)
    return single


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_with_gates_at_0_each_view_is_as_if_alone_bit_for_bit(gate):
    model, values = encoder(), torch.randn(2, 3, 12, 22)
    for crossing in model.crossings:
        for each in crossing.gates:
            torch.nn.init.constant_(each.weight, gate)
    levels = model.streams(values)
    for view in range(3):
        for number, ((expected, _),) in enumerate(alone(model, view).streams(values)):
            assert torch.equal(levels[number][view][0], expected) is (gate == 0 or number == 0)


def test_views_in_another_order_are_streams_in_another_order():
    model, order, values = encoder(), [2, 0, 1], torch.randn(2, 3, 12, 22)
    config = copy.deepcopy(model.config)
    config.patch_size = [config.patch_size[view] for view in order]
    config.patch_stride = [config.patch_stride[view] for view in order]
    other, state = MMViTEncoder(config).eval(), {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        place = 1 if parts[0] == "views" else 3
        parts[place] = str(order.index(int(parts[place])))
        state[".".join(parts)] = value
    other.load_state_dict(state)
    for one, two in zip(model.streams(values), other.streams(values), strict=True):
        for place, view in enumerate(order):
            torch.testing.assert_close(two[place][0], one[view][0], **CLOSE)


def test_what_is_farther_apart_than_the_tables_reach_counts_as_the_farthest():
    model = encoder(patch_size=[3], patch_stride=[2], image_size=[4, 4], depths=[1])
    rows = model.views[0].stages[0][0].attention.rows
    assert rows.table.weight.shape == (2 * 1 + 1, 4)
    apart = rows(6, 3)
    torch.testing.assert_close(apart[5, 0], rows.table.weight[2], **EXACT)
    torch.testing.assert_close(apart[0, 2], rows.table.weight[0], **EXACT)
    torch.testing.assert_close(apart[4, 2], rows.table.weight[1], **EXACT)
    assert model(torch.randn(1, 3, 30, 18))[0][-1].shape == (1, 15 * 9, 8)


# Levels, and what the family asks of an encoder


def test_tokens_of_a_level_are_those_of_all_views_the_first_one_last():
    model, values = encoder(), torch.randn(2, 3, 12, 22)
    levels, streams = model(values)[0], model.streams(values)
    assert [level.shape for level in levels] == [(2, 2 * 3 + 2 * 2 + 1 * 2, width) for width in (8, 8, 16, 32)]
    # The grids of 6 x 11, 6 x 6 and 3 x 6 halve twice.
    for level, stream, stride in zip(levels, streams, (4, 4, 2, 1), strict=True):
        for tokens, (maps, _), grid in zip(
            level.split([2, 4, 6], dim=1), stream[::-1], [(1, 2), (2, 2), (2, 3)], strict=True
        ):
            for y in range(grid[0]):
                for x in range(grid[1]):
                    cells = maps[:, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride]
                    torch.testing.assert_close(tokens[:, y * grid[1] + x], cells.mean((1, 2)), **CLOSE)
    base = CrossModalModel(CrossModalConfig(modalities={"vision": model.config}, **zoo.TINY)).eval()
    assert base(values, output_attentions=True).token_grids == {"vision": (2, 3)}


def padded(frames=(22, 9), seed=0):
    mask = torch.arange(22) < torch.tensor(frames)[:, None]
    return torch.randn(len(frames), 12, 22, generator=torch.Generator().manual_seed(seed)), mask


def test_padded_frames_change_no_real_token_and_take_no_gradient():
    model = encoder(**SOUND)
    values, mask = padded()
    values.requires_grad_()
    levels, real = model(values, mask)
    short, _ = model(values[1:, :, :9])
    for level, expected in zip(levels, short, strict=True):
        torch.testing.assert_close(level[1][real[1]], expected[0], **CLOSE)
    torch.testing.assert_close(model(values, mask & True)[0][-1][0], model(values[:1])[0][-1][0], **CLOSE)
    sum(level[real].square().sum() for level in levels).backward()
    assert (values.grad[1, :, 9:] == 0).all() and values.grad[1, :, :9].any(dim=0).all()
    poisoned = torch.where(mask[:, None], values.detach(), torch.nan)
    for level, other in zip(levels, model(poisoned, mask)[0], strict=True):
        torch.testing.assert_close(other, level.detach(), **EXACT)
    assert all(level.isfinite().all() for level in model(values, torch.zeros_like(mask))[0])


def test_gaps_in_the_mask_are_padding_too():
    # As CutMix along time leaves them.
    model, (values, mask) = encoder(**SOUND), padded((22, 22))
    mask[1, 8:16] = False
    poisoned = torch.where(mask[:, None], values, 99.0)
    torch.testing.assert_close(model(poisoned, mask)[0][-1], model(values, mask)[0][-1], **EXACT)


def beside_text():
    modalities = {name: MMViTConfig(**kind) for name, kind in (("vision", VIEWS), ("audio", SOUND))}
    modalities["text"] = zoo.tiny_encoder("bert")[0]
    modalities["text"].hidden_dropout_prob = modalities["text"].attention_probs_dropout_prob = 0.0
    config = CrossModalConfig(
        modalities=modalities, num_labels=3, hidden_dropout=0.0, classifier_dropout=0.0, **zoo.TINY
    )
    spectrograms, mask = padded()
    batch = {
        "pixel_values": torch.randn(2, 3, 12, 22),
        "input_features": spectrograms,
        "audio_attention_mask": mask,
        "input_ids": torch.randint(5, 50, (2, 4)),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
    }
    return lively(CrossModalForSequenceClassification(config)).eval(), batch


def test_images_sound_and_text_are_fused_and_what_is_absent_changes_nothing():
    model, batch = beside_text()
    assert [model.config.input_keys(n) for n in ("vision", "audio")] == [
        ("pixel_values", None), ("input_features", "audio_attention_mask"),
    ]  # fmt: skip
    assert model.config.levels_of("vision") == [2, 3]
    presence = torch.tensor([[True, False, True], [True, True, False]])
    expected = model(**batch, modality_mask=presence)
    poisoned = {key: value.clone() for key, value in batch.items()}
    poisoned["input_features"][0] = torch.nan
    poisoned["input_features"][1, :, 9:] = torch.inf
    torch.testing.assert_close(model(**poisoned, modality_mask=presence).logits, expected.logits, **EXACT)
    lone = model(pixel_values=batch["pixel_values"][1:], input_features=batch["input_features"][1:, :, :9])
    torch.testing.assert_close(lone.logits, expected.logits[1:], **CLOSE)


def test_gradient_reaches_every_parameter_with_and_without_checkpointing():
    plain, batch = beside_text()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model.train()(**batch, labels=torch.tensor([0, 1])).loss.backward()
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.crossmodal.encoders.modules())
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None and (".encoders." not in name or "text" in name or one.grad.any()), name
        torch.testing.assert_close(other.grad, one.grad)


def test_bfloat16_runs_forward_and_backward():
    model, batch = beside_text()
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    output = model.to(torch.bfloat16).train()(**batch, labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_both_backends_of_attention_agree():
    model, batch = beside_text()
    logits = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.crossmodal.encoders["audio"].config._attn_implementation == implementation
        logits[implementation] = model(**batch).logits
    torch.testing.assert_close(logits["sdpa"], logits["eager"], **CLOSE)


def test_layers_are_dropped_in_training_alone_the_last_ones_most_often():
    model, values = encoder(drop_path_rate=0.9), torch.randn(2, 3, 12, 22)
    rates = [layer.drop_path.drop_prob for stage in model.views[0].stages for layer in stage]
    np.testing.assert_allclose(rates, [0.0, 0.3, 0.6, 0.9], rtol=1e-6)
    torch.testing.assert_close(model(values)[0][-1], model(values)[0][-1], **EXACT)
    model.train()
    assert not torch.equal(model(values)[0][-1], model(values)[0][-1])


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path):
    encoder().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if "gates" not in key and ".table." not in key}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = MMViTEncoder.from_pretrained(tmp_path)
    for name, value in loaded.named_parameters():
        if "gates" in name:
            assert value.item() == pytest.approx(0.7)
        elif ".table." in name:
            assert 0.01 < value.std() < 0.03 and value.abs().max() < 0.1


def test_an_encoder_saved_by_itself_loads_by_its_folder(tmp_path):
    original = encoder()
    original.save_pretrained(tmp_path)
    values = torch.randn(1, 3, 12, 22)
    expected = original(values)[0][-1]
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(values)[0][-1], expected, **EXACT)
    model = CrossModalModel.from_encoders(vision=tmp_path, **zoo.TINY).eval()
    torch.testing.assert_close(model.encoders["vision"](values)[0][-1], expected, **EXACT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_stride": [2]}, "one of each for every view"),
        ({"patch_size": [4, 3, 5]}, "Expected odd numbers"),
        ({"num_heads": 3}, "embed_dim=8 is not divisible by num_heads=3"),
        ({"image_size": [12]}, "image_size=.* Expected two whole numbers"),
        ({"depths": [1, 0]}, "depths=.* at least 1"),
    ],
)
def test_wrong_configs_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        MMViTConfig(**VIEWS | changes)


def test_wrong_inputs_are_named():
    with pytest.raises(
        ValueError,
        match=r"\(2, 1, 12, 22\) were given. Expected \(batch, channels, height, width\) with num_channels=3",
    ):
        encoder()(torch.randn(2, 1, 12, 22))
    with pytest.raises(ValueError, match=r"Expected \(batch, bands, frames\)"):
        encoder(**SOUND)(torch.randn(2, 3, 12, 22))
    with pytest.raises(ValueError, match="'window' needs tokens in order along an axis"):
        CrossModalConfig(modalities={"audio": MMViTConfig(**SOUND)}, attention_kernel="window")


# From image weights


def test_an_audio_encoder_from_image_weights_hears_what_the_image_encoder_sees_in_grey():
    seeing = encoder()
    values = torch.randn(2, 12, 22)
    hearing = MMViTEncoder.from_image_weights(seeing, MMViTConfig(**SOUND)).eval()
    expected = seeing(values[:, None].expand(-1, 3, -1, -1))[0]
    for level, other in zip(hearing(values)[0], expected, strict=True):
        torch.testing.assert_close(level, other, **CLOSE)
    # Tables of another length: where they are shorter, what is left of them stands for the same distances.
    shorter = MMViTEncoder.from_image_weights(seeing, MMViTConfig(**SOUND | {"image_size": [7, 13]})).eval()
    expected = seeing(values[:, None, :7, :13].expand(-1, 3, -1, -1))[0]
    for level, other in zip(shorter(values[..., :7, :13])[0], expected, strict=True):
        torch.testing.assert_close(level, other, **CLOSE)


def test_tables_that_are_too_short_are_interpolated_around_their_middle():
    seeing = encoder(depths=[1])
    hearing = MMViTEncoder.from_image_weights(seeing, MMViTConfig(**SOUND | {"image_size": [12, 42], "depths": [1]}))
    old, new = (model.views[0].stages[0][0].attention.columns.table.weight for model in (seeing, hearing))
    assert old.shape == (21, 4) and new.shape == (41, 4)
    torch.testing.assert_close(new[::2], old, **CLOSE)
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2, **CLOSE)
    rows = [model.views[0].stages[0][0].attention.rows.table.weight for model in (seeing, hearing)]
    torch.testing.assert_close(*rows, **EXACT)


def test_encoders_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"depths=\[1, 2, 1\], and this one \[1, 1\]"):
        MMViTEncoder.from_image_weights(encoder(), MMViTConfig(**SOUND | {"depths": [1, 1]}))
    with pytest.raises(ValueError, match="num_channels=4 cannot be made of 3"):
        MMViTEncoder.from_image_weights(encoder(), MMViTConfig(**VIEWS | {"num_channels": 4}))


# Recipes

AUDIO = {"feature_size": 12, "sampling_rate": 8000, "hop_length": 160, "n_fft": 256, "chunk_length": 1}


def sound_rows(count=32):
    """Tones that are low or high, of several lengths."""
    files, labels = [], ["low" if number % 2 else "high" for number in range(count)]
    for number, label in enumerate(labels):
        file, length = io.BytesIO(), 2000 + 150 * (number % 20)
        tone = np.sin(2 * np.pi * (300 if label == "low" else 1500) * np.arange(length) / 8000 + number)
        soundfile.write(file, tone, 8000, format="WAV")
        files.append({"bytes": file.getvalue(), "path": None})
    rows = datasets.Dataset.from_dict({"audio": files, "label": labels})
    return rows.cast_column("audio", datasets.Audio(decode=False))


def recipe_values(folder, **entry):
    values = copy.deepcopy(TINY_RECIPE) | {"task": "classification", "dataset": "made", "output_dir": str(folder)}
    small = SOUND | {"depths": [1, 1], "image_size": [12, 50], "model_type": "crossmodal_mmvit"}
    values["model"] = {
        "encoders": {"audio": {"config": small, **entry}},
        "config": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_fusion_layers": 1},
    }
    values["processor"] = {"audio": dict(AUDIO)}
    values["mixing"] = {"time_cutmix": 1.0, "mixup": 0.5, "probability": 0.5, "time_masks": 1, "frequency_masks": 1}
    values["training"] |= {"num_train_epochs": 8, "learning_rate": 5e-3}
    return values


def test_a_model_of_sound_is_trained_mixed_and_loaded_by_a_stranger(tmp_path):
    result = train(
        Recipe(**recipe_values(tmp_path / "m"), name="m"), sound_rows(), sound_rows(12), write=lambda line: None
    )
    assert result["metrics"]["accuracy"] == 1.0
    wave = np.sin(2 * np.pi * 1500 * np.arange(3000) / 8000)
    np.save(tmp_path / "wave.npy", wave)
    said = run_as_stranger(
        """
import sys, json
import numpy as np
from transformers import pipeline
pipe = pipeline("crossmodal-classification", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(pipe({"audio": {"array": np.load(sys.argv[2]), "sampling_rate": 8000}})))
""",
        tmp_path / "m",
        tmp_path / "wave.npy",
        cwd=tmp_path,
    )
    assert json.loads(said.splitlines()[-1])[0]["label"] == "high"


def image_model(folder):
    """A model of images in a folder, whose encoder fits the recipe of sounds."""
    config = MMViTConfig(**VIEWS | {"depths": [1, 1]})
    model = lively(
        CrossModalModel(CrossModalConfig(modalities={"text": zoo.tiny_encoder("bert")[0], "vision": config}))
    )
    model.save_pretrained(folder)
    return model.encoders["vision"]


def test_a_recipe_begins_from_image_weights(tmp_path):
    seeing = image_model(tmp_path / "images")
    recipe = Recipe(**recipe_values(tmp_path / "m", image_weights=str(tmp_path / "images")))
    task = TASKS["classification"].from_targets(["low", "high"])
    model, processor = build(recipe, task, [])
    assert isinstance(processor.feature_extractor, WhisperFeatureExtractor)
    hearing = model.crossmodal.encoders["audio"]
    kernels = (each.views[1].patch_embeddings.weight for each in (hearing, seeing))
    torch.testing.assert_close(next(kernels), next(kernels).sum(1, keepdim=True), **EXACT)
    torch.testing.assert_close(hearing.crossings[1].gates[2].weight, seeing.crossings[1].gates[2].weight, **EXACT)


def test_image_weights_that_there_are_not_are_named(tmp_path):
    task = TASKS["classification"].from_targets(["low", "high"])
    values = recipe_values(tmp_path / "m", image_weights=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"model.encoders.audio.image_weights=.* holds no model"):
        build(Recipe(**values), task, [])
    CrossModalModel(zoo.tiny_config("text")).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="holds a model without an encoder of model_type 'crossmodal_mmvit'"):
        build(Recipe(**values), task, [])
    values["model"]["encoders"]["audio"]["config"] = {"model_type": "whisper"}
    with pytest.raises(ValueError, match="is for an encoder of model_type 'crossmodal_mmvit'"):
        build(Recipe(**values), task, [])
    values = recipe_values(tmp_path / "m")
    values["processor"]["audio"]["feature_extractor_type"] = "WhisperExtractor"
    with pytest.raises(ValueError, match="'WhisperExtractor' is no feature extractor of transformers"):
        build(Recipe(**values), task, [])


@pytest.mark.parametrize("name", ["classification_digit_images_mmvit", "classification_spoken_digits_mmvit"])
def test_what_a_recipe_is_compared_with_has_as_many_flop(name):
    recipe = Recipe.load(name)
    task = TASKS["classification"].from_targets([str(digit) for digit in range(10)])
    counts = {}
    for variant, run in variants_of(recipe).items():
        run.model["encoders"].get("audio", {}).pop("image_weights", None)
        model, processor = build(run, task, [])
        if "audio" in run.model["encoders"]:
            batch = processor(audio=np.zeros(8000, dtype=np.float32), sampling_rate=8000)
        else:
            batch = processor(images=picture(size=(28, 28)))
        counts[variant] = flops_of(model.eval(), dict(batch))
    assert len(counts) == len(recipe.variants) + 1
    for variant, count in counts.items():
        assert abs(count / counts["full"] - 1) < 0.05, (variant, counts)


def test_grey_images_are_read_by_an_entry_that_says_so():
    entry = {"config": MMViTConfig(**SOUND), "type": "vision"}
    model = CrossModalModel(CrossModalConfig(modalities={"vision": entry}, **zoo.TINY)).eval()
    assert model(pixel_values=torch.randn(2, 1, 12, 22)).pooler_output.shape == (2, 16)


def test_a_processor_of_several_signals_is_saved_with_its_model(tmp_path):
    model, _ = beside_text()
    processor = CrossModalProcessor.from_config(
        CrossModalConfig(modalities={"audio": model.config.audio_config}),
        feature_extractor=WhisperFeatureExtractor(**AUDIO),
    )
    batch = processor(audio=[np.ones(800, dtype=np.float32), np.ones(4000, dtype=np.float32)], sampling_rate=8000)
    assert batch["input_features"].shape == (2, 12, 50) and batch["audio_attention_mask"].sum(1).tolist() == [5, 25]
    model.save_pretrained(tmp_path)
    loaded = CrossModalForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = dict(batch)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **EXACT)
