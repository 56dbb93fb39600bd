"""What a training step takes: the plan, made without memory, against what a step holds at its peak."""

import json
import weakref

import pytest
import torch
from crossmodal.training.memory import Plan, _blanks, config_of, plan
from test_cli import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossmodal import CrossModalForVQA


class Live(TorchDispatchMode):
    """Bytes of all tensors that there are at a time, but those given."""

    def __init__(self, known):
        super().__init__()
        self.there, self.peak = {}, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        output = function(*arguments, **(named or {}))
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.there and key not in self.known:
                    self.there[key] = storage.nbytes()
                    weakref.finalize(storage, self.there.pop, key, None)
        self.peak = max(self.peak, sum(self.there.values()))
        return output


def small(**changes):
    config = config_of("small", num_labels=10)
    config.vision_config.image_size = 64
    # The gradient of 30,000 word embeddings would be most of a step this small.
    config.text_config.vocab_size = 1000
    for key, value in changes.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fusion_type", ["cross", "joint"])
def test_the_activations_planned_are_those_of_a_step_at_its_peak(checkpointing, fusion_type):
    rows = 8
    model = CrossModalForVQA(small(fusion_type=fusion_type)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = _blanks(model, rows, 32)
    live = Live([each for parameter in model.parameters() for each in (parameter, parameter.grad)])
    with live:
        model(**batch).logits.sum().backward()
    planned = plan(small(fusion_type=fusion_type), rows, 32, bf16=False, checkpointing=checkpointing)
    # Beside what is kept, a backward holds the gradients that it is at.
    assert planned.activations == pytest.approx(live.peak, rel=0.12)
    assert planned.parameters == sum(p.numel() for p in model.parameters())


def test_a_frozen_encoder_keeps_nothing_and_has_no_moments():
    whole, frozen = (plan(small(frozen_modalities=names), 4, 32, bf16=False) for names in ([], ["vision", "text"]))
    assert frozen.activations < 0.6 * whole.activations
    assert whole.of_device()["DDP"] - frozen.of_device()["DDP"] > 12 * (whole.trained - frozen.trained)


def test_strategies_spread_what_they_say():
    made = Plan(parameters=100, trained=100, activations=7, casts=0, layer=10, rest=20)
    assert made.of_device(1)["DDP"] == 16 * 100 + 7 and made.of_device(4)["DDP"] == 20 * 100 + 7
    assert made.of_device(4)["ZeRO-2"] == 2 * 100 + 14 * 25 + 7
    assert made.of_device(4)["FSDP2, ZeRO-3"] == 16 * 25 + 2 * (2 * 20 + 3 * 10) + 7


def test_plan_prints_a_row_of_each_preset(capsys):
    assert run("plan", "tiny", "--devices", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tiny"]["DDP, GiB"] > found["tiny"]["FSDP2, ZeRO-3, GiB"] > 0
    assert run("plan", "huge") == 2
    assert "no preset" in capsys.readouterr().err
