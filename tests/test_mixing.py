"""Mixed batches: mixup, CutMix along time and SpecAugment, against what they say of themselves."""

import copy

import pytest
import torch
from crossmodal.training.mixing import MixingCollator
from crossmodal.training.recipes import Recipe
from crossmodal.training.train import train
from test_classification import utterance_rows
from world import TINY_RECIPE


MODALITIES = [
    {"name": "vision", "type": "vision", "values": "pixel_values", "mask": None},
    {"name": "audio", "type": "audio", "values": "input_features", "mask": "audio_attention_mask"},
    {"name": "text", "type": "text", "values": "input_ids", "mask": "attention_mask"},
]
SINGLE = "single_label_classification"


class Plain:
    """A collator that gives the batch it holds."""

    def __init__(self, **batch):
        self.batch, self.deduplicate = batch, True

    def __call__(self, samples):
        return {key: value.clone() for key, value in self.batch.items()}


def mixing(batch, problem_type=SINGLE, **options):
    return MixingCollator(Plain(**batch), MODALITIES, 3, problem_type, **options)


def audio_batch():
    torch.manual_seed(0)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return {
        "pixel_values": torch.randn(4, 3, 2, 2),
        "input_features": torch.randn(4, 5, 12),
        "audio_attention_mask": mask,
        "labels": torch.tensor([0, 1, 2, 1]),
    }


def test_mixup_is_the_same_mixture_of_inputs_and_labels():
    batch = audio_batch()
    batch = {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}
    collate = mixing(batch, mixup=0.8)
    assert collate.collator.deduplicate is False
    for _ in range(5):
        mixed = collate(None)
        torch.testing.assert_close(mixed["labels"].sum(1), torch.ones(4))
        # What it was mixed of is found again by least squares on the rows.
        rows = batch["pixel_values"].flatten(1)
        shares = torch.linalg.lstsq(rows.T, mixed["pixel_values"].flatten(1).T).solution.T
        torch.testing.assert_close(shares.sum(1), torch.ones(4), atol=1e-4, rtol=0)
        hard = torch.nn.functional.one_hot(batch["labels"], 3).float()
        torch.testing.assert_close(shares @ hard, mixed["labels"], atol=1e-4, rtol=0)


def test_noise_falls_on_some_rows_of_each_modality_and_on_no_word():
    batch = audio_batch() | {"input_ids": torch.tensor([[1, 2]] * 4), "attention_mask": torch.ones(4, 2)}
    collate = mixing(batch, noise=0.5, noise_probability=0.4)
    touched, patterns = [], set()
    for _ in range(60):
        noisy = collate(None)
        assert torch.equal(noisy["input_ids"], batch["input_ids"]) and torch.equal(noisy["labels"], batch["labels"])
        apart = {key: (noisy[key] - batch[key]).flatten(1) for key in ("pixel_values", "input_features")}
        rows = torch.stack([value.abs().amax(dim=1) > 0 for value in apart.values()])
        touched.append(rows.float().mean())
        patterns |= {tuple(row) for row in rows.T.tolist()}
        # The strongest is half the deviation of the values.
        assert apart["input_features"].std(dim=1).max() < 0.75 * batch["input_features"].std()
    assert 0.3 < torch.stack(touched).mean() < 0.5
    assert patterns == {(False, False), (False, True), (True, False), (True, True)}
    with pytest.raises(ValueError, match="noise_probability=1.5.*from 0 to 1"):
        mixing(batch, noise_probability=1.5)


def test_rows_are_mixed_with_rows_of_the_same_modalities():
    batch = audio_batch() | {"modality_mask": torch.tensor([[True, True], [True, False], [True, True], [True, False]])}
    batch["labels"] = torch.tensor([0, 1, 0, 1])
    collate = mixing(batch, mixup=1.0)
    for _ in range(8):
        # Rows of a pattern have a label of their own here: none is mixed with the other.
        assert collate(None)["labels"].argmax(1).tolist() == [0, 1, 0, 1]
        assert collate(None)["labels"].max(1).values.allclose(torch.ones(4))


