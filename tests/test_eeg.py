"""EEG: features of raw signals, mutual cross-attention, windows of recordings, and protocols that tell leakage."""

import copy
import json
import math

import datasets
import numpy as np
import pytest
import torch
from crossmodal.modeling.eeg_crossmodal import EEGEncoder, mutual_cross_attention
from crossmodal.training.datasets import RowDataset
from crossmodal.training.evaluate import evaluate
from crossmodal.training.loading import cut_recordings
from crossmodal.training.protocols import PROTOCOLS, cross_validate, protocol_table
from crossmodal.training.recipes import Recipe
from crossmodal.training.token_cache import TokenCache
from crossmodal.training.train import train
from world import TINY_RECIPE, run_as_stranger

from crossmodal import (
    CrossModalConfig,
    CrossModalForSequenceClassification,
    CrossModalProcessor,
    EEGConfig,
    EEGFeatureExtractor,
)


def tone(frequency, seconds, rate=256, size=1.0, channels=1):
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([size * np.sin(2 * np.pi * frequency * time + channel) for channel in range(channels)])


# Features


def test_entropy_of_a_tone_is_that_of_its_size_in_its_band_alone():
    bands = ["theta", "slow_alpha", "alpha", "beta", "gamma"]
    found = EEGFeatureExtractor()(tone(20, 10, size=3.0, channels=2), 256)
    assert found.shape == (10, 2, 5, 2)
    # A sine of size 3 has a deviation of 3 / sqrt(2).
    expected = 0.5 * math.log10(2 * math.pi * math.e * 4.5)
    np.testing.assert_allclose(found[2:-2, :, bands.index("beta"), 0], expected, atol=5e-3)
    others = [place for place in range(5) if place != bands.index("beta")]
    assert (found[2:-2, :, others, 0] < expected - 1).all()
    assert (found[2:-2].mean((0, 1))[:, 1].argmax()) == bands.index("beta")


def test_power_is_the_mean_of_decibels_over_the_bins_of_a_band():
    from scipy.signal import welch

    draw = np.random.default_rng(0)
    signal = draw.normal(size=(1, 256)) * 5
    found = EEGFeatureExtractor(sampling_rate=128, window_seconds=2.0, step_seconds=1.0)(signal, 128)
    assert found.shape == (2, 1, 5, 2)
    frequencies, density = welch(signal[0], fs=128, nperseg=128)
    assert frequencies[1] == 1.0
    for place, bins in enumerate([range(4, 8), range(8, 11), range(8, 14), range(14, 30), range(30, 46)]):
        expected = np.mean([10 * np.log10(density[b]) for b in bins])
        np.testing.assert_allclose(found[0, 0, place, 1], expected, rtol=1e-5)


def test_the_baseline_is_taken_off_and_left_out():
    noise = np.random.default_rng(0).normal(size=(1, 1024))
    whole = np.concatenate([noise, 10 * noise, 10 * noise], axis=1)
    found = EEGFeatureExtractor(baseline_seconds=4.0)(whole, 256)
    assert found.shape[0] == 8
    # Ten times as large: entropy log10(10) more, power 20 dB.
    np.testing.assert_allclose(found[..., 0].mean(), 1.0, atol=0.05)
    np.testing.assert_allclose(found[..., 1].mean(), 20.0, atol=1.0)


def test_the_mains_and_the_common_reference_go():
    both = np.random.default_rng(0).normal(size=(2, 2048)) + tone(40, 8, size=30.0)
    loud = EEGFeatureExtractor()(both, 256)[2:-2, :, 4, 1].mean()
    calm = EEGFeatureExtractor(notch=40)(both, 256)[2:-2, :, 4, 1].mean()
    assert calm < loud - 4
    alike = np.repeat(tone(20, 8), 3, axis=0)
    assert EEGFeatureExtractor(average_reference=True)(alike, 256)[..., 1].max() < -60


