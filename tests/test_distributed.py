"""Two gloo ranks against one process: same losses, same weights, and no hang where one rank lacks a modality."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


# Every other row has no image. With one row a rank, most steps have a rank without any image, and one with.
_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from transformers import TrainingArguments
from world import color_rows, tiny_processor_and_model
from crossmodal import CrossModalTrainer
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import RowDataset
from crossmodal.training.tasks import VQATask

torch.manual_seed(0)
processor, model = tiny_processor_and_model()
rows = color_rows(12)
samples = [RowDataset(rows, "vqa")[i] | ({"images": None} if i % 2 else {}) for i in range(12)]
arguments = TrainingArguments(
    sys.argv[2] + "-run", per_device_train_batch_size=int(sys.argv[3]), max_steps=6, learning_rate=0.05, optim="sgd",
    lr_scheduler_type="constant", logging_steps=1, remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    save_strategy="no", report_to="none", ddp_find_unused_parameters=True, seed=3,
)
task = VQATask.from_config(model.config)
trainer = CrossModalTrainer(model=model, args=arguments, train_dataset=samples,
                            data_collator=SampleCollator(processor, task.encode_targets))
trainer.train()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"losses": losses, "weights": model.state_dict(), "world": arguments.world_size}, sys.argv[2])
"""


# Eight rows, of which ranks have an unequal part; some lack a modality, and the last rank has no image at all.
_CONTRAST = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
torch.set_num_threads(1)
import zoo
from test_modeling import lively
from crossmodal import CrossModalForRetrieval
from crossmodal.training.gradient_cache import backward_in_parts

ranks, rank = 1, 0
if "RANK" in __import__("os").environ:
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
found = {}
for loss, chunk, cached in (("info_nce", None, False), ("info_nce", 2, True), ("sigmoid", None, True)):
    torch.manual_seed(0)
    config = zoo.tiny_config("vision", "text", "eeg", projection_dim=8, matching_weight=0.0, contrastive_loss=loss,
                             contrastive_chunk_size=chunk)
    model = lively(CrossModalForRetrieval(config)).eval()
    batch = zoo.tiny_batch(config, batch_size=8)
    batch["labels"] = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 3], [4, 4], [5, 5], [6, 1], [7, 7]])
    batch["modality_mask"] = torch.ones(8, 3, dtype=torch.bool)
    batch["modality_mask"][1, 0] = batch["modality_mask"][2, 2] = batch["modality_mask"][5:, 0] = False
    if ranks > 1:
        rows = slice(0, 5) if rank == 0 else slice(5, 8)
        batch = {key: value[rows] for key, value in batch.items()}
        if rank == 1 and not cached:
            batch.pop("pixel_values")
    if cached:
        value = backward_in_parts(model, batch, 2).loss
    else:
        value = model(**batch).loss
        value.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if ranks > 1:
            dist.all_reduce(gradient)
        gradients[name] = gradient / ranks
    value = value.detach().clone()
    if ranks > 1:
        dist.all_reduce(value)
    found[f"{loss}, {chunk}, {cached}"] = {"loss": value / ranks, **gradients}
if rank == 0:
    torch.save(found, sys.argv[2])
"""


def run(ranks, batch_size, out, code=_RUN):
    """What `code` saved, run in so many ranks with `batch_size` rows each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = out.with_suffix(".py")
    script.write_text(code)
    processes = []
    for rank in range(ranks):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
        command = [sys.executable, str(script), str(Path(__file__).parent), str(out), str(batch_size)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return torch.load(out)


def test_two_ranks_train_as_one_process_does_though_one_lacks_images(tmp_path):
    one, two = run(1, 2, tmp_path / "one"), run(2, 1, tmp_path / "two")
    assert (one["world"], two["world"]) == (1, 2)
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-3, atol=1e-4)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_contrast_over_two_ranks_has_the_gradient_of_one_process_with_all_rows(tmp_path):
    one, two = run(1, 8, tmp_path / "one", _CONTRAST), run(2, 4, tmp_path / "two", _CONTRAST)
    assert len(one) == 3
    for kind, expected in one.items():
        for name, value in expected.items():
            torch.testing.assert_close(
                two[kind][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, at=f"{kind}: {name}": f"{at}: {text}"
            )