def test_cutmix_takes_a_stretch_of_time_and_as_much_of_the_label():
    batch = audio_batch()
    del batch["audio_attention_mask"]
    collate = mixing(batch, time_cutmix=1.0)
    for _ in range(10):
        mixed = collate(None)
        own = (mixed["input_features"] == batch["input_features"]).all(dim=1)
        for row in range(4):
            changed = (~own[row]).nonzero().squeeze(1)
            if len(changed):
                assert changed.tolist() == list(range(int(changed[0]), int(changed[-1]) + 1))
                partner = next(
                    p
                    for p in range(4)
                    if torch.equal(mixed["input_features"][row][:, changed], batch["input_features"][p][:, changed])
                )
                expected = torch.zeros(3)
                expected[batch["labels"][row]] += 1 - len(changed) / 12
                expected[batch["labels"][partner]] += len(changed) / 12
                torch.testing.assert_close(mixed["labels"][row], expected)
        assert torch.equal(mixed["pixel_values"], batch["pixel_values"])


def test_numbers_and_tokens_are_mixed_with_their_masks():
    batch = {
        "text_tokens": torch.randn(2, 3, 4),
        "text_tokens_mask": torch.tensor([[True, False, False], [True, True, True]]),
        "labels": torch.tensor([0.0, 1.0]),
    }
    torch.manual_seed(1)
    collate = mixing(batch, "regression", mixup=1.0)
    while True:
        mixed = collate(None)
        share = 1 - mixed["labels"][0]
        if 0.1 < share < 0.9:
            break
    torch.testing.assert_close(mixed["text_tokens"][0, 1:], (1 - share) * batch["text_tokens"][1, 1:])
    torch.testing.assert_close(
        mixed["text_tokens"][0, 0], share * batch["text_tokens"][0, 0] + (1 - share) * batch["text_tokens"][1, 0]
    )
    assert mixed["text_tokens_mask"].all()


def test_spectrograms_are_covered_by_their_mean_and_labels_stay():
    batch = audio_batch()
    collate = mixing(batch, time_masks=1, time_width=0.5, frequency_masks=1, frequency_width=0.5)
    covered = 0
    for _ in range(10):
        mixed = collate(None)
        assert torch.equal(mixed["labels"], batch["labels"]) and torch.equal(
            mixed["pixel_values"], batch["pixel_values"]
        )
        changed = mixed["input_features"] != batch["input_features"]
        means = batch["input_features"].mean((1, 2))
        for row in range(4):
            torch.testing.assert_close(
                mixed["input_features"][row][changed[row]], means[row].expand(int(changed[row].sum()))
            )
            columns, bands = changed[row].all(0), changed[row].all(1)
            # Whole columns and whole bands, and at most half of each.
            assert (
                torch.equal(changed[row], columns[None] | bands[:, None]) and columns.sum() <= 7 and bands.sum() <= 3
            )
        covered += int(changed.sum())
    assert covered


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixip": 0.2}, r"mixing.mixip is unknown. Expected any of \['mixup'"),
        ({"mixup": -1}, "number of at least 0"),
        ({"time_masks": 1.5}, "whole number"),
        ({"time_width": 1.5}, "from 0 to 1"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        mixing({}, **options)


def test_words_cannot_be_mixed_and_pictures_have_no_time():
    words = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="'input_ids', which are words"):
        mixing(words, mixup=1.0)(None)
    with pytest.raises(ValueError, match="needs sound or sequences"):
        mixing({"pixel_values": torch.ones(2, 3, 2, 2), "labels": torch.tensor([0, 1])}, time_cutmix=1.0)(None)
    with pytest.raises(ValueError, match="only labels and numbers"):
        Recipe(task="retrieval", dataset="x", output_dir="y", model={"preset": "tiny"}, mixing={"mixup": 1.0})


def test_a_run_mixes_its_training_batches_alone(tmp_path, monkeypatch):
    seen = []
    original = MixingCollator.__call__
    monkeypatch.setattr(MixingCollator, "__call__", lambda self, s: seen.append(len(s)) or original(self, s))
    features = {"model_type": "crossmodal_features", "feature_size": 4, "hidden_size": 16, "num_attention_heads": 2}
    recipe = copy.deepcopy(TINY_RECIPE) | {
        "task": "classification",
        "dataset": "made",
        "output_dir": str(tmp_path / "m"),
        "model": {"encoders": {"text_features": features}, "config": {"hidden_size": 16, "num_attention_heads": 2}},
        "mixing": {"mixup": 0.4},
    }
    result = train(Recipe(**recipe, name="m"), utterance_rows(8, 4), utterance_rows(3, 4), write=lambda line: None)
    assert sum(seen) == 2 * 32 and 0 <= result["metrics"]["accuracy"] <= 1
