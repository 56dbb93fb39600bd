"""What is compared between two gloo ranks and one process: `python -m torch.distributed.run --nproc_per_node 2 ranks.py FILE`
saves what `everything()` returns in the ranks; a test calls it itself for one process.
"""

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import zoo  # noqa: E402
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy  # noqa: E402
from crossmodal.modeling import retrieval_crossmodal  # noqa: E402
from crossmodal.training.gradient_cache import backward_in_parts  # noqa: E402
from crossmodal.training.processes import on_main  # noqa: E402
from crossmodal.training.trainer import GradientNorms  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy  # noqa: E402
from transformers import TrainerCallback, TrainerState, TrainingArguments  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402

import crossmodal  # noqa: E402
from crossmodal import CrossModalForRetrieval, CrossModalTrainer, TextDecoderConfig  # noqa: E402


RANKS = int(os.environ.get("WORLD_SIZE", 1))
NAMES = ("vision", "text", "eeg")
SCENES = ("vision", "points")
# Rows of a step over all ranks and accumulation steps, of which each rank takes ROWS / 4 at a time.
ROWS = 16
DECODER = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "intermediate_size": 32, "hidden_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
           "max_position_embeddings": 16}  # fmt: skip


def config_of(names=NAMES, **overrides):
    config = zoo.tiny_config(*names, **{"hidden_dropout": 0.0, "classifier_dropout": 0.0} | overrides)
    if "text" in names:
        config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    return config


def labels_of(kind):
    """Labels of which each quarter of a step has another number that count."""
    generator = torch.Generator().manual_seed(1)
    if kind == "ids":
        labels = torch.randint(5, (ROWS,), generator=generator)
        labels[[0, 1, 2, 9, 13, 14]] = -100
        return labels
    if kind == "scores":
        return torch.rand(ROWS, 5, generator=generator)
    if kind == "numbers":
        labels = torch.randn(ROWS, generator=generator)
        labels[[0, 1, 2, 9]] = torch.nan
        return labels
    if kind == "words":
        labels = torch.randint(3, 40, (ROWS, 9), generator=generator)
        lengths = torch.tensor([1, 2, 1, 1, 9, 8, 9, 7, 3, 1, 4, 1, 5, 9, 2, 6])
        return labels.masked_fill(torch.arange(9) >= lengths[:, None], -100)
    if kind == "points":
        labels = torch.randint(5, (ROWS, 12), generator=generator)
        return labels.masked_fill(torch.arange(12) >= (torch.arange(ROWS) % 7 * 2)[:, None], -100)
    if kind == "tags":
        return (torch.rand(ROWS, 5, generator=generator) < 0.4).float()
    return torch.arange(ROWS)[:, None] // torch.tensor([1, 3])


_POINTS = {
    "names": SCENES,
    "fusion_type": "interlaced",
    "fusion_levels": "single",
    "num_unimodal_layers": 1,
    "voxel_size": 0.5,
}
# Name to (head, fields of the config, kind of labels).
CASES = {
    "vqa": ("CrossModalForVQA", {"problem_type": "multi_label_classification"}, "scores"),
    "single": ("CrossModalForSequenceClassification", {"class_weights": [0.3, 1.0, 2.0, 5.0, 0.1]}, "ids"),
    "auxiliary": (
        "CrossModalForVQA",
        {"auxiliary_loss_weight": 0.5, "modality_weighting": "uncertainty", "missing_tokens": True},
        "ids",
    ),
    "several": ("CrossModalForSequenceClassification", {"fusion_type": "bottleneck"}, "scores"),
    "number": ("CrossModalForSequenceClassification", {"num_labels": 1, "fusion_type": "joint"}, "numbers"),
    "retrieval": ("CrossModalForRetrieval", {"projection_dim": 8, "matching_weight": 0.0}, "pairs"),
    "all losses": (
        "CrossModalForRetrieval",
        {"projection_dim": 8, "matching_weight": 1.0, "alignment_weight": 1.0, "cross_weight": 0.1},
        "pairs",
    ),
    "captioning": ("CrossModalForCaptioning", {"decoder_config": TextDecoderConfig(**DECODER)}, "words"),
    "tags of scenes": ("CrossModalForPointSegmentation", {**_POINTS, "present_classes_only": True}, "tags"),
    "points": (
        "CrossModalForPointSegmentation",
        {**_POINTS, "supervision": "full", "class_weights": [0.3, 1.0, 2.0, 5.0, 0.1]},
        "points",
    ),
}
# What is drawn among the rows of a rank is another thing in one process.
COMPARED = [case for case in CASES if case != "all losses"]