@pytest.mark.parametrize(
    ("signal", "rate", "said"),
    [
        (np.zeros((2, 600)), None, "sampling rate of eeg is not known"),
        (np.zeros(600), 256, r"shape \(600,\). Expected \(channels, samples\)"),
        (np.full((2, 600), np.nan), 256, "contains NaN"),
        (np.zeros((2, 100)), 256, "0.39 seconds long, and a window takes 2.0"),
    ],
)
def test_signals_that_cannot_be_read_are_named(signal, rate, said):
    with pytest.raises(ValueError, match=said):
        EEGFeatureExtractor()(signal, rate)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bands": ["delta"]}, "'delta' is unknown"),
        ({"sampling_rate": 80}, "does not hold the band up to 45 Hz"),
        ({"step_seconds": 0.3}, "a part of a second"),
    ],
)
def test_wrong_options_of_the_extractor_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        EEGFeatureExtractor(**options)


def test_the_extractor_is_saved_and_loaded(tmp_path):
    EEGFeatureExtractor(sampling_rate=200, bands=["alpha", "beta"]).save_pretrained(tmp_path)
    loaded = EEGFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.sampling_rate == 200 and loaded(tone(10, 4), 256).shape == (4, 1, 2, 2)


# Mutual cross-attention and the convolution


def test_mutual_cross_attention_is_its_equation():
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 4, 60), torch.randn(2, 5, 4, 60)
    found = mutual_cross_attention(one, other)
    for b in range(2):
        for k in range(5):
            for c in range(4):
                x, y = one[b, k], other[b, k]
                a = torch.stack([x[c] @ y[j] / math.sqrt(60) for j in range(4)]).softmax(0)
                z = torch.stack([y[c] @ x[j] / math.sqrt(60) for j in range(4)]).softmax(0)
                expected = sum(a[j] * y[j] for j in range(4)) + sum(z[j] * x[j] for j in range(4))
                torch.testing.assert_close(found[b, k, c], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mutual_cross_attention(other, one), found)


def test_the_convolution_has_the_parameters_of_the_authors():
    encoder = EEGEncoder(EEGConfig(num_channels=32))
    assert sum(p.numel() for p in encoder.convolutions.parameters()) + 512 * 2 + 2 == 195_618
    assert encoder.projection.in_features == 512


@pytest.mark.parametrize("features", ["mutual", "both", "de", "psd"])
def test_every_second_lies_between_0_and_1_and_padding_changes_nothing(features):
    torch.manual_seed(0)
    encoder = EEGEncoder(EEGConfig(num_channels=4, features=features)).eval()
    values, mask = torch.randn(2, 9, 4, 5, 2), torch.ones(2, 9, dtype=torch.bool)
    whole = encoder.fused(values)
    assert whole.shape == (2, 2 if features == "both" else 1, 4, 5, 9)
    torch.testing.assert_close(whole.amin((2, 3)), torch.zeros(2, whole.shape[1], 9))
    torch.testing.assert_close(whole.amax((2, 3)), torch.ones(2, whole.shape[1], 9))
    mask[1, 6:] = False
    (tokens,), segments = encoder(values, mask)
    assert tokens.shape == (2, 3, 64) and segments.tolist() == [[True] * 3, [True, True, False]]
    changed = values.clone()
    changed[1, 6:] = 50.0
    torch.testing.assert_close(encoder(changed, mask)[0][0], tokens)


def test_entropy_alone_does_not_look_at_power():
    values = torch.randn(1, 6, 4, 5, 2)
    changed = values.clone()
    changed[..., 1] = 0.0
    for features, same in (("de", True), ("mutual", False)):
        encoder = EEGEncoder(EEGConfig(num_channels=4, features=features)).eval()
        assert torch.allclose(encoder(values)[0][0], encoder(changed)[0][0]) is same


