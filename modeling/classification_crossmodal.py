"""Heads that choose from a set of labels: answers to questions (`CrossModalForVQA`), classes, or a number on a scale.

Letters: B batch, T_m tokens of modality m, D hidden_size, M modalities, A answers.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput, can_return_tuple

from .heads_crossmodal import AuxiliaryHeads, ClassificationHead
from .losses_crossmodal import mean_loss, row_counts, row_losses, unimodal_losses
from .modeling_crossmodal import CrossModalModel, CrossModalPreTrainedModel


@dataclass
class CrossModalClassifierOutput(ModelOutput):
    """Output of a classification head: loss (scalar, with labels), logits (B,A), and what the base model says.

    auxiliary_logits (B,M,A) are of each modality alone, auxiliary_losses (M,) theirs; with `auxiliary_loss_weight`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    modality_weights: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    modality_tokens: dict[str, torch.FloatTensor] | None = None
    token_grids: dict[str, tuple[int, int]] | None = None
    cross_attentions: tuple[dict[str, torch.FloatTensor], ...] | None = None
    auxiliary_logits: torch.FloatTensor | None = None
    auxiliary_losses: torch.FloatTensor | None = None


class CrossModalClassifier(CrossModalPreTrainedModel):
    """What the heads share that choose from, score, or measure on `config.id2label`: one MLP on the fused vector.

    The loss follows `config.problem_type`: `"single_label_classification"` is cross entropy on one label per row,
    `"multi_label_classification"` the summed binary cross entropy on scores (VQA v2), `"regression"` the mean squared (or, by
    `config.regression_loss`, absolute) error. Left at None it is taken from the first labels seen: long (B,), or float (B,A);
    float (B,) is a regression. `config.class_weights` weigh the classes.
    """

    custom_pipelines = None
    accepts_loss_kwargs = True

    def __init__(self, config, encoders=None):
        super().__init__(config)
        if self.custom_pipelines:
            config.custom_pipelines = self.custom_pipelines
        self.crossmodal = CrossModalModel(config, encoders)
        self.main_input_name = self.crossmodal.main_input_name
        self.classifier = ClassificationHead(config, evidence=config.unimodal_evidence)
        if config.auxiliary_loss_weight:
            self.auxiliary = AuxiliaryHeads(config)
        self.post_init()
        self._apply_freezing()

    @can_return_tuple
    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        labels=None,
        modality_mask=None,
        task_ids=None,
        output_attentions=None,
        output_hidden_states=None,
        num_items_in_batch=None,
        unimodal_targets=None,
        **named_inputs,
    ):
        """The inputs of `CrossModalModel`, and labels.

        Args:
            labels: (B,) long ids (-100: a row that does not count) or (B,A) probabilities of one label, (B,A) scores in [0,1] of
                several, or (B,) or (B,A) real numbers of a regression.
            num_items_in_batch: what the rows of all accumulation steps and processes count together, the sum of `count_items`, or
                the number of their labels; the loss is then the part of these rows in the mean over all. None: their own mean.
            unimodal_targets: (B,M), or (B,M,A), as `labels`: what each modality alone says, where data has labels of that too (a
                neutral tweet with a happy picture), for `auxiliary_loss_weight`. None: the labels of the rows.

        Returns:
            CrossModalClassifierOutput.
        """
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {key: value for key, value in named_inputs.items() if key != "return_dict"}
        outputs = self.crossmodal(
            modality_mask=modality_mask,
            task_ids=task_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_tokens=False,
            return_dict=True,
            **inputs,
        )
        if labels is not None:
            self._settle_problem_type(labels)
        auxiliary_logits, auxiliary_losses, evidence = None, None, None
        if self.config.auxiliary_loss_weight:
            auxiliary_logits = self.auxiliary(outputs.unimodal_embeddings)
            if self.config.unimodal_evidence:
                evidence = self._evidence(auxiliary_logits.detach(), outputs.presence)
        logits = self.classifier(outputs.pooler_output, evidence)
        loss, share = None, None
        if labels is not None:
            self._check_labels(logits, labels)
            self._check_unimodal_targets(labels, unimodal_targets)
            options = self._loss_options(logits.device)
            loss = mean_loss(*row_losses(logits, labels, **options))
            if num_items_in_batch is not None:
                share = self._share_of_step(
                    num_items_in_batch,
                    labels,
                    modality_mask=modality_mask,
                    unimodal_targets=unimodal_targets,
                    **inputs,
                )
                loss = loss * share[0]
            if auxiliary_logits is not None:
                auxiliary_losses = unimodal_losses(
                    auxiliary_logits,
                    labels,
                    outputs.presence,
                    outputs.modality_log_variances,
                    targets=unimodal_targets,
                    **options,
                )
                if self.training:
                    # Left out of what an evaluation reports, so that losses compare with those of other models.
                    own = auxiliary_losses
                    if share is not None:
                        own = own * (share[1:] if len(share) > 1 else share)
                    loss = loss + self.config.auxiliary_loss_weight * own.mean()
        return CrossModalClassifierOutput(
            loss=loss,
            logits=logits,
            modality_weights=outputs.modality_weights,
            pooler_output=None if outputs.modality_tokens is None else outputs.pooler_output,
            modality_tokens=outputs.modality_tokens,
            token_grids=outputs.token_grids,
            cross_attentions=outputs.cross_attentions,
            auxiliary_logits=auxiliary_logits,
            auxiliary_losses=auxiliary_losses,
        )

    def row_losses(self, logits, labels, **batch):
        """Loss of each row (B,), and how much it counts (B,), of logits and the inputs of a forward."""
        return row_losses(logits, labels, **self._loss_options(logits.device))

    def _evidence(self, logits, presence):
        """What the head sees of logits (B,M,C) of each modality alone: log probabilities, 0 of a modality that a row lacks."""
        if self.config.problem_type == "multi_label_classification":
            logits = nn.functional.logsigmoid(logits)
        elif self.config.problem_type != "regression":
            logits = logits.log_softmax(dim=-1)
        return logits.masked_fill(~presence[..., None], 0.0)

    def count_items(self, labels, modality_mask=None, task_ids=None, unimodal_targets=None, **inputs):
        """How much the rows of a batch, the inputs of a forward, count in a mean over several batches: (1,), or with
        `auxiliary_loss_weight` (1+M,), those of them that have each modality too."""
        self._settle_problem_type(labels)
        options = self._loss_options(labels.device)
        counts = row_counts(labels, options["problem_type"], options["class_weights"])
        if not self.config.auxiliary_loss_weight:
            return counts.sum().view(1)
        # Before modality dropout: what it takes out is known only in the forward, and is made up for by the mean of what is left.
        presence = self.crossmodal.presence_of(inputs, modality_mask)
        if unimodal_targets is not None:
            given = [
                row_counts(own, options["problem_type"], options["class_weights"])
                for own in unimodal_targets.unbind(1)
            ]
            return torch.cat([counts.sum().view(1), (torch.stack(given, dim=1) * presence).sum(dim=0)])
        return torch.cat([counts.sum().view(1), counts @ presence.float()])

    def _loss_options(self, device):
        """Arguments of `row_losses` that the config says."""
        config = self.config
        weights = None if config.class_weights is None else torch.tensor(config.class_weights, device=device)
        by_distance = config.problem_type == "regression" and config.regression_loss == "absolute"
        return {
            "problem_type": "absolute" if by_distance else config.problem_type,
            "label_smoothing": config.label_smoothing,
            "class_weights": weights,
        }

    def _settle_problem_type(self, labels):
        """Takes `config.problem_type` from labels where it is not said."""
        if self.config.problem_type is None:
            many = "regression" if labels.dim() == 1 else "multi_label_classification"
            self.config.problem_type = many if labels.is_floating_point() else "single_label_classification"

    def _check_labels(self, logits, labels):
        """Refuses labels that do not fit `config.problem_type`."""
        config, real = self.config, labels.is_floating_point()
        shapes = [logits.shape if real else logits.shape[:1]]
        if config.problem_type == "regression" and logits.shape[1] == 1:
            shapes.append(logits.shape[:1])
        one = config.problem_type == "single_label_classification"
        if not (real or one) or labels.shape not in shapes:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit "
                f"problem_type={config.problem_type!r}. Expected float scores {tuple(logits.shape)} for "
                f"'multi_label_classification', label ids {tuple(logits.shape[:1])} (or their probabilities "
                f"{tuple(logits.shape)}) for 'single_label_classification', or numbers {tuple(logits.shape)} for 'regression'."
            )
        # On a GPU the kernel itself stops at a wrong label; to look here would make every step wait for it.
        if labels.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if one and real and not torch.allclose(labels.sum(-1), labels.new_ones(len(labels)), atol=1e-3):
            raise ValueError(
                "labels are scores that do not sum to 1 in every row, with problem_type='single_label_classification'. Give label "
                "ids, or probabilities; for several labels that hold at once set problem_type='multi_label_classification'."
            )
        if not real:
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= logits.shape[1]))]
            if len(wrong):
                raise ValueError(
                    f"labels hold {wrong[0].item()}, which is no class of num_labels={logits.shape[1]}. Expected 0 to "
                    f"{logits.shape[1] - 1}, or -100 for a row without a label."
                )

    def _check_unimodal_targets(self, labels, targets):
        expected = (len(labels), len(self.config.modality_names), *labels.shape[1:])
        if targets is not None and (
            targets.shape != expected or targets.is_floating_point() != labels.is_floating_point()
        ):
            raise ValueError(
                f"unimodal_targets of shape {tuple(targets.shape)} and type {targets.dtype}. Expected {expected}, of the type of the "
                f"labels, {labels.dtype}: one for each modality, in the order {self.config.modality_names}."
            )

    def resize_answers(self, id2label, problem_type=None):
        """Gives the model another answer vocabulary in place. Answers that it knew keep what was learnt of them.

        problem_type: of the new vocabulary; None leaves it as it was.
        """
        self.config.problem_type = problem_type or self.config.problem_type
        known = {label: index for index, label in self.config.id2label.items()}

        def resized(old):
            new = nn.Linear(old.in_features, len(id2label), device=old.weight.device, dtype=old.weight.dtype)
            self._init_weights(new)
            with torch.no_grad():
                for index, label in id2label.items():
                    if label in known:
                        new.weight[index] = old.weight[known[label]]
                        new.bias[index] = old.bias[known[label]]
            return new

        self.classifier.out_proj = resized(self.classifier.out_proj)
        if self.config.auxiliary_loss_weight:
            self.auxiliary.classifiers = nn.ModuleList(map(resized, self.auxiliary.classifiers))
        if self.config.unimodal_evidence:
            for layer in self.classifier.evidence:
                old, layer.in_features = layer.weight, len(id2label)
                layer.weight = nn.Parameter(old.new_zeros(old.shape[0], len(id2label)))
                with torch.no_grad():
                    for index, label in id2label.items():
                        if label in known:
                            layer.weight[:, index] = old[:, known[label]]
        # They were said of the labels before.
        self.config.class_weights = self.config.thresholds = None
        self.config.id2label = dict(id2label)
        self.config.label2id = {label: index for index, label in id2label.items()}


class CrossModalForVQA(CrossModalClassifier):
    """Answers questions about any modalities by choosing from the answers in `config.id2label`."""

    # What `pipeline(model=folder)` runs. The processor carries the file.
    custom_pipelines = {
        "visual-question-answering": {
            "impl": "pipeline_crossmodal.CrossModalVQAPipeline",
            "pt": ["AutoModelForVisualQuestionAnswering"],
            "type": "multimodal",
        }
    }


class CrossModalForSequenceClassification(CrossModalClassifier):
    """Classifies rows of any modalities: one label, several, or a real number (`config.problem_type`)."""

    custom_pipelines = {
        "crossmodal-classification": {
            "impl": "pipeline_crossmodal.CrossModalClassificationPipeline",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "multimodal",
        }
    }


CrossModalForVQA.register_for_auto_class("AutoModelForVisualQuestionAnswering")
CrossModalForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["CrossModalForSequenceClassification", "CrossModalForVQA"]