def model_of(case):
    head, fields, _ = CASES[case]
    torch.manual_seed(0)
    model = getattr(crossmodal, head)(config_of(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def collator_of(config, kind, lacking=True):
    """Numbers of rows to batches. Rows 4 to 7 and 12 to 15, all those of the second rank, have no image, and a batch without
    images no such key; others lack text or EEG here and there."""
    whole = zoo.tiny_batch(config, batch_size=ROWS)
    presence = torch.ones(ROWS, len(config.modality_names), dtype=torch.bool)
    if lacking:
        presence[4:8, 0] = presence[12:, 0] = False
        if len(config.modality_names) > 2:
            presence[[1, 9, 10], 1] = presence[[3, 4, 5, 11], 2] = False
    whole = {"labels": labels_of(kind)} | whole | {"modality_mask": presence}

    def collate(rows):
        batch = {key: values[rows].clone() for key, values in whole.items()}
        if not batch["modality_mask"][:, 0].any():
            batch.pop("pixel_values")
        if kind == "words":
            # Batches are as long as their longest text.
            batch["labels"] = batch["labels"][:, : int((batch["labels"] != -100).sum(1).max())]
        return batch

    return collate


class KeptGradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.found is None:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trainer_of(case, folder, batch_size, lacking=True, trainer_class=CrossModalTrainer, **arguments):
    """A trainer that takes the rows in order."""

    class OrderedTrainer(trainer_class):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = model_of(case)
    trainer = OrderedTrainer(
        model=model,
        args=TrainingArguments(
            folder, per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size, optim="sgd",
            learning_rate=0.05, lr_scheduler_type="constant", logging_steps=1, remove_unused_columns=False, use_cpu=True,
            disable_tqdm=True, save_strategy="no", report_to="none", max_grad_norm=1e9, **arguments,
        ),
        train_dataset=list(range(ROWS)),
        data_collator=collator_of(model.config, CASES[case][2], lacking),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(case, folder, find_unused, steps=None, **options):
    """Losses of two steps and the gradients of the first: of whole steps in one process, else of two accumulation steps."""
    # What is contrasted is a batch of all ranks, and never those of several accumulation steps.
    steps = steps or (2 if RANKS > 1 or case == "retrieval" else 1)
    trainer = trainer_of(
        case, folder, ROWS // RANKS // steps, max_steps=2, gradient_accumulation_steps=steps,
        ddp_find_unused_parameters=find_unused, **options,
    )  # fmt: skip
    gradients = KeptGradients()
    trainer.add_callback(gradients)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return {"losses": losses, **gradients.found}


def evaluated(case, folder, rows=7):
    """The loss of an uneven number of rows, and what is made of each of them."""
    trainer = trainer_of(case, folder, 2, lacking=case != "retrieval")
    if case == "captioning":
        trainer.model.generation_config.max_new_tokens = 6
    found = trainer.predict(list(range(rows)))
    outputs = found.predictions
    if case == "captioning":
        return {"loss": found.metrics["test_loss"], "texts": [[w for w in text if w > 2] for text in outputs.tolist()]}
    outputs = outputs if case == "retrieval" else {"logits": outputs}
    # Of pairs, and of scenes, the loss is no mean over rows.
    whole = case == "retrieval" or CASES[case][0] == "CrossModalForPointSegmentation"
    return {name: torch.from_numpy(values) for name, values in outputs.items()} | (
        {} if whole else {"loss": torch.tensor(found.metrics["test_loss"])}
    )


def contrasted():
    """Loss and gradients of contrast, where ranks have an unequal part of eight rows and the last one no image at all."""
    found = {}
    cases = [("info_nce", None, False), ("info_nce", 2, True), ("sigmoid", None, True)]
    for loss, chunk, cached in [*cases, ("triplet", None, False), ("triplet", None, True)]:
        torch.manual_seed(0)
        config = config_of(projection_dim=8, matching_weight=0.0, contrastive_loss=loss, contrastive_chunk_size=chunk)
        model = CrossModalForRetrieval(config).train()
        batch = part_of_rank(eight_rows(config), images=cached)
        found |= over_ranks(f"{loss}, {chunk}, {cached}", model, batch, cached)
    return found


def matched():
    """Loss and gradients of all losses, where ranks have an unequal part of eight rows and the last one no image at all. The negatives
    are the hardest: what is drawn differs with the processes."""
    found = {}
    cases = {
        "ranking": {"matching": "ranking", "matching_negatives": 3, "alignment": "recovery"},
        "classifier": {"alignment": "late_interaction", "num_unimodal_layers": 1, "cross_weight": 0.1},
        "cosine": {"matching": "cosine", "contrastive_loss": "info_nce", "detach_local": True},
        "no pair on a rank": {"matching": "ranking", "matching_negatives": 2},
    }
    drawn = retrieval_crossmodal.draw_negatives
    retrieval_crossmodal.draw_negatives = hardest_negatives
    try:
        for name, fields in cases.items():
            for cached in (False, True):
                torch.manual_seed(0)
                config = config_of(projection_dim=8, matching_weight=1.0, alignment_weight=0.5, **fields)
                model = CrossModalForRetrieval(config).train()
                batch = eight_rows(config)
                if name == "no pair on a rank":
                    batch["modality_mask"][5:, 1] = False
                found |= over_ranks(f"{name}, {cached}", model, part_of_rank(batch), cached)
    finally:
        retrieval_crossmodal.draw_negatives = drawn
    return found


def eight_rows(config):
    """Rows of which some share a picture or a text, and some lack a modality, the last three their image."""
    batch = zoo.tiny_batch(config, batch_size=8)
    batch["labels"] = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 3], [4, 4], [5, 5], [6, 1], [7, 7]])
    batch["modality_mask"] = torch.ones(8, 3, dtype=torch.bool)
    batch["modality_mask"][1, 0] = batch["modality_mask"][2, 2] = batch["modality_mask"][5:, 0] = False
    return batch


