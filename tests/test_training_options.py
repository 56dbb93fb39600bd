"""bf16, gradient accumulation and activation checkpointing, in any combination: the loss of a step stays what it is."""

from itertools import product

import pytest
import ranks
import torch
from transformers import Trainer


def cases():
    """Every combination; in `make test` each of one head, and all three together of the others."""
    for case, options in product(ranks.COMPARED, product((False, True), repeat=3)):
        if any(options):
            quick = all(options) or case == "auxiliary"
            yield pytest.param(case, *options, marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Case to the first losses and gradients of whole batches in float32."""
    folder = str(tmp_path_factory.mktemp("plain"))
    return {case: ranks.trained(case, folder, find_unused=None) for case in ranks.COMPARED}


@pytest.mark.parametrize(("case", "bf16", "accumulated", "checkpointed"), cases())
def test_the_loss_of_a_step_is_the_same_within_rounding(tmp_path, plain, case, bf16, accumulated, checkpointed):
    found = ranks.trained(
        case, str(tmp_path), find_unused=None, steps=2 if accumulated or case == "retrieval" else 1, bf16=bf16,
        gradient_checkpointing=checkpointed,
    )  # fmt: skip
    expected = plain[case]
    torch.testing.assert_close(found["losses"], expected["losses"], **({"rtol": 2e-2, "atol": 2e-2} if bf16 else {}))
    assert found.keys() == expected.keys()
    if bf16:
        # Of single numbers little is left in 8 bits; the direction of the step is.
        one, other = (torch.cat([part[name].flatten() for name in sorted(part)]) for part in (found, expected))
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98
        return
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", ["vqa", "several", "captioning"])
def test_transformers_own_trainer_counts_words_and_rows_of_a_step_alike(tmp_path, plain, case):
    found = ranks.trained(case, str(tmp_path), find_unused=None, steps=4, trainer_class=Trainer)
    torch.testing.assert_close(found["losses"], plain[case]["losses"])


def test_means_of_batches_would_be_something_else(tmp_path, plain):
    """Of captions of unequal length: else nothing above could fail."""
    trainer = ranks.trainer_of("captioning", str(tmp_path), ranks.ROWS)
    collate, model = trainer.data_collator, trainer.model
    parts = [model(**collate(list(range(start, start + 4)))).loss for start in range(0, ranks.ROWS, 4)]
    assert abs(sum(parts) / 4 - plain["captioning"]["losses"][0]) > 0.01
