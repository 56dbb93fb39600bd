"""`CrossModalForRetrieval`: embeddings to find candidates with, and cross-attention over tokens to rank them.

Letters: B batch, U_m distinct inputs of modality m, T_m tokens of it, D hidden_size, M modalities, P pairs, E projection_dim.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import math
from dataclasses import dataclass
from itertools import combinations, permutations

import torch
from torch import nn
from transformers.utils import ModelOutput, can_return_tuple

from .attention_crossmodal import FeedForwardBlock, SelfAttentionBlock
from .contrastive_crossmodal import (
    combine_losses,
    contrast,
    cross_attention_penalty,
    draw_negatives,
    gather,
    hardest_triplets,
    info_nce,
    is_distributed,
    late_interaction,
    matching_loss,
    mean_of_means,
    positives_of,
    ranking_loss,
    recovered_tokens,
    sigmoid_contrast,
    similarities_of,
)
from .encoders_crossmodal import EncodedModality
from .features_crossmodal import ComparedRows, ModalityFeatures
from .heads_crossmodal import ClassificationHead
from .modeling_crossmodal import CrossModalModel, CrossModalPreTrainedModel, all_alike
from .pooling_crossmodal import PooledShortcut, TokenPooling


@dataclass
class CrossModalRetrievalOutput(ModelOutput):
    """Output of `CrossModalForRetrieval`.

    loss: scalar, where rows of several modalities came together.
    logits_per_image (images, texts), logits_per_text: scaled similarities, of models with a vision and a text modality.
    image_embeds, text_embeds: of those two. modality_embeds: {modality: (B,E)}, of length 1, 0 for rows that lack it.
    match_logits: (B,), of every row's own modalities with each other, with `return_match=True`.
    modality_weights: (B,M) of the same.
    losses: {name: scalar}, the parts of the loss, unweighted, and what shows how they fare.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    modality_embeds: dict[str, torch.FloatTensor] | None = None
    match_logits: torch.FloatTensor | None = None
    modality_weights: torch.FloatTensor | None = None
    losses: dict[str, torch.FloatTensor] | None = None


class Temperature(nn.Module):
    """exp(a) for learned a, at most 100 (CLIP, Radford et al. 2021, arXiv 2103.00020), and the bias of SigLIP."""

    def __init__(self, initial_value, initial_bias=None):
        super().__init__()
        # With a dimension: FSDP2 shards no parameters without one.
        self.scale = nn.Parameter(torch.empty(1))
        self.initial_values = {"scale": initial_value}
        if initial_bias is not None:
            self.bias = nn.Parameter(torch.empty(1))
            self.initial_values["bias"] = initial_bias

    def forward(self):
        if self.training:
            with torch.no_grad():
                self.scale.clamp_(max=math.log(100.0))
        return self.scale[0].exp()


class LossWeights(nn.Module):
    """A learned log variance for each loss, 0 at the start."""

    def __init__(self, names):
        super().__init__()
        self.names = tuple(names)
        self.log_variances = nn.Parameter(torch.empty(len(self.names)))
        self.initial_values = {"log_variances": 0.0}

    def forward(self):
        return dict(zip(self.names, self.log_variances, strict=True))


