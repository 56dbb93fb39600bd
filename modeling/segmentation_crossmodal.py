"""`CrossModalForPointSegmentation`: a class for every point of a scene, learnt from points, from images, and from tags of scenes.

Letters: B batch, N points, S supervoxels, V views, U view tokens, D hidden_size, C classes, M modalities, h heads.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .attention_crossmodal import Dropout, FeedForwardBlock, MultiHeadAttention, SelfAttentionBlock
from .losses_crossmodal import (
    activation_loss_2d,
    activation_loss_3d,
    class_contrast_loss,
    point_loss,
    row_counts,
    smoothness_loss,
    soft_margin_loss,
)
from .modeling_crossmodal import CrossModalModel, CrossModalPreTrainedModel
from .points_crossmodal import of_points, sample_views, segment_means, voxel_segments


# Logit of a class that is known to be nowhere in a scene: no probability in float32, and finite in float16.
_NOWHERE = -1e4
# What the means of the losses are over: scenes, scenes with views, points, points with a label, classes that are contrasted.
_COUNTED = ("scenes", "viewed", "points", "labelled", "classes")


@dataclass
class CrossModalSegmentationOutput(ModelOutput):
    """Output of `CrossModalForPointSegmentation`.

    loss: scalar, with labels; losses: its parts by name, unweighted.
    logits: (B,N,C) of every point, those of its supervoxel; 0 for padding.
    scene_logits: (B,C), whether a class is anywhere in the scene.
    segments: (B,N) long, the supervoxel of each point, -1 for padding.
    modality_weights: (B,M), of the class tokens of each modality in `scene_logits`.
    class_scores: (layers,B,C,C), what class tokens of one modality have attended to those of the other with, before the softmax, mean
        over heads; None without two modalities.
    cross_attentions: per decoder layer {"m<-n": raw scores (B,h,C+T_m,C+T_n)}, class tokens first, with output_attentions=True.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    scene_logits: torch.FloatTensor | None = None
    segments: torch.LongTensor | None = None
    modality_weights: torch.FloatTensor | None = None
    class_scores: torch.FloatTensor | None = None
    cross_attentions: tuple[dict[str, torch.FloatTensor], ...] | None = None
    losses: dict[str, torch.FloatTensor] | None = None


@dataclass
class Scene:
    """A batch of scenes as tokens: features of points (B,N,D), segments (B,N), their supervoxels: voxels (B,S,D), there (B,S) bool, places
    (B,S,3) in parts of the size of the scene; maps (B,V,T,D) of image tokens, or None; presence (B,M); viewed (B,) bool: which rows
    have views."""

    features: torch.Tensor
    segments: torch.Tensor
    voxels: torch.Tensor
    there: torch.Tensor
    places: torch.Tensor
    maps: torch.Tensor | None
    presence: torch.Tensor
    viewed: torch.Tensor


class ClassTokenEncoder(nn.Module):
    """A pre-norm transformer of one modality over [class tokens; tokens]."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.ModuleList([SelfAttentionBlock(config), FeedForwardBlock(config)])
                for _ in range(config.num_unimodal_layers)
            ]
        )

    def forward(self, stream, mask):
        """stream (B,C+T,D), mask (B,C+T) bool. Returns (B,C+T,D)."""
        for attention, feed_forward in self.layers:
            stream = feed_forward(attention(stream, mask)[0])
        return stream


class InterlacedDecoderLayer(GradientCheckpointingLayer):
    """q = q + SelfAttn(LN q);  q = q + CrossAttn(LN q, LN v without its class tokens);  q = q + FFN(LN q)."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = SelfAttentionBlock(config)
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.key_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = MultiHeadAttention(config)
        self.dropout = Dropout(config.hidden_dropout)
        self.mlp = FeedForwardBlock(config)

    def forward(self, stream, mask, other, other_mask, num_classes, output_scores=False):
        """stream (B,C+Tq,D) looks at other (B,C+Tk,D), of which the first `num_classes` tokens are no keys; masks (B,C+T) bool.

        Returns the new stream; the raw scores q k / sqrt(d) of class tokens on class tokens, mean over heads (B,C,C); and when asked
        those of all tokens (B,h,C+Tq,C+Tk), else None.
        """
        stream, _ = self.self_attn(stream, mask)
        attention = self.cross_attn
        query = attention.split_heads(attention.q_proj(self.query_norm(stream)))
        key, value = attention.project_key_value(self.key_norm(other))
        scale = attention.head_dim**-0.5
        class_scores = query[:, :, :num_classes] @ key[:, :, :num_classes].transpose(-1, -2) * scale
        scores = query @ key.transpose(-1, -2) * scale if output_scores else None
        keys = other_mask[:, num_classes:]
        seen, _ = attention.attend(query, key[:, :, num_classes:], value[:, :, num_classes:], keys, query_mask=mask)
        # Whoever has nothing to look at stays as it is, whatever the bias says.
        seen = attention.o_proj(seen).masked_fill(~keys.any(dim=1)[:, None, None], 0.0)
        return self.mlp(stream + self.dropout(seen)), class_scores.mean(dim=1), scores


