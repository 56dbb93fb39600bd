"""The few overrides of transformers' Trainer: learning rates per component, the balance of modalities, divergence."""

import copy
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy, IntervalStrategy, get_last_checkpoint, has_length
from transformers.utils import logging

from ..model_cards import LICENSE
from ..modeling.modeling_crossmodal import CrossModalPreTrainedModel
from .card import HUB_TASKS, model_card
from .checkpoints import CheckpointContents, full_disk, is_full
from .collator import SampleCollator
from .datasets import BrokenSample, GroupedSampler
from .draws import Batches, SeededSampler, as_it_is
from .gradient_cache import backward_in_parts
from .hub import hub_errors, publish
from .mixing import MixingCollator
from .processes import begin


logger = logging.get_logger(__name__)


class TrainingDiverged(ValueError):
    """A loss or a gradient that is no number any more."""


class CrossModalTrainer(Trainer):
    """Trainer for any model of the family, alone or under peft.

    The log has, beside the loss, how the modalities share the work: `weight_<m>` (their mean weight since the last entry),
    `auxiliary_loss_<m>` (of the modality alone, where the config asks for it) and `gradient_norm_<m>` (of its encoder and
    its projection at this step, after clipping); of retrieval also `part_<name>` of the loss. Training stops with
    `TrainingDiverged` at the first loss or gradient that is not finite, before it reaches the weights.

    A run that goes on from a checkpoint ends with the weights of one that was never cut off: what is drawn while batches are made
    (order, augmentation, mixing) follows from the seed, the epoch and the place of the batch (see draws.py). So it is wherever
    `remove_unused_columns` is False; datasets of processed columns are left to transformers.

    Args:
        learning_rates: component to learning rate. Components are the modality names (their encoders), `fusion`
            (everything else of the base model) and `head`; those not named take `args.learning_rate`.
        rows_per_image: rows about one image that a training batch takes together, where the dataset has `groups`.
        max_broken_samples: so many samples that cannot be read may be left out of their batches, of datasets that `skip_broken`;
            their number is in the log as `broken_samples`, and `self.broken_samples` has their names.
        gradient_cache: of `CrossModalForRetrieval`, rows that are encoded at a time (see gradient_cache.py).
        train_collator: of training batches, where they are made otherwise than those of evaluation (see mixing.py).
    """

    def __init__(
        self,
        *args,
        learning_rates=None,
        rows_per_image=1,
        gradient_cache=None,
        train_collator=None,
        max_broken_samples=0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.max_broken_samples = max_broken_samples
        self.train_collator = train_collator
        if gradient_cache is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"gradient_cache={gradient_cache} runs parts of the model by themselves, whose weights FSDP and DeepSpeed put together "
                "for whole forwards only. Use DDP (configs/accelerate/ddp.yaml), or leave gradient_cache out."
            )
        self.gradient_cache = gradient_cache
        self.learning_rates = dict(learning_rates or {})
        self.rows_per_image = rows_per_image
        if self.args.n_gpu > 1 and hasattr(self.data_collator, "deduplicate"):
            # torch.nn.DataParallel cuts every tensor of a batch alike, also those with one row per image.
            self.data_collator.deduplicate = False
        if hasattr(self.data_collator, "row_ids"):
            self.data_collator.row_ids = True
        self._balance, self._parts, self._gradient_norms, self._rows = {}, {}, {}, []
        # (rows, 2) of every batch of an evaluation: the loss of a row, and how much it counts.
        self._row_losses = []
        for callback in (GradientNorms(self._gradient_norms), CheckpointContents(), BrokenSamples(), _Places(self)):
            self.add_callback(callback)
        names = self.model.config.modality_names
        for component in self.learning_rates:
            if component not in (*names, "fusion", "head"):
                raise ValueError(
                    f"learning_rates has {component!r}. Expected any of {[*names, 'fusion', 'head']}: the encoders by "
                    "modality name, the fusion and the head."
                )

    def train(self, *args, **kwargs):
        """transformers' own, after all processes agreed on what they train."""
        alike = (
            "seed",
            "data_seed",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_steps",
            "num_train_epochs",
        )
        rows = len(self.train_dataset) if has_length(self.train_dataset) else None
        begin(
            model=type(self.model).__name__,
            config={key: value for key, value in self.model.config.to_dict().items() if key != "_name_or_path"},
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            arguments={name: getattr(self.args, name) for name in alike},
            training_rows=rows,
        )
        return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        dataset, collator = self.train_dataset, self.data_collator
        self.data_collator = self.train_collator or collator
        if not (isinstance(dataset, IterableDataset) or self.args.remove_unused_columns):
            self.train_dataset, self.data_collator = Batches(dataset, self.data_collator), as_it_is
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator
        shard = getattr(loader, "batch_sampler", None)
        if hasattr(dataset, "sampler") and isinstance(shard, BatchSamplerShard):
            # A stream has given each rank rows of its own already.
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _get_dataloader(self, dataset, *args, **kwargs):
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        if isinstance(dataset, Batches) or not kwargs.get("is_training"):
            # Else it draws the seed of its workers from the generator of dropout: in every epoch, or once where workers persist.
            getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        if not isinstance(train_dataset, Batches):
            return super()._get_train_sampler(train_dataset)
        dataset, args = train_dataset.dataset, self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        strategy, rows = args.train_sampling_strategy, self._train_batch_size * args.gradient_accumulation_steps
        if strategy == "batch_rebalance":
            raise ValueError(f"train_sampling_strategy={strategy!r} is not served. Use 'group_by_length'.")
        by_length = strategy == "group_by_length"
        if hasattr(dataset, "sampler"):
            self._sampler = dataset.sampler(seed, args.process_index, args.world_size, rows if by_length else None)
            return self._sampler
        if self.rows_per_image > 1 and getattr(dataset, "groups", None) is not None:
            sampler = GroupedSampler(dataset.groups, self.rows_per_image, seed)
        elif by_length and hasattr(dataset, "lengths"):
            sampler = LengthGroupedSampler(rows * args.world_size, lengths=dataset.lengths())
        elif strategy == "random":
            sampler = SeedableRandomSampler(dataset, data_seed=seed)
        else:
            sampler = super()._get_train_sampler(dataset)
        self._sampler = SeededSampler(sampler, seed)
        return self._sampler

    def _get_eval_sampler(self, eval_dataset):
        # Outputs are compared with targets in the order of the rows, whatever the order of training is.
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def _init_training_state(self, *args, **kwargs):
        epochs, steps = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            # The run may have moved since.
            best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        known = self.state.stateful_callbacks.get(BrokenSamples.__name__, {})
        self.broken_samples.update(known.get("attributes", {}).get("found", {}))
        stopped = self.state.global_step and any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        # A run that was stopped early, and killed before it had ended, has nothing left to learn.
        return (sys.maxsize, 0) if stopped else (epochs, steps)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_weights(self, checkpoint):
        """Loads all weights of a model of the family as `from_pretrained` does. Returns whether it is one, whole and without adapters.

        Trainer looks for the names that weights have in memory, and passes over those that are called otherwise in files: the attention of
        ViT among them.
        """
        model = self.accelerator.unwrap_model(self.model)
        adapted = getattr(model, "_hf_peft_config_loaded", False)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not isinstance(model, CrossModalPreTrainedModel) or adapted or sharded:
            return False
        config = copy.deepcopy(model.config)
        stored, found = type(model).from_pretrained(checkpoint, config=config, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(
                f"{str(checkpoint)!r} lacks the weights {sorted(found['missing_keys'])[:3]}: it is of another model."
            )
        model.load_state_dict(stored.state_dict())
        return True

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_full(error):
                raise
            raise full_disk(self.args.output_dir, f"checkpoint-{self.state.global_step}", error) from error

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The last that all ranks write: what is listed after it is all there.
        self._gather_broken_samples()

    @property
    def broken_samples(self):
        """{which: why} of the samples that could not be read so far."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, BrokenSamples)).found

    def _gather_broken_samples(self):
        self.broken_samples.update(gather_object(list(self.broken_samples.items())))
        self._check_broken_samples()

    def _check_broken_samples(self):
        if self.max_broken_samples < len(self.broken_samples):
            first = list(self.broken_samples.values())[:3]
            raise BrokenSample(
                f"{len(self.broken_samples)} broken samples, and max_broken_samples={self.max_broken_samples}. Remove or repair them, "
                f"or allow for more. The first: {' '.join(first)}"
            )

    def get_decay_parameter_names(self, model):
        # Temperatures, variances and gates are no weights of a product: decay would draw them to values that mean something else.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = super().get_decay_parameter_names(model)
        # Under ZeRO-3 a parameter is flat, and says what shape it has.
        return [name for name in names if len(getattr(parameters[name], "ds_shape", parameters[name].shape)) > 1]

    def create_optimizer(self, model=None):
        if self.learning_rates and self.optimizer is None:
            target = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(target))
            groups = {}
            for name, parameter in target.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((component_of(name), name in decayed), []).append(parameter)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "lr": float(self.learning_rates.get(component, self.args.learning_rate)),
                    }
                    for (component, decay), parameters in groups.items()
                ],
                **arguments,
            )
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._note(loss, outputs)
        elif self.model_accepts_loss_kwargs and "labels" in inputs:
            plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            # Scenes of points have losses with several means.
            if hasattr(plain, "row_losses"):
                rows = plain.row_losses(outputs["logits"], **inputs)
                self._row_losses.append(self.accelerator.gather_for_metrics(torch.stack(rows, dim=1).detach()))
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """What the rows of a step count in its loss, over all accumulation steps and processes (see `count_items` of the model):
        labels may count differently, and modalities be there in some rows only."""
        if (
            not (self.model_accepts_loss_kwargs and batch_samples and "labels" in batch_samples[0])
            or self.args.n_gpu > 1
        ):
            return super()._get_num_items_in_batch(batch_samples, device)
        batches = [{key: value for key, value in batch.items() if key != "row_ids"} for batch in batch_samples]
        counts = sum(self.model.count_items(**batch) for batch in batches).to(device)
        return self.accelerator.reduce(counts, "sum") if self.args.average_tokens_across_devices else counts

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """transformers' own, with each row once in the loss: there it is a mean of means of batches, of whatever size, and of what
        fills up the last batch of several processes."""
        self._row_losses.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._row_losses:
            losses, counts = torch.cat(self._row_losses).double().sum(0)
            output.metrics[f"{metric_key_prefix}_loss"] = (losses / counts).item()
        return output

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.gradient_cache is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs, steps = self._prepare_inputs(inputs), self.current_gradient_accumulation_steps
        # The hooks of DDP wait for every parameter in every backward: gradients are averaged here instead.
        with model.no_sync() if hasattr(model, "no_sync") else nullcontext():
            outputs = backward_in_parts(
                self.accelerator.unwrap_model(model),
                inputs,
                self.gradient_cache,
                self.accelerator.backward if self.accelerator.scaler is not None else None,
                self.compute_loss_context_manager,
                1 / steps,
            )
        self._note(outputs.loss, outputs)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="mean"))
        return outputs.loss / steps

    def _note(self, loss, outputs):
        """Keeps what the log shows of a step of training, and stops at a loss that is no number."""
        if not loss.isfinite().all():
            self._stop(f"the loss is {loss.detach().float().mean().item()}")
        for kind, key in (("weight", "modality_weights"), ("auxiliary_loss", "auxiliary_losses")):
            values = outputs.get(key) if hasattr(outputs, "get") else None
            if values is not None:
                self._balance.setdefault(kind, []).append(values.detach().float().view(-1, values.shape[-1]).mean(0))
        for name, value in (outputs.get("losses") or {}).items() if hasattr(outputs, "get") else ():
            self._parts.setdefault(name, []).append(value)

    def _prepare_inputs(self, inputs):
        rows = inputs.pop("row_ids", None) if hasattr(inputs, "pop") else None
        self._rows = [] if rows is None else rows.tolist()
        if broken := inputs.pop("broken_samples", None) if hasattr(inputs, "pop") else None:
            self.broken_samples.update(broken)
            self._check_broken_samples()
        return super()._prepare_inputs(inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Of a model that writes, the words that it writes: scores of all the vocabulary would not fit for a dataset."""
        whole = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if prediction_loss_only or not (hasattr(whole, "generate") and whole.config.is_encoder_decoder):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, _, _ = super().prediction_step(model, dict(inputs), True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels, begun = inputs.pop("labels", None), 1
        if "decoder_input_ids" in inputs:
            # What is to be written stands there too.
            prompts, mask = beginnings(inputs["decoder_input_ids"], labels, whole.config.decoder_config.pad_token_id)
            inputs |= {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
            begun = prompts.shape[1]
        with torch.no_grad(), self.compute_loss_context_manager():
            words = whole.generate(**inputs)
        return loss, words[:, begun:], labels

    def _get_grad_norm(self, model, grad_norm=None):
        # Before every step, while `_clip_grad_norm` is left out with max_grad_norm=0.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Scaled float16 gradients overflow now and then, and the scaler then skips the step.
        if (
            norm is not None
            and self.accelerator.mixed_precision != "fp16"
            and not torch.as_tensor(norm).isfinite().all()
        ):
            self._stop(f"the gradient has norm {float(norm)}")
        return norm

    def _stop(self, what):
        rows = f" on rows {self._rows[:16]}{' and more' if len(self._rows) > 16 else ''} of the training data"
        most = self.args.max_grad_norm
        clipping = f"max_grad_norm={most}" if most > 0 else f"set max_grad_norm={most}, which clips nothing, above 0"
        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        raise TrainingDiverged(
            f"{what} at step {self.state.global_step + 1}{rows if self._rows else ''}. Look at the inputs of these rows, or "
            f"lower learning_rate={self.args.learning_rate} or {clipping}. "
            + (
                f"{Path(last).name} is kept: the same command goes on from there."
                if last
                else "No checkpoint was saved yet."
            )
        )

    def log(self, logs, start_time=None):
        # A fusion that leans on one modality alone is the classic failure: it must be seen while it happens.
        if "loss" in logs:
            for kind, values in self._balance.items():
                means = torch.stack(values).mean(0).tolist()
                names = self.model.config.modality_names
                logs |= {f"{kind}_{name}": round(mean, 4) for name, mean in zip(names, means, strict=True)}
            logs |= {f"part_{n}": round(torch.stack(v).float().mean().item(), 5) for n, v in self._parts.items()}
            logs |= self._gradient_norms
            if self.max_broken_samples:
                self._gather_broken_samples()
                logs["broken_samples"] = len(self.broken_samples)
            self._balance.clear()
            self._parts.clear()
            self._gradient_norms.clear()
        super().log(logs, start_time)

    def init_hf_repo(self, token=None, private=None):
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={self.args.hub_strategy.value!r} publishes checkpoints: pickles, and paths of this machine. Expected "
                "'every_save' or 'end'; checkpoints stay in output_dir."
            )
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Publishes model and processor with a card that has the last evaluation (see hub.py): Trainer's own would send its pickled
        arguments along, in which token and paths of this machine lie.

        Args:
            blocking: wait until it is done, and return what `publish` does; else a Future of it.
            kwargs: of `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        arguments = {"token": token, "revision": revision or self.args.hub_revision, "message": commit_message}
        if blocking:
            return publish(self.args.output_dir, self.hub_model_id, **arguments)
        return HfApi().run_as_future(publish, self.args.output_dir, self.hub_model_id, **arguments)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._write_card(Path(checkpoint_folder))
        message = f"Training in progress, step {self.state.global_step}"
        try:
            publish(
                checkpoint_folder,
                self.hub_model_id,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                message=message,
            )
        except ValueError as error:
            # A Hub that is away for an hour is no reason to stop training.
            logger.warning(f"step {self.state.global_step} was not published: {error}")

    def create_model_card(self, dataset=None, **kwargs):
        """Writes the card of a head into `output_dir`, with the last evaluation. dataset: words for the data."""
        if type(self._whole_model()).__name__ not in HUB_TASKS:
            super().create_model_card(dataset=dataset, **kwargs)
        elif self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), dataset)

    def _whole_model(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _write_card(self, folder, dataset=None):
        model, processor = self._whole_model(), self.processing_class
        scored = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {})
        metrics = {key.removeprefix("eval_"): value for key, value in scored.items() if key.startswith("eval_")}
        result = {
            "metrics": {key: value for key, value in metrics.items() if key not in _TIMES},
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seed": self.args.seed,
            "eval_rows": _count(self.eval_dataset),
            "train_rows": _count(self.train_dataset),
        }
        arguments = None if processor is None else [processor.argument_of(name) for name in processor.modality_names]
        model_card(model, result=result, arguments=arguments, dataset=dataset).save(folder / "README.md")
        shutil.copyfile(LICENSE, folder / "LICENSE")


def _count(dataset):
    """Rows of a dataset, None where it is not one, or does not say."""
    return None if isinstance(dataset, dict) or not hasattr(dataset, "__len__") else len(dataset)


# What Trainer writes beside the metrics of an evaluation.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class GradientNorms(TrainerCallback):
    """Writes the norm of each modality's gradients into `norms`, at steps that are logged."""

    def __init__(self, norms):
        self.norms, self.steps_per_epoch = norms, None

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        known = has_length(train_dataloader)
        self.steps_per_epoch = -(-len(train_dataloader) // args.gradient_accumulation_steps) if known else None

    def _is_logged(self, args, state):
        step = state.global_step + 1
        if step == 1 and args.logging_first_step:
            return True
        if args.logging_strategy != IntervalStrategy.EPOCH:
            return step % max(1, state.logging_steps or 1) == 0
        # Where an epoch of a stream ends is not known before: any step may be its last.
        return self.steps_per_epoch is None or step % self.steps_per_epoch == 0 or step == state.max_steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self._is_logged(args, state):
            return
        squares = {}
        for name, parameter in model.named_parameters():
            modality = modality_of(name)
            if parameter.grad is not None and modality is not None:
                norm = torch.linalg.vector_norm(parameter.grad.detach().float())
                # Of a parameter that is sharded over processes (FSDP2), of all its shards.
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                squares[modality] = squares.get(modality, 0.0) + (norm**2).item()
        self.norms.update({f"gradient_norm_{name}": round(value**0.5, 6) for name, value in squares.items()})


class BrokenSamples(TrainerCallback, ExportableState):
    """Samples that could not be read, which a checkpoint remembers."""

    def __init__(self):
        self.found = {}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault(type(self).__name__, {})

    def state(self):
        return {"args": {}, "attributes": {"found": self.found}}


class _Places(TrainerCallback):
    """Tells the sampler of a trainer where it is: the epoch does not reach it through every wrapper of a loader, and a stream need not
    read what a run has seen already."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = getattr(self.trainer, "_sampler", None)
        if sampler is None:
            return
        # A whole number at the end of an epoch. The only epoch of a stream that nobody counted never ends.
        sampler.set_epoch(int(state.epoch or 0))
        if hasattr(sampler, "skip") and not args.ignore_data_skip:
            steps = state.global_step
            if has_length(train_dataloader):
                steps %= -(-len(train_dataloader) // args.gradient_accumulation_steps)
            sampler.skip = steps * args.gradient_accumulation_steps * self.trainer._train_batch_size


def beginnings(words, labels, pad):
    """What a text goes on from, where words (B,T) hold it and the text, and labels (B,T) are -100 where nothing is learnt of it.

    Returns:
        (B,P) padded on the left, and its mask (B,P).
    """
    lengths = (labels != -100).int().argmax(dim=1) + 1
    longest = int(lengths.max())
    places = torch.arange(longest, device=words.device) - (longest - lengths[:, None])
    mask = places >= 0
    return words.gather(1, places.clamp(min=0)).masked_fill(~mask, pad), mask.long()


def component_of(parameter_name):
    """The component a parameter belongs to: a modality name, `fusion` or `head`."""
    parts = parameter_name.split(".")
    if "encoders" in parts[:-1]:
        return parts[parts.index("encoders") + 1]
    return "fusion" if "crossmodal" in parts else "head"


def modality_of(parameter_name):
    """The modality whose encoder or projection a parameter belongs to, or None."""
    parts = parameter_name.split(".")
    for room in ("encoders", "projections"):
        if room in parts:
            return parts[parts.index(room) + 1]
    return None


class QuietProgress(ProgressCallback):
    """Trainer's progress bar, with loss and metrics beside it instead of one dict per line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {k: f"{v:.4g}" for k, v in (logs or {}).items() if k in ("loss", "epoch") or "accuracy" in k}
            self.training_bar.set_postfix(shown, refresh=False)


class EpochReport(TrainerCallback):
    """One line per evaluation: epoch, training loss and the task's metric."""

    def __init__(self, metric, write):
        self.metric, self.write, self.loss = metric, write, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = (metrics or {}).get(f"eval_{self.metric}")
        if state.is_world_process_zero and value is not None:
            loss = "     -" if self.loss is None else f"{self.loss:.4f}"
            self.write(f"epoch {state.epoch:6.2f}   loss {loss}   {self.metric} {value:.4f}")


DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "logging_steps": 50,
    "lr_scheduler_type": "cosine",
    "report_to": "none",
    # How long early stopping has waited already.
    "restore_callback_states_from_checkpoint": True,
    # Else it follows the verbosity of the logs, which the command line turns down.
    "disable_tqdm": False,
}


def fit(model, processor, task, train_dataset, eval_dataset, training, folder, recipe, checkpoint, write):
    """Trains a model in place, from a checkpoint on if there is one. Returns the trainer."""
    callbacks = [EpochReport(task.main_metric, write)]
    if recipe.early_stopping_patience is not None and eval_dataset is not None:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    if task.writes:
        task.begin(model, processor, train_dataset.targets)
    mixed = None
    if recipe.mixing:
        own = SampleCollator(processor, task.encode_targets, row_ids=True, unimodal=recipe.unimodal_targets)
        config = model.config
        mixed = MixingCollator(own, processor.modalities, config.num_labels, config.problem_type, **recipe.mixing)
    trainer = CrossModalTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), seed=recipe.seed, remove_unused_columns=False, **training),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=SampleCollator(processor, task.encode_targets, unimodal=recipe.unimodal_targets),
        processing_class=processor,
        callbacks=callbacks,
        learning_rates=recipe.learning_rates,
        rows_per_image=recipe.rows_per_image,
        gradient_cache=recipe.gradient_cache,
        train_collator=mixed,
        max_broken_samples=recipe.max_broken_samples,
    )
    if eval_dataset is not None:
        _score_on(trainer, task, eval_dataset)
    trainer.remove_callback(ProgressCallback)
    # With disable_tqdm, Trainer prints its raw logs instead.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(QuietProgress())
    if checkpoint is not None:
        write(f"resuming from {checkpoint.name}.")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # What follows are not epochs.
    trainer.remove_callback(EpochReport)
    return trainer


def _score_on(trainer, task, dataset):
    trainer.compute_metrics = lambda prediction: task.score_outputs(prediction.predictions, dataset.targets)


def score(trainer, task, dataset, processor):
    """({"loss", metrics of the task}, outputs) of a trainer's model on a dataset, gathered from all ranks."""
    trainer.compute_metrics = None
    # With workers that persist, `evaluate` would take the loader of the dataset that it had before, whatever it is given.
    found = trainer.predict(dataset)
    whole = {"loss": found.metrics["test_loss"]}
    if task.scores_whole:
        model = trainer.accelerator.unwrap_model(trainer.model)
        return whole | task.evaluate(model, processor, dataset, progress=False), found.predictions
    return whole | task.score_outputs(found.predictions, dataset.targets), found.predictions