class ModalityTower(nn.Module):
    """Projected tokens of one modality to tokens that know each other, and to one embedding."""

    def __init__(self, config, name):
        super().__init__()
        self.shortcut = None
        if config.pooled_shortcut:
            self.shortcut = PooledShortcut(config, name, config.projection_dim, 4 * config.projection_dim)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = nn.ModuleList([SelfAttentionBlock(config) for _ in range(config.num_unimodal_layers)])
        self.mlp = nn.ModuleList([FeedForwardBlock(config) for _ in range(config.num_unimodal_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooling = TokenPooling(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)

    def forward(self, levels, mask, raw):
        """levels [(U,T,D)], mask (U,T) or None, raw [(U,T,D_k)] as the encoder gave them. Returns tokens (U,T,D) and embeddings (U,E)
        of length 1."""
        tokens = self.norm(sum(levels))
        for attend, feed in zip(self.attention, self.mlp, strict=True):
            tokens = feed(attend(tokens, mask)[0])
        tokens = self.final_norm(tokens)
        embeddings = self.projection(self.dropout(self.pooling(tokens, mask)))
        if self.shortcut is not None:
            embeddings = embeddings + self.shortcut(raw, mask)
        return tokens, nn.functional.normalize(embeddings.float(), dim=-1)


class LateInteraction(nn.Module):
    """Tokens of each modality in a space of their own, where each looks for its nearest in the other row (FILIP)."""

    def __init__(self, config):
        super().__init__()
        self.token_projections = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, config.projection_dim) for name in config.modality_names}
        )
        self.temperature = Temperature(config.logit_scale_init_value)

    def forward(self, name, tokens, mask, other, other_tokens, other_mask):
        """As `TokenRecovery`, of `late_interaction`."""
        one, two = (
            nn.functional.normalize(self.token_projections[key](values).float(), dim=-1)
            for key, values in ((name, tokens), (other, other_tokens))
        )
        return self.temperature() * late_interaction(one, two, mask, other_mask)