class CrossModalForPointSegmentation(CrossModalPreTrainedModel):
    """Labels the points of a scene, from tags of scenes alone or from labels of points (MIT: the 2D-3D interlaced transformer, Yang et al.
    2023, arXiv 2310.12817).

    The base model turns points and images into tokens at one width (`encode`, `project`). The fusion is the head's own and not a row
    of `FUSIONS`: its queries are C class tokens, one set that both modalities share, and what it learns by is where they look, which
    an operator that is given nothing but streams of tokens could not return.

        f_i = W x_i (+ W_p image features where point i is seen)      `point_projection`
        v_s = mean of f_i over supervoxel s                          a voxel grid, or segments that are given
        [C; V + position], [C; U + view]  through a transformer each    `num_unimodal_layers`
        interlaced decoder: 3D and 2D take the role of queries in turn  `num_fusion_layers`, `first_query`
        scene_c = sum_m w_m mean(class token c of m)                 `modality_weighting="uniform"` is MIT's

    With `supervision="tags"` a point has the class activation of its supervoxel, log softmax_c(W_3 v_s), and the logarithm of the
    probability that its scene has the class at all (which the tags say, where they are known: `scene_tags`). The losses are those of
    MIT, see losses_crossmodal.py. With `supervision="full"` a point has the scores of its supervoxel behind the decoder, learnt by cross
    entropy in place of class activation; labels may be those of `pseudo_labels` (MIT's second stage).

    `fusion_type="concat"` leaves the decoder out, the baseline of fusion. Points may come without images, and rows may lack theirs. In
    `from_encoders`, `fusion_type` and `fusion_levels` are those of MIT unless they are given.

    Example:
        >>> model = CrossModalForPointSegmentation.from_encoders(
        ...     points=PointsConfig(feature_size=6), vision="google/mobilenet_v2_1.0_224", freeze=("vision",), num_labels=20
        ... )
    """

    custom_pipelines = {
        "crossmodal-point-segmentation": {
            "impl": "pipeline_crossmodal.CrossModalPointSegmentationPipeline",
            "pt": ["AutoModelForSemanticSegmentation"],
            "type": "multimodal",
        }
    }
    accepts_loss_kwargs = True

    def __init__(self, config, encoders=None):
        super().__init__(config)
        config.custom_pipelines = self.custom_pipelines
        self.points, self.views = _modalities_of(config)
        width, count = config.hidden_size, config.num_labels
        self.crossmodal = CrossModalModel(config, encoders, fuses=False)
        self.main_input_name = config.input_keys(self.points)[0]
        self.class_tokens = nn.Embedding(count, width)
        self.class_positions = nn.Embedding(count, width)
        self.position = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        # Not `encoders`: that is where learning rates look for those of the modalities.
        self.streams = nn.ModuleDict({name: ClassTokenEncoder(config) for name in config.modality_names})
        self.decoder = nn.ModuleList()
        if self.views is not None:
            self.view_positions = nn.Embedding(config.modality_settings[self.views].get("views") or 1, width)
            if config.supervision == "tags":
                self.activation_2d = nn.Linear(width, count)
            if config.point_projection != "none":
                self.view_proj = nn.Linear(width, width)
            if config.fusion_type == "interlaced":
                self.decoder.extend(InterlacedDecoderLayer(config) for _ in range(config.num_fusion_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(width, count)
        self.post_init()
        self.crossmodal._apply_freezing()

    @staticmethod
    def check_config(config):
        _modalities_of(config)

    @staticmethod
    def default_fields(modalities):
        return {"fusion_type": "interlaced" if len(modalities) > 1 else "concat", "fusion_levels": "single"}

    @can_return_tuple
    def forward(
        self,
        labels=None,
        scene_tags=None,
        modality_mask=None,
        output_attentions=None,
        num_items_in_batch=None,
        **named_inputs,
    ):
        """Points, and images of them.

        Args:
            labels: (B,N) long, the class of each point, -100 where it is not known, or (B,C) float of 0 and 1: the tags of each scene.
                With `supervision="tags"` nothing is learnt of labels of points but which classes a scene has.
            scene_tags: (B,C) of 0 and 1 where it is known which classes a scene has: no point becomes another.
            modality_mask: (B,M) bool, as of the base model. Points must be there.
            output_attentions: also return `cross_attentions`.
            num_items_in_batch: what all accumulation steps and processes count together, the sum of `count_items`; the loss is then the
                part of these scenes in the means over all. None: their own means.
            named_inputs: for a modality of points named `points`: `points_values (B,N,F)`, `points_mask (B,N)`, 1 for real points;
                optionally `points_segments (B,N)` long, the supervoxel of each point, numbered from 0, -1 for padding; `points_uv (B,N,2)`
                or `(B,N,V,2)`, where each view sees each point, parts of its width and height from the top left, anything outside 0 to 1
                where it does not. And `pixel_values (B,3,H,W)`, or `(B,V,3,H,W)` with `views` in the entry.

        Returns:
            CrossModalSegmentationOutput.

        Raises:
            ValueError: for rows without points, labels that are no classes, and where a projection is to be used and there is none.
        """
        named_inputs.pop("return_dict", None)
        count, full = self.config.num_labels, self.config.supervision == "full"
        shares = dict.fromkeys(_COUNTED, 1.0)
        if labels is not None and num_items_in_batch is not None:
            found = self._share_of_step(num_items_in_batch, labels, modality_mask=modality_mask, **named_inputs)
            shares = dict(zip(_COUNTED, found.expand(len(_COUNTED)).unbind(), strict=True))
        scene = self._read(modality_mask, named_inputs)
        before = self._encode(scene)
        after, class_scores, attentions = self._decode(before, scene, bool(output_attentions))
        scene_logits, weights = self._scene_logits(after, scene)
        scores = self._activations(after[self.points][0][:, count:] if full else scene.voxels)
        loss, losses = None, None
        if labels is not None:
            losses = self._losses(labels, scores, scene, before, scene_logits, class_scores, shares)
            loss = sum(self._loss_weights.get(name, 1.0) * value for name, value in losses.items())
            losses = {name: value.detach() for name, value in losses.items()}
        return CrossModalSegmentationOutput(
            loss=loss,
            logits=of_points(self._logits(scores, scene_logits, scene_tags), scene.segments),
            scene_logits=scene_logits,
            segments=scene.segments,
            modality_weights=weights,
            class_scores=class_scores,
            cross_attentions=attentions if output_attentions else None,
            losses=losses,
        )

    def count_items(self, labels, modality_mask=None, scene_tags=None, **inputs):
        """What the scenes of a batch, the inputs of a forward, count in the means of the losses, of which each has its own: (5,), scenes,
        those with views, points, the weights of those with a label, and classes that are contrasted. Before modality dropout."""
        segments = inputs.pop(f"{self.points}_segments", None)
        inputs.pop(f"{self.points}_uv", None)
        values, mask = inputs[self.main_input_name], inputs.get(f"{self.points}_mask")
        real = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if mask is None else mask.bool()
        real = real if segments is None else real & (segments >= 0)
        viewed = self.crossmodal.presence_of(inputs, modality_mask).sum(dim=1) > 1
        tags, labelled = self._tags_of(labels, real), real.new_zeros((), dtype=torch.float32)
        if not labels.is_floating_point():
            labelled = row_counts(
                labels.flatten(), "single_label_classification", self._class_weights(labels.device)
            ).sum()
        classes = tags if self.config.present_classes_only else torch.ones_like(tags)
        counts = (viewed.new_tensor(len(real)), viewed.sum(), real.sum(), labelled, (classes * viewed[:, None]).sum())
        return torch.stack([count.float() for count in counts])

    @torch.no_grad()
    def pseudo_labels(self, labels, modality_mask=None, **inputs):
        """Labels of the points that a model trained on tags is sure of, to train another one on.

        Args:
            labels: (B,C) tags, or (B,N) labels of points, of which nothing but the tags is used. modality_mask, inputs: of `forward`.

        Returns:
            (B,N) long, -100 for points of no class; see `best_segments`.

        Raises:
            ValueError: for a model that was trained on labels of points, which has no class activation.
        """
        if self.config.supervision != "tags":
            raise ValueError(
                f"supervision={self.config.supervision!r}: only a model that learns from tags ('tags') has class activation."
            )
        scene = self._read(modality_mask, inputs)
        tags = self._tags_of(labels, scene.segments)
        probabilities = self._activations(scene.voxels).float().softmax(dim=-1)
        chosen = best_segments(probabilities, tags, scene.there, self.config.pseudo_label_threshold)
        return of_points(chosen, scene.segments).masked_fill(scene.segments < 0, -100)

    def _read(self, modality_mask, named):
        """Inputs to a Scene."""
        base, config = self.crossmodal, self.config
        segments, uv = named.pop(f"{self.points}_segments", None), named.pop(f"{self.points}_uv", None)
        collected = base._collect_inputs(named)
        if self.points not in collected:
            raise ValueError(
                f"there are no points to label. Pass {self.main_input_name} (batch, points, numbers per point), and images beside them."
            )
        base._check_numbers_of_rows(collected)
        values, mask = collected[self.points][:2]
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if mask is None else mask.bool()
        encoded, presence = base.encode(collected, modality_mask)
        named_rows = presence[:, config.modality_names.index(self.points)] & mask.any(dim=1)
        if not torch.compiler.is_compiling() and not named_rows.all():
            raise ValueError(
                f"row {int((~named_rows).nonzero()[0])} of the batch has no point. Only images may be absent."
            )
        levels = {
            name: sum(encoded[name].spread(level) for level in own) for name, own in base.project(encoded)[0].items()
        }
        features, maps = levels[self.points], None
        if self.views in levels:
            item = encoded[self.views]
            maps = levels[self.views].unflatten(1, (item.views, -1))
            if config.point_projection != "none":
                seen = self._seen(maps, item.grid, uv)
                features = seen if config.point_projection == "only" else features + seen
        elif config.point_projection == "only":
            features = torch.zeros_like(features)
        coordinates = values[..., :3].to(features.dtype).masked_fill(~mask[..., None], 0.0)
        if segments is None:
            segments = voxel_segments(coordinates, mask, config.voxel_size)
        segments = segments.masked_fill(~mask, -1)
        voxels, there = segment_means(features, segments)
        size = coordinates.abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(features.dtype).tiny)
        return Scene(
            features=features,
            segments=segments,
            voxels=voxels,
            there=there,
            places=segment_means(coordinates / size, segments)[0],
            maps=maps,
            presence=presence,
            viewed=presence.sum(dim=1) > 1,
        )

    def _seen(self, maps, grid, uv):
        """Image features of every point (B,N,D), 0 where no view sees it. maps (B,V,T,D), the last h*w of T tokens on a grid."""
        if uv is None or grid is None:
            missing = (
                f"{self.points}_uv was not given" if uv is None else "the encoder of images has no grid of tokens"
            )
            raise ValueError(
                f"point_projection={self.config.point_projection!r} takes image features where points are seen, and {missing}. Give where "
                "each view sees each point, or build the model with point_projection='none'."
            )
        uv = uv[:, :, None] if uv.dim() == 3 else uv
        if uv.shape[2] != maps.shape[1]:
            raise ValueError(f"{self.points}_uv is of {uv.shape[2]} views, and {maps.shape[1]} are given.")
        patches = maps[:, :, -grid[0] * grid[1] :].transpose(2, 3).unflatten(3, grid)
        return self.view_proj(sample_views(patches, uv))

    def _encode(self, scene):
        """{modality: (stream (B,C+T,D), mask (B,C+T))}: class tokens and tokens, behind the encoder of each."""
        tokens = {self.points: (scene.voxels, scene.there)}
        if self.config.point_projection != "only":
            # Labelled in 2D alone, they have no place.
            tokens[self.points] = (scene.voxels + self.position(scene.places), scene.there)
        if scene.maps is not None:
            views = scene.maps.mean(dim=2, keepdim=True) if self.config.view_tokens == "mean" else scene.maps
            views = views + self.view_positions.weight[: views.shape[1], None]
            tokens[self.views] = (
                views.flatten(1, 2),
                scene.viewed[:, None].expand(-1, views.shape[1] * views.shape[2]),
            )
        classes = self.class_tokens.weight + self.class_positions.weight
        classes = classes.expand(len(scene.voxels), -1, -1)
        encoded = {}
        for name, (stream, mask) in tokens.items():
            mask = torch.cat([mask.new_ones(classes.shape[:2]), mask], dim=1)
            encoded[name] = (self.streams[name](torch.cat([classes, stream], dim=1), mask), mask)
        return encoded

    def _decode(self, streams, scene, output_attentions):
        """The interlaced decoder. Returns streams as `_encode` does, class scores (layers,B,C,C) or None, and raw scores by layer."""
        count, class_scores, attentions = self.config.num_labels, [], []
        order = [self.points, self.views]
        if self.config.first_query == self.views:
            order.reverse()
        streams = dict(streams)
        for index, layer in enumerate(self.decoder):
            name, other = order[index % 2], order[(index + 1) % 2]
            if name not in streams:
                continue
            stream, mask = streams[name]
            seen, seen_mask = streams.get(other, (stream, mask))
            if other == self.views:
                # Class tokens are no keys: a row without views has none.
                seen_mask = seen_mask & scene.viewed[:, None]
            stream, classes, scores = layer(stream, mask, seen, seen_mask, count, output_attentions)
            streams[name] = (stream, mask)
            class_scores.append(classes)
            attentions.append({f"{name}<-{other}": scores})
        both = self.views in streams and len(class_scores) > 0
        return streams, torch.stack(class_scores) if both else None, tuple(attentions)

    def _scene_logits(self, streams, scene):
        """Logits (B,C) of what a scene has, from class tokens weighted over modalities, and the weights (B,M)."""
        count, names = self.config.num_labels, self.config.modality_names
        some = streams[self.points][0][:, :count]
        # (B,M,C,D)
        classes = torch.stack(
            [streams[name][0][:, :count] if name in streams else torch.zeros_like(some) for name in names], dim=1
        )
        weights, _ = self.crossmodal.weighting(classes.mean(dim=2), scene.presence)
        return (weights[..., None, None] * classes).sum(dim=1).mean(dim=-1), weights

    def _activations(self, voxels):
        return self.classifier(self.norm(voxels))

    def _logits(self, scores, scene_logits, scene_tags):
        """Logits of supervoxels (B,S,C) from their scores and what is known, or thought, of their scene."""
        if self.config.supervision == "tags":
            scores = scores.log_softmax(dim=-1)
            if scene_tags is None and self.config.class_token_weight:
                scores = scores + nn.functional.logsigmoid(scene_logits)[:, None]
        if scene_tags is not None:
            scores = scores.masked_fill(~scene_tags.bool()[:, None], _NOWHERE)
        return scores

    @property
    def _loss_weights(self):
        config = self.config
        return {
            "class_tokens": config.class_token_weight,
            "contrast": config.contrastive_weight,
            "smoothness": config.smoothness_weight,
        }

    def _losses(self, labels, scores, scene, streams, scene_logits, class_scores, shares):
        """{name: loss} of those that have a weight, and of what there is; shares: by which their means are multiplied."""
        count, tags = self.config.num_labels, self._tags_of(labels, scene.segments)
        losses = {"class_tokens": shares["scenes"] * soft_margin_loss(scene_logits, tags)}
        for name, (stream, _) in streams.items():
            kind, rows = ("viewed", scene.viewed) if name == self.views else ("scenes", None)
            own = soft_margin_loss(stream[:, :count].mean(-1), tags, rows)
            losses["class_tokens"] = losses["class_tokens"] + shares[kind] * own
        if self.config.supervision == "full":
            if labels.is_floating_point():
                raise ValueError(
                    "labels are tags of scenes, and supervision='full' learns from labels of points (B,N). Give those, or build the model "
                    "with supervision='tags'."
                )
            losses["points"] = shares["labelled"] * point_loss(
                of_points(scores, scene.segments), labels, self._class_weights(scores.device)
            )
        else:
            own = activation_loss_3d(scores, tags, scene.there, self.config.activation_power)
            losses["activation_3d"] = shares["scenes"] * own
            if scene.maps is not None:
                activations = self.activation_2d(scene.maps.flatten(1, 2))
                losses["activation_2d"] = shares["viewed"] * activation_loss_2d(activations, tags, rows=scene.viewed)
        if class_scores is not None:
            present = tags if self.config.present_classes_only else None
            losses["contrast"] = shares["classes"] * class_contrast_loss(class_scores, present, scene.viewed)
        own = smoothness_loss(scene.features, of_points(scene.voxels, scene.segments), scene.segments >= 0)
        losses["smoothness"] = shares["points"] * own
        return {name: value for name, value in losses.items() if self._loss_weights.get(name, 1.0)}

    def _class_weights(self, device):
        return None if self.config.class_weights is None else torch.tensor(self.config.class_weights, device=device)

    def _tags_of(self, labels, points):
        """Tags (B,C) float of labels in either form, of points (B,N). Refuses labels that are none."""
        count = self.config.num_labels
        expected = (len(points), count) if labels.is_floating_point() else tuple(points.shape)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype}. Expected label ids of points {tuple(points.shape)}, "
                f"or tags of scenes as floats {(len(points), count)}."
            )
        if labels.is_floating_point():
            return labels
        known = labels != -100
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = labels[known & ((labels < 0) | (labels >= count))]
            if len(wrong):
                raise ValueError(
                    f"labels hold {wrong[0].item()}, which is no class of num_labels={count}. Expected 0 to {count - 1}, or -100 for a "
                    "point without a label."
                )
        hot = torch.zeros(len(labels), count + 1, device=labels.device)
        return hot.scatter(1, labels.masked_fill(~known, count), 1.0)[:, :count]

    def resize_answers(self, id2label, problem_type=None):
        """Takes the same classes alone, as between stages of training: tokens of other classes would know nothing."""
        if dict(id2label) != dict(self.config.id2label):
            raise ValueError(
                f"this model knows the classes {list(self.config.id2label.values())}, and not {list(id2label.values())}. Train one of those."
            )