def test_wrong_configs_and_shapes_are_named():
    with pytest.raises(ValueError, match="features='mutal' is unknown"):
        EEGConfig(features="mutal").validate()
    with pytest.raises(ValueError, match="at least 4 channels"):
        EEGConfig(num_channels=3).validate()
    with pytest.raises(ValueError, match=r"Expected \(batch, seconds, 4, 5, 2\)"):
        EEGEncoder(EEGConfig(num_channels=4))(torch.randn(1, 6, 8, 5, 2))


# Recordings


def eeg_rows(subjects=3, seconds=14.0):
    """Recordings of people who are calm (10 Hz) or busy (25 Hz), each with noise of its own."""
    draw, rows = np.random.default_rng(0), []
    for subject in range(subjects):
        for state, frequency in (("calm", 10), ("busy", 25)):
            for session in (1, 2):
                signal = tone(frequency, seconds, 128, size=4.0, channels=4) + draw.normal(
                    size=(4, int(128 * seconds))
                )
                rows.append(
                    {
                        "signal_values": signal.T.ravel().tolist(),
                        "channels": 4,
                        "sampling_rate": 128.0,
                        "subject": f"s{subject}",
                        "state": state,
                        "session": session,
                    }
                )
    return datasets.Dataset.from_list(rows)


ENTRIES = {"eeg": {"window": [6, 4]}}


def test_recordings_are_cut_into_windows():
    rows = eeg_rows(1)
    cut = cut_recordings(rows, ENTRIES)
    # 14 seconds: from 0, 4 and 8 on.
    assert len(cut) == 3 * len(rows) and cut["window"][:4] == [0, 1, 2, 0] and cut["recording"][:4] == [0, 0, 0, 1]
    whole = np.array(rows[0]["signal_values"]).reshape(-1, 4).T
    np.testing.assert_allclose(np.array(cut[1]["signal"]), whole[:, 4 * 128 : 10 * 128], rtol=1e-5, atol=1e-6)
    assert cut_recordings(cut, ENTRIES) is cut
    sample = RowDataset(cut, "classification")[1]
    assert (
        sample["eeg"]["array"].shape == (4, 768)
        and sample["eeg"]["sampling_rate"] == 128
        and sample["target"] == "calm"
    )
    with pytest.raises(ValueError, match="row 0: a recording of 14.00 seconds, and a window takes 30"):
        cut_recordings(rows, {"eeg": {"window": [30, 4]}})
    with pytest.raises(ValueError, match="row 0: sampling_rate=None"):
        cut_recordings(rows.map(lambda row: {"sampling_rate": None}), ENTRIES)


def recipe_values(folder):
    values = copy.deepcopy(TINY_RECIPE) | {"task": "classification", "dataset": "made", "output_dir": str(folder)}
    encoder = {"model_type": "crossmodal_eeg", "num_channels": 4, "conv_channels": [4, 8], "hidden_size": 16}
    values["model"] = {
        "encoders": {"eeg": {"config": encoder, "window": [6, 4]}},
        "config": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    }
    values["processor"] = {"eeg": {"sampling_rate": 128}}
    values["training"] |= {"num_train_epochs": 12, "learning_rate": 5e-3}
    return values


def test_a_model_of_windows_is_trained_measured_and_loaded_by_a_stranger(tmp_path):
    result = train(
        Recipe(**recipe_values(tmp_path / "m"), name="eeg"), eeg_rows(2), eeg_rows(3), write=lambda line: None
    )
    assert result["metrics"]["accuracy"] == 1.0
    assert result["baselines"]["logistic regression on plain features"]["accuracy"] == 1.0
    model = CrossModalForSequenceClassification.from_pretrained(tmp_path / "m")
    processor = CrossModalProcessor.from_pretrained(tmp_path / "m")
    assert evaluate(model, processor, eeg_rows(2), "x", progress=False)["accuracy"] == 1.0
    np.save(tmp_path / "signal.npy", tone(25, 6, 128, size=4.0, channels=4))
    said = run_as_stranger(
        """
import sys, json
import numpy as np
from transformers import pipeline
pipe = pipeline("crossmodal-classification", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(pipe({"eeg": {"array": np.load(sys.argv[2]), "sampling_rate": 128}})))
""",
        tmp_path / "m",
        tmp_path / "signal.npy",
        cwd=tmp_path,
    )
    assert json.loads(said.splitlines()[-1])[0]["label"] == "busy"