class TokenRecovery(nn.Module):
    """One attention of the tokens of a modality on those of another, by which they are to recover themselves."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.token_queries = nn.ModuleDict({name: nn.Linear(width, width) for name in config.modality_names})
        self.token_keys = nn.ModuleDict({name: nn.Linear(width, width) for name in config.modality_names})
        self.token_values = nn.ModuleDict({name: nn.Linear(width, width) for name in config.modality_names})
        # Cosines: a tenth of CLIP's first temperature would drown them.
        self.temperature = Temperature(math.log(10.0))

    def forward(self, name, tokens, mask, other, other_tokens, other_mask):
        """tokens (B,T,D) of `name` and (N,S,D) of `other` with their masks. Returns s (B,N) of `recovered_tokens`, scaled."""
        key, value = self.token_keys[other](other_tokens), self.token_values[other](other_tokens)
        scores = recovered_tokens(self.token_queries[name](tokens), key, value, tokens, mask, other_mask)
        return self.temperature() * scores


class QueryBank(nn.Module):
    """Embeddings of training rows, by which it is known how near an input is to everything: Querybank Normalisation (Bogolin et al. 2022,
    arXiv 2112.12777), of candidates that come first for many queries.

        h_m(x) = log mean over rows j of the bank exp(s <x, y_j>), y_j of the other modality,   0 where the bank is empty
    """

    def __init__(self, config):
        super().__init__()
        shape = config.query_bank_size, config.projection_dim
        for name in config.modality_names:
            self.register_buffer(self._key(name), torch.empty(shape))
        # Zeros are as near to everything as to nothing.
        self.initial_values = dict.fromkeys(map(self._key, config.modality_names), 0.0)

    @staticmethod
    def _key(name):
        return f"{name}_embeddings"

    @torch.no_grad()
    def fill(self, embeddings):
        """Takes embeddings {modality: (N,E)} of any number of rows; too few of them stand there several times."""
        for name, rows in embeddings.items():
            own = getattr(self, self._key(name))
            own.copy_(rows[torch.arange(len(own), device=rows.device) % len(rows)])

    def nearness(self, embeddings, other, scale):
        """h (P,) of embeddings (P,E) by the bank of modality `other`. scale: s."""
        near = scale * similarities_of(embeddings.float(), getattr(self, self._key(other)).float())
        return near.logsumexp(dim=1) - math.log(near.shape[1])

    def forward(self, embeddings, scale):
        """{modality: (P,E)} of rows to the sum of h of the two (P,), mean over pairs of modalities, as `similarity` counts them: 0 of
        a pair that a row has not (embeddings of 0). scale: s."""
        found = []
        for one, other in combinations(embeddings, 2):
            both = embeddings[one].any(dim=1) & embeddings[other].any(dim=1)
            near = self.nearness(embeddings[one], other, scale) + self.nearness(embeddings[other], one, scale)
            found.append(near.masked_fill(~both, 0.0))
        return torch.stack(found).mean(dim=0)


ALIGNMENT_CLASSES = {"recovery": TokenRecovery, "late_interaction": LateInteraction}


class CrossModalForRetrieval(CrossModalPreTrainedModel):
    """Finds and ranks: embeddings of each modality by itself, trained by contrast, and a score of whole rows by
    cross-attention over the same tokens, trained to tell pairs that belong together from hard negatives.

    L = contrastive_weight L_con + matching_weight L_match + alignment_weight L_tok + cross_weight L_x   (CCACO, corrected;
    with `loss_weighting="learned"` each by its uncertainty). See contrastive_crossmodal.py for each.
    """

    def __init__(self, config, encoders=None):
        super().__init__(config)
        self.check_config(config)
        config.custom_pipelines = {
            "crossmodal-retrieval": {
                "impl": "pipeline_crossmodal.CrossModalRetrievalPipeline",
                "pt": ["AutoModelForZeroShotImageClassification"],
                "type": "multimodal",
            }
        }
        self.crossmodal = CrossModalModel(config, encoders)
        self.main_input_name = self.crossmodal.main_input_name
        self.towers = nn.ModuleDict({name: ModalityTower(config, name) for name in config.modality_names})
        sigmoid = config.contrastive_loss == "sigmoid"
        self.logit_scale = Temperature(config.logit_scale_init_value, -10.0 if sigmoid else None)
        if config.matching != "cosine":
            self.matching = ClassificationHead(config, num_outputs=1)
        else:
            self.matching = nn.ModuleDict(
                {name: nn.Linear(config.hidden_size, config.projection_dim) for name in config.modality_names}
            )
        if config.query_bank_size:
            self.query_bank = QueryBank(config)
        self.loss_names = [name for name in _WEIGHTS if getattr(config, f"{name}_weight")]
        if config.alignment_weight:
            self.alignment = ALIGNMENT_CLASSES[config.alignment](config)
        if config.loss_weighting == "learned":
            self.loss_weights = LossWeights(self.loss_names)
        self.post_init()
        self._apply_freezing()

    @staticmethod
    def check_config(config):
        if len(config.modality_names) < 2:
            raise ValueError(
                f"CrossModalForRetrieval compares modalities, and modality_names={config.modality_names} has one. Give two."
            )
        if config.pooled_features:
            raise ValueError(
                "pooled_features=True is for heads that classify; embeddings of CrossModalForRetrieval have pooled_shortcut."
            )
        if config.query_bank_size and config.matching == "cosine":
            raise ValueError(
                f"query_bank_size={config.query_bank_size} corrects log odds, and matching='cosine' ranks by cosines. Set it to 0."
            )

    def _apply_freezing(self):
        super()._apply_freezing()
        config, base, towers = self.config, self.crossmodal, self.towers.values()
        parts = []
        if not config.matching_weight:
            parts += [base.fusion, base.poolings, base.weighting, base.outputs, self.matching]
            parts += [base.missing_tokens] if config.missing_tokens else []
        if not config.contrastive_weight or config.contrastive_loss == "triplet":
            parts.append(self.logit_scale)
        if not config.contrastive_weight and not (config.matching_weight and config.matching == "cosine"):
            parts += [part for tower in towers for part in (tower.pooling, tower.projection, tower.shortcut) if part]
            if not (config.num_unimodal_layers or config.alignment_weight or config.cross_weight):
                parts += towers
        for part in parts:
            part.requires_grad_(False)

    def features(self, inputs, modality_mask=None):
        """Inputs of a forward to {modality: ModalityFeatures} and presence (B,M) bool, or None where modalities differ in
        their number of rows."""
        return self._features_of(self.crossmodal._collect_inputs(inputs), modality_mask)

    def _features_of(self, collected, modality_mask=None):
        base = self.crossmodal
        sizes = base._numbers_of_rows(collected)
        if all_alike(sizes.values()):
            encoded, presence = base.encode(collected, modality_mask)
        elif modality_mask is not None:
            raise ValueError(
                f"modality_mask was given, and modalities have different batch sizes: {sizes}. Give one row each."
            )
        else:
            encoded, presence = {}, None
            for name, item in collected.items():
                encoded[name] = base.encode({name: item})[0][name]
        levels, _ = base.project(encoded)
        found = {}
        for name, item in encoded.items():
            depths, tower = levels[name], self.towers[name]
            raw = item.levels
            if self.config.detach_global:
                tokens, embeddings = tower(_detached(depths), item.mask, _detached(raw))
            else:
                tokens, embeddings = tower(depths, item.mask, raw)
            if self.config.num_unimodal_layers:
                # The fusion stands on what the contrast has aligned (ALBEF, arXiv 2107.07651).
                depths = [*depths[:-1], tokens]
            if self.config.detach_local:
                depths, tokens = _detached(depths), tokens.detach()
            found[name] = ModalityFeatures(embeddings, depths, tokens, item.mask, item.index, item.present)
        return found, presence

    def match(self, features, presence=None, output_attentions=False):
        """Scores of rows by cross-attention over their tokens.

        Args:
            features: {modality: ModalityFeatures}, all of P rows. Inputs that several rows share are projected once.
            presence: (P,M) bool; None: every modality that is given.

        Returns:
            logits (P,), modality weights (P,M), attention maps of each layer.
        """
        names = self.config.modality_names
        rows = len(next(iter(features.values())))
        if presence is None:
            some = next(iter(features.values())).embeddings
            presence = torch.tensor([name in features for name in names], device=some.device).expand(rows, -1)
        base, levels, masks, shared = self.crossmodal, {}, {}, {}
        for name, item in features.items():
            own = EncodedModality([], mask=item.mask, index=item.index, present=item.present)
            levels[name], masks[name] = item.levels, own.mask
            if own.mask is not None:
                masks[name] = own.spread(own.mask)
            elif own.present is not None:
                masks[name] = own.present[:, None].expand(-1, item.levels[0].shape[1])
            if own.index is not None or own.present is not None:
                shared[name] = own
        _, embeddings, weights, _, fused, attentions = base.fuse(
            levels, masks, presence, shared, output_attentions, return_tokens=False
        )
        if self.config.matching != "cosine":
            return self.matching(fused).squeeze(-1), weights, attentions
        # S = i0 . c0 + alpha i1 . c1 (MMCA, Wei et al. CVPR 2020).
        projected = {
            name: nn.functional.normalize(self.matching[name](embeddings[:, names.index(name)]).float(), dim=-1)
            for name in features
        }
        scores = self.similarity(features) + self.config.matching_alpha * _mean_cosine(projected)
        return scores, weights, attentions

    def similarity(self, features):
        """Similarities (P,) of the embeddings of rows, mean over pairs of modalities. features as `match` takes them."""
        return _mean_cosine({name: item.spread(item.embeddings) for name, item in features.items()})

    def rank(self, features, presence=None):
        """Scores (P,) by which candidates are ranked: what cross-attention says, times `rank_weight`, and what the embeddings say, which
        are both log odds of belonging together, each if it was trained; less how near both are to everything, where there is a
        `query_bank`. Arguments as `match`."""
        config, beside = self.config, self._scaled(self.similarity(features))
        if config.query_bank_size:
            embeddings = {name: item.spread(item.embeddings) for name, item in features.items()}
            beside = beside - config.query_bank_weight * self.query_bank(embeddings, self.logit_scale())
        if not config.matching_weight:
            return beside
        scores, _, _ = self.match(features, presence)
        if config.matching != "cosine" and config.contrastive_weight:
            scores = config.rank_weight * scores + beside
        return scores

    @can_return_tuple
    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        labels=None,
        modality_mask=None,
        return_loss=True,
        return_match=False,
        **named_inputs,
    ):
        """The inputs of `CrossModalModel`. Modalities may come in different numbers of rows: then they are embedded, each
        by itself, and there is no loss.

        Args:
            labels: (B,) or (B,K) long; rows that agree in any column are positives of each other (the same image, the same
                text), and never negatives. None: every row is like itself alone.
            return_loss: compute the loss where rows of several modalities came together.
            return_match: also score every row's own modalities by cross-attention.

        Returns:
            CrossModalRetrievalOutput.
        """
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        inputs = {key: value for key, value in inputs.items() if value is not None} | named_inputs
        features, presence = self.features(inputs, modality_mask)
        return self._output(features, presence, labels, return_loss, return_match)

    def _output(self, features, presence, labels=None, return_loss=True, return_match=False):
        """What forward returns, from the features of its rows."""
        embeds = {name: item.spread(item.embeddings) for name, item in features.items()}
        together = presence is not None and len(features) > 1
        output = CrossModalRetrievalOutput(modality_embeds=embeds)
        image, text = (self._first_of(kind, embeds) for kind in ("vision", "text"))
        output.image_embeds, output.text_embeds = embeds.get(image), embeds.get(text)
        if image in embeds and text in embeds:
            output.logits_per_text = self._scaled(embeds[text] @ embeds[image].T)
            output.logits_per_image = output.logits_per_text.T
        if return_match:
            if not together:
                raise ValueError("return_match=True scores rows of several modalities. Give as many rows of each.")
            output.match_logits, output.modality_weights, _ = self.match(features, presence)
        if return_loss and (together or self.crossmodal._runs_all_modalities()):
            output.loss, output.losses, weights = self._loss(features, embeds, presence, labels)
            output.modality_weights = weights if output.modality_weights is None else output.modality_weights
        return output

    def _first_of(self, kind, among):
        """The first modality of a type that is among those given."""
        settings = self.config.modality_settings
        return next((n for n in self.config.modality_names if settings[n]["type"] == kind and n in among), None)

    def _scaled(self, similarities):
        scale = self.logit_scale()
        bias = getattr(self.logit_scale, "bias", None)
        return scale * similarities if bias is None else scale * similarities + bias

    def get_modality_features(self, name, **inputs):
        """Embeddings (B,E) of length 1 of one modality by itself, from the inputs of a forward."""
        self.crossmodal._known([name])
        features, _ = self.features(inputs)
        if name not in features:
            keys = [key for key in self.config.input_keys(name) if key]
            raise ValueError(f"no input of modality {name!r} was given. Expected {' and '.join(keys)}.")
        return features[name].spread(features[name].embeddings)

    def get_image_features(self, pixel_values=None, **inputs):
        """Embeddings (B,E) of the first vision modality."""
        name = self._first_of("vision", self.config.modality_names)
        if name is None:
            raise ValueError(
                f"this model has no vision modality. Use get_modality_features: {self.config.modality_names}."
            )
        return self.get_modality_features(name, **{**inputs, self.config.input_keys(name)[0]: pixel_values})

    def get_text_features(self, input_ids=None, attention_mask=None, **inputs):
        """Embeddings (B,E) of the first text modality."""
        name = self._first_of("text", self.config.modality_names)
        if name is None:
            raise ValueError(
                f"this model has no text modality. Use get_modality_features: {self.config.modality_names}."
            )
        values, mask = self.config.input_keys(name)
        return self.get_modality_features(name, **{**inputs, values: input_ids, mask: attention_mask})

    def _loss(self, features, embeds, presence, labels):
        """The weighted loss, {name: its parts}, and modality weights of the rows as they are (or None)."""
        some = next(iter(embeds.values()))
        labels = self._labels(labels, len(some), some.device)
        parts, shown, weights = {}, {}, None
        if "contrastive" in self.loss_names:
            parts["contrastive"] = self._contrastive_loss(embeds, presence, labels)
        batch = ComparedRows(features, presence, labels, torch.arange(len(some), device=some.device))
        if self.crossmodal._runs_all_modalities() and self.loss_names != ["contrastive"]:
            # What a row is told from are the rows of all processes, as if they were one batch.
            batch = batch.of_all_processes(self.config.modality_names)
        if "matching" in self.loss_names:
            parts["matching"], weights = self._matching_loss(batch)
        pairs = [pair for pair in combinations(batch.features, 2) if self._both(batch.presence, pair).any()]
        if "alignment" in self.loss_names:
            parts["alignment"] = self._mean([self._alignment_loss(batch, pair) for pair in pairs], some)
            if batch.shared:
                # All processes wait for the gradient of these, pairs or not.
                parts["alignment"] = parts["alignment"] + 0.0 * sum(p.sum() for p in self.alignment.parameters())
        if "cross" in self.loss_names:
            found = [self._cross_loss(batch, pair) for pair in pairs]
            parts["cross"] = self._mean([loss for loss, _ in found], some)
            shown = {
                f"cross_{k}": self._mean([s[k] for _, s in found if s], some)
                for k in ("norm", "entropy", "pooled_norm")
            }
        wanted = {name: getattr(self.config, f"{name}_weight") for name in self.loss_names}
        learned = self.loss_weights() if self.config.loss_weighting == "learned" else None
        loss = combine_losses(parts, wanted, learned)
        shown["scale"] = self.logit_scale.scale[0].exp()
        return loss, {name: value.detach() for name, value in (parts | shown).items()}, weights

    @staticmethod
    def _mean(values, some):
        return torch.stack(values).mean() if values else some.sum() * 0.0

    @staticmethod
    def _labels(labels, rows, device):
        if labels is None:
            own = torch.arange(rows, device=device)
            if is_distributed():
                # Rows of other processes are other rows.
                own = own + torch.distributed.get_rank() * 2**40
            return own[:, None]
        if len(labels) != rows or labels.is_floating_point() or labels.dim() > 2:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype}. Expected whole numbers ({rows},) or ({rows}, K): "
                "rows that agree in a column are positives of each other."
            )
        return labels.view(rows, -1)

    def _both(self, presence, pair):
        """Rows (B,) bool that have both modalities of a pair."""
        columns = [self.config.modality_names.index(name) for name in pair]
        return presence[:, columns].all(dim=1)

    def _contrastive_loss(self, embeds, presence, labels):
        """Mean over both directions of those pairs of modalities that any row has; in training over the rows of all processes, in
        evaluation of this one, which may be alone in evaluating."""
        some = next(iter(embeds.values()))
        own = torch.stack([embeds.get(name, torch.zeros_like(some)) for name in self.config.modality_names], dim=1)
        mine = torch.arange(len(own), device=own.device)
        # All modalities in one exchange: processes that lack different ones must agree on the order of their gradients.
        shared = self.training and is_distributed()
        vectors, there, all_labels = map(gather, (own, presence, labels)) if shared else (own, presence, labels)
        if shared:
            rank = torch.distributed.get_rank()
            mine = (gather(torch.full_like(mine, rank)) == rank).nonzero().squeeze(1)
        scale, sums, counts = self.logit_scale(), [], []
        for one, other in permutations(range(len(self.config.modality_names)), 2):
            asks, offers = presence[:, one], there[:, other]
            # Where what came with each row lies among what is offered.
            place = torch.where(offers, offers.cumsum(0) - 1, -1)[mine][asks]
            pair = (own[asks, one], vectors[offers, other], scale, labels[asks], all_labels[offers], place)
            total, count = self._contrast(*pair)
            sums.append(total)
            counts.append(count)
        return mean_of_means(sums, counts, shared)

    def _contrast(self, queries, keys, scale, query_labels, key_labels, place):
        """Sum over queries of the contrastive loss of the config, and how many counted."""
        config = self.config
        if not len(queries) or not len(keys):
            return (queries.sum() + keys.sum()) * 0.0, 0
        if config.contrastive_loss == "sigmoid":
            return sigmoid_contrast(queries, keys, scale, self.logit_scale.bias, query_labels, key_labels)
        if config.contrastive_loss == "triplet":
            positive = positives_of(query_labels, key_labels)
            return hardest_triplets(similarities_of(queries, keys), positive, place, config.triplet_margin)
        return info_nce(queries, keys, scale, query_labels, key_labels, config.contrastive_chunk_size)

    def _matching_loss(self, batch):
        """Rows as they are, against rows of which one modality is another row's, drawn among those that look alike.

        Returns the loss, and the modality weights of the rows as they are.
        """
        features, presence, mine = batch.features, batch.presence, batch.mine
        column = self.config.modality_names.index
        embeds = {name: item.spread(item.embeddings).detach() for name, item in features.items()}
        several, positive = presence.sum(dim=1) > 1, positives_of(batch.labels[mine], batch.labels)
        # Rows, and the modalities in which they are replaced by what other rows have.
        blocks = [(mine[several[mine]], {})]
        for swapped in features:
            have = presence[:, column(swapped)]
            alike = sum(embeds[other][mine] @ embeds[swapped].T for other in features if other != swapped)
            drawn, found = self._negatives(self.logit_scale().detach() * alike, positive, have)
            rows, place = (found & (have & several)[mine, None]).nonzero(as_tuple=True)
            blocks.append((mine[rows], {swapped: drawn[rows, place]}))
        there = presence[torch.cat([rows for rows, _ in blocks])]
        nothing = not len(there)
        if nothing and not batch.shared:
            return self._mean([], next(iter(embeds.values()))), None
        parts = [len(rows) for rows, _ in blocks]
        if nothing:
            # Another process has pairs, and waits for this one in the same modules.
            blocks, there = [(mine[:1], {}), *blocks[1:]], presence[mine[:1]]
        pairs = {
            name: item.at(
                torch.cat([swaps.get(name, rows) for rows, swaps in blocks]),
                None if item.present is None else there[:, column(name)],
            )
            for name, item in features.items()
        }
        if batch.shared:
            pairs = {name: item.in_use() for name, item in pairs.items()}
        logits, weights, _ = self.match(pairs, there)
        if nothing:
            # Connected with the loss, and worth nothing in it.
            sums, counts = self._matching_sums(
                logits[:0], pairs, [(rows[:0], swaps) for rows, swaps in blocks], parts, presence
            )
            sums = [total + 0.0 * logits.sum() for total in sums]
        else:
            sums, counts = self._matching_sums(logits, pairs, blocks, parts, presence)
        return batch.mean(sums, counts), weights[: parts[0]] if parts[0] else None

    def _matching_sums(self, logits, pairs, blocks, parts, presence):
        """Sums of losses over rows, and how many rows there are, of each mean that the matching loss is the mean of."""
        own, *others = logits.split(parts)
        if self.config.matching == "classifier":
            matched = torch.arange(len(logits), device=logits.device) < len(own)
            return [matching_loss(logits, matched) * len(logits)], [len(logits)]
        if self.config.matching == "ranking":
            return self._ranking_sums(logits, pairs, blocks, parts, len(presence))
        own = torch.zeros(len(presence), device=own.device, dtype=own.dtype).index_copy(0, blocks[0][0], own)
        losses = [
            self.config.triplet_margin - own[rows] + worse for (rows, _), worse in zip(blocks[1:], others, strict=True)
        ]
        losses = torch.cat(losses).clamp(min=0)
        return [losses.sum()], [len(losses)]

    def _ranking_sums(self, logits, pairs, blocks, parts, count):
        """`ranking_loss` of match scores beside what the embeddings say, as candidates are ranked, and of match scores alone: on rows
        that the embeddings know by heart there would be nothing left to learn. Returned as by `_matching_sums`."""
        scores = [logits]
        if self.config.contrastive_weight:
            beside = self._scaled(self.similarity(pairs)).detach() if len(logits) else 0.0
            scores.append(logits + beside)
        sums, counts = [], []
        for one in scores:
            own, *others = one.split(parts)
            own = torch.zeros(count, device=own.device, dtype=own.dtype).index_copy(0, blocks[0][0], own)
            for (rows, _), worse in zip(blocks[1:], others, strict=True):
                counts.append(len(rows.unique()))
                sums.append(_listed(own, rows, worse) * counts[-1] if len(rows) else logits.sum() * 0.0)
        return sums, counts

    def _negatives(self, alike, positive, have):
        """For each row others that are not its own (B,C), and which of them there are (B,C): the hardest for triplets, else drawn by how
        alike they are (B,N). positive (B,N); have (N,): those that there are to be drawn."""
        if self.config.matching == "cosine":
            wrong = positive | ~have
            return alike.masked_fill(wrong, -torch.inf).argmax(dim=1, keepdim=True), ~wrong.all(dim=1, keepdim=True)
        count = self.config.matching_negatives if self.config.matching == "ranking" else 1
        alike = (self.config.matching_hardness * alike.float()).masked_fill(~have, torch.finfo(torch.float32).min)
        return draw_negatives(alike, positive | ~have, count)

    def _tokens_of(self, batch, pair, rows):
        """{modality: tokens (P,T,D), mask (P,T) or None} of rows (P,) that have both modalities of a pair."""
        tokens = {}
        for name in pair:
            item = batch.features[name].at(rows)
            tokens[name] = item.spread(item.tokens), None if item.mask is None else item.spread(item.mask)
        return tokens

    def _alignment_loss(self, batch, pair):
        both = self._both(batch.presence, pair)
        every, mine = both.nonzero().squeeze(1), batch.mine[both[batch.mine]]
        there = self._tokens_of(batch, pair, every)
        own = self._tokens_of(batch, pair, mine) if batch.shared else there
        positive, sums, counts = positives_of(batch.labels[mine], batch.labels[every]), [], []
        for name, other in (pair, pair[::-1]):
            asks = self.alignment(name, *own[name], other, *there[other])
            # What rows of `other` are asked by: in one process the same scores, read the other way.
            asked = self.alignment(name, *there[name], other, *own[other]) if batch.shared else asks
            for matrix in (asks, asked.T):
                total, count = contrast(matrix, positive)
                sums.append(total)
                counts.append(count)
        return batch.mean(sums, counts)

    def _cross_loss(self, batch, pair):
        """The note's penalty in both directions. Returns it, and what shows its collapse, {} where this process has no pair."""
        rows = batch.mine[self._both(batch.presence, pair)[batch.mine]]
        tokens = self._tokens_of(batch, pair, rows)
        (one, one_mask), (other, other_mask) = (tokens[name] for name in pair)
        if not len(rows):
            return batch.mean([one.sum() * 0.0], [0]), {}
        there, shown = cross_attention_penalty(one, other, one_mask, other_mask)
        back, shown_back = cross_attention_penalty(other, one, other_mask, one_mask)
        shown = {key: (value + shown_back[key]) / 2 for key, value in shown.items()}
        return batch.mean([(there + back) * len(rows)], [len(rows)]), shown


def _listed(own, rows, worse):
    """`ranking_loss` of scores own (B,) against worse (P,), of `rows` (P,) in order."""
    place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    shape = (len(own), int(place.max()) + 1)
    others, there = own.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=own.device)
    others = others.index_put((rows, place), worse)
    there[rows, place] = True
    return ranking_loss(own, others, there)


def _mean_cosine(vectors):
    """Mean over pairs of {modality: (P,E)}, of length 1. Returns (P,)."""
    cosines = [(one * other).sum(-1) for one, other in combinations(vectors.values(), 2)]
    return torch.stack(cosines).mean(dim=0)


def _detached(levels):
    return [level.detach() for level in levels]


_WEIGHTS = ("contrastive", "matching", "alignment", "cross")

CrossModalForRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")

__all__ = ["CrossModalForRetrieval"]