def _modalities_of(config):
    """(the modality of points, that of images or None). Refuses configs that this head does not serve."""
    types = {name: config.modality_settings[name]["type"] for name in config.modality_names}
    points = [name for name, kind in types.items() if kind == "points"]
    views = [name for name, kind in types.items() if kind == "vision"]
    if len(points) != 1 or len(views) > 1 or len(types) != len(points) + len(views):
        raise ValueError(
            f"the modalities are {types}. Expected one of type 'points', such as PointsConfig(), and at most one of type 'vision', with "
            "`views` in its entry where a scene has several images."
        )
    if config.fusion_type not in ("interlaced", "concat"):
        raise ValueError(
            f"fusion_type={config.fusion_type!r}: points and images meet in 'interlaced' (MIT), or not at all in 'concat'. Choose one of "
            "the two."
        )
    if config.gate == "closed":
        raise ValueError(
            "gate='closed': the decoder that points and images meet in has no gate. Choose fusion_type='concat', which leaves it out."
        )
    if config.point_projection != "none" and not views:
        raise ValueError(
            f"point_projection={config.point_projection!r} needs images. Add a modality of type 'vision'."
        )
    if config.modality_weighting == "uncertainty":
        raise ValueError("modality_weighting='uncertainty' is not for points. Choose 'adaptive' or 'uniform'.")
    if config.dropout_of(points[0]):
        raise ValueError(
            f"modality_dropout={config.modality_dropout!r} would take the points that are to be labelled. Give the rate of images alone, "
            f"for example {{'vision': {config.dropout_of(points[0])}}}."
        )
    return points[0], views[0] if views else None


def best_segments(probabilities, tags, there, threshold):
    """Pseudo-labels of supervoxels: the likeliest of the classes that a scene has, where its probability reaches the threshold; and each
    class that a scene has takes the supervoxel that is likeliest of it, the surest class first, whatever its probability.

    probabilities (B,S,C), tags (B,C), there (B,S) bool. Returns (B,S) long, -100 for no class.
    """
    scores = (probabilities * tags[:, None]).masked_fill(~there[..., None], -1.0)
    best, chosen = scores.max(dim=-1)
    chosen = chosen.masked_fill(best < threshold, -100)
    rows, free = torch.arange(len(scores), device=scores.device), there.clone()
    for classes in scores.amax(dim=1).argsort(dim=1, descending=True).unbind(1):
        own = scores[rows, :, classes].masked_fill(~free, -1.0)
        value, place = own.max(dim=1)
        taking = (tags[rows, classes] > 0) & (value >= 0)
        chosen[rows[taking], place[taking]] = classes[taking]
        free[rows[taking], place[taking]] = False
    return chosen


CrossModalForPointSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = ["CrossModalForPointSegmentation"]