def part_of_rank(batch, images=False):
    """Five of eight rows for the first rank, three for the second, which has no images where it need not."""
    if RANKS == 1:
        return batch
    last = dist.get_rank() == 1
    batch = {key: value[5:] if last else value[:5] for key, value in batch.items()}
    if last and not images:
        batch.pop("pixel_values")
    return batch


def hardest_negatives(scores, positive, count=1, generator=None):
    found = scores.masked_fill(positive, -torch.inf).topk(min(count, scores.shape[1]), dim=1)
    return found.indices, found.values > -torch.inf


def over_ranks(name, model, batch, cached):
    """Loss and gradients of a batch as DDP averages them, with the cache of gradients or without."""
    found = {}
    if cached:
        value = backward_in_parts(model, batch, 2).loss
    else:
        value = model(**batch).loss
        value.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for key, one in (gradients | {"loss": value.detach().clone()}).items():
        if RANKS > 1:
            dist.all_reduce(one)
        found[f"{name}: {key}"] = one / RANKS
    return found


def sharded(case):
    """Loss and gradients of a step of eight rows, of which the second rank has the last four, without images; there sharded as Accelerate's
    FSDP2 would."""
    model = model_of(case).train()
    collate = collator_of(model.config, CASES[case][2])
    step = [collate(list(range(4))), collate(list(range(4, 8)))] if RANKS > 1 else [collate(list(range(8)))]
    # A contrast is over all ranks as it is; other losses are told what a step counts, of which each rank has its part.
    whole = None if case == "retrieval" else sum(model.count_items(**batch) for batch in step)
    batch = step[dist.get_rank() if RANKS > 1 else 0]
    if RANKS > 1:
        plugin = SimpleNamespace(auto_wrap_policy=transformer_auto_wrap_policy, transformer_cls_names_to_wrap=None)
        wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
        mesh = init_device_mesh("cpu", (RANKS,))
        for module in reversed(list(model.modules())):
            if wraps(module):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss = model(**batch).loss if whole is None else model(**batch, num_items_in_batch=whole).loss * RANKS
    loss.backward()
    norms = {}
    every_step = SimpleNamespace(logging_first_step=True, logging_strategy="steps")
    GradientNorms(norms).on_pre_optimizer_step(every_step, TrainerState(logging_steps=1), None, model)
    found = {name: torch.tensor(norm) for name, norm in norms.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.full_tensor() if RANKS > 1 else parameter.grad
    return found


def one_epoch(folder):
    """Losses of an epoch of 13 rows, which two ranks end with another number of rows each, in retrieval with every loss: rows of the
    second rank have no pair with an image, and what is drawn differs."""
    trainer = trainer_of("all losses", folder, 4 // RANKS, num_train_epochs=1, ddp_find_unused_parameters=False)
    trainer.train_dataset = [0, 1, 5, 6, 2, 3, 7, 12, 8, 9, 13, 14, 10]
    trainer.train()
    return {"losses": torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])}


def disagreed(folder):
    """What a process says that was started with a model of another size, and where the main one alone fails."""
    trainer = trainer_of("single", folder, 2)
    if RANKS > 1 and dist.get_rank():
        trainer.model.config.intermediate_size = 48
    said = {}
    for name, act in {
        "config": trainer.train,
        "main": lambda: on_main(lambda: Path(folder, "nowhere").read_text()),
    }.items():
        try:
            act()
        except (ValueError, OSError) as error:
            said[name] = (type(error).__name__, str(error))
    return said


def everything():
    with tempfile.TemporaryDirectory() as folder:
        found = {case: trained(case, folder, find_unused=False) for case in COMPARED}
        found["found unused"] = trained("auxiliary", folder, find_unused=True)
        found |= {f"{case}, evaluated": evaluated(case, folder) for case in COMPARED}
        found["all losses"] = one_epoch(folder)
        found["disagreed"] = disagreed(folder)
    found |= {f"{case}, sharded": sharded(case) for case in COMPARED}
    return found | {"contrast": contrasted(), "matching": matched()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    results = everything()
    torch.save(results, f"{sys.argv[1]}-{os.environ['RANK']}")
