"""Checkpoints of every release load today and say what they said then. The fixtures are made by make_release.py."""

import json

import pytest
import torch
from make_release import HEADS, RELEASES, inputs, make, outputs

import crossmodal


FIXTURES = sorted(path.parent.relative_to(RELEASES).as_posix() for path in RELEASES.glob("*/*/outputs.json"))


def test_this_version_has_its_fixtures():
    assert {f"{crossmodal.__version__}/{head}" for head in HEADS} <= set(FIXTURES)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_a_checkpoint_of_a_release_loads_and_says_what_it_said(fixture):
    folder = RELEASES / fixture
    head = getattr(crossmodal, folder.name)
    model, info = head.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = crossmodal.CrossModalProcessor.from_pretrained(folder)
    stored = json.loads((folder / "outputs.json").read_text())
    found = outputs(model.eval(), inputs(processor))
    assert found.keys() == stored.keys()
    for name, values in stored.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("head", HEADS)
def test_the_script_still_makes_fixtures_of_a_few_kilobytes(head, tmp_path):
    make(head, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100_000
    assert (tmp_path / "outputs.json").exists()