def test_signals_of_other_numbers_of_channels_do_not_mix():
    config = CrossModalConfig(modalities={"eeg": EEGConfig(num_channels=4)}, num_labels=2)
    processor = CrossModalProcessor.from_config(config)
    signals = [{"array": tone(10, 4, channels=n), "sampling_rate": 256} for n in (4, 5)]
    with pytest.raises(ValueError, match="row 1 .* has 5 channels, and that of row 0 4"):
        processor(eeg=signals)
    with pytest.raises(ValueError, match="sampling rate of the signal of row 0"):
        processor(eeg=[tone(10, 4, channels=4)])


# Protocols


def test_protocols_hold_out_what_they_say():
    cut = cut_recordings(eeg_rows(3), ENTRIES)
    plain = list(cut.remove_columns("signal"))
    from crossmodal.training.schemas import DATASETS

    folds = {name: split(plain, DATASETS["eeg"], 2, 0) for name, split in PROTOCOLS.items()}
    of = {key: {} for key in folds}
    for name, found in folds.items():
        for row, fold in zip(plain, found, strict=True):
            of[name].setdefault(row["recording"], set()).add(fold)
    assert set(folds["leave_one_subject_out"]) == {"s0", "s1", "s2"}
    assert all(len(parts) == 1 for parts in of["leave_one_subject_out"].values())
    assert all(len(parts) == 1 for parts in of["held_out_recordings"].values())
    # Both labels in every fold; and the leaky one tears recordings apart.
    for fold in (0, 1):
        rows = [row for row, place in zip(plain, folds["held_out_recordings"], strict=True) if place == fold]
        assert {row["state"] for row in rows} == {"calm", "busy"}
    assert any(len(parts) == 2 for parts in of["random_segments"].values())


def test_cross_validation_reports_its_protocol_and_permuted_labels_say_nothing(tmp_path):
    recipe = Recipe(**recipe_values(tmp_path), name="eeg")
    summary = cross_validate(recipe, "leave_one_subject_out", rows=eeg_rows(2), write=lambda line: None)
    assert summary["metrics"]["accuracy"] == 1.0 and not summary["leaky"] and len(summary["folds"]) == 2
    assert json.loads((tmp_path / "leave_one_subject_out.json").read_text())["majority"]["accuracy"] == 0.5
    control = cross_validate(recipe, "held_out_recordings", 2, True, rows=eeg_rows(3), write=lambda line: None)
    assert control["permuted"] and control["metrics"]["accuracy"] < 0.95
    title, table = protocol_table(recipe, control | {"leaky": True})
    assert "LEAKY" in title and "labels permuted" in title and "this model, mean of folds" in table
    with pytest.raises(ValueError, match="protocol='loso' is unknown"):
        cross_validate(recipe, "loso", rows=eeg_rows(2))


def test_tokens_of_a_signal_at_another_rate_are_computed_anew(tmp_path):
    config = CrossModalConfig(modalities={"eeg": EEGConfig(num_channels=4)}, num_labels=2, frozen_modalities=["eeg"])
    model, processor = CrossModalForSequenceClassification(config).eval(), CrossModalProcessor.from_config(config)
    rows = cut_recordings(eeg_rows(1), ENTRIES)
    slower = rows.map(lambda row: {"sampling_rate": row["sampling_rate"] / 2})
    computed = [
        TokenCache(model, processor, tmp_path).fill(RowDataset(own, "classification"), progress=False)[1]
        for own in (rows, slower, rows)
    ]
    assert computed == [len(rows), len(rows), 0]
