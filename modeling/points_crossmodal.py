"""Points in space: their encoder, and what a segmentation of them stands on: supervoxels, and image features where points are seen.

Letters: B batch, N points, P real points of a whole batch, S supervoxels, F numbers per point, D width, V views, h w token grid.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization


@strict
class PointsConfig(PreTrainedConfig):
    """Encoder of `points_values (B, N, F)`: coordinates first, then colours or other features of each point.

    Args:
        feature_size: numbers per point, the three coordinates included.
        hidden_size: width of the features of a point.
        cell_sizes: edge of the grid cells in which each layer lets points see one another, in units of the coordinates (metres, as a
            rule); one layer each, small cells first.
        extent: by which coordinates are divided where they stand for a place: half the size of a scene.
    """

    model_type = "crossmodal_points"

    feature_size: int = 6
    hidden_size: int = 96
    cell_sizes: list[float | int] | tuple[float | int, ...] = field(default_factory=lambda: [0.1, 0.2, 0.4, 0.8])
    extent: float | int = 5.0
    num_hidden_layers: int = 0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def validate_architecture(self):
        if self.feature_size < 3:
            raise ValueError(f"feature_size={self.feature_size}. Expected at least 3: the coordinates of a point.")
        if not self.cell_sizes or min(self.cell_sizes) <= 0 or self.extent <= 0:
            raise ValueError(
                f"cell_sizes={list(self.cell_sizes)}, extent={self.extent}. Expected at least one size, all above 0."
            )


def _validate(config):
    for validator in config.__class_validators__:
        validator(config)


# `@strict` would wrap a ValueError into one of its own that is none.
PointsConfig.validate = _validate
PointsConfig.register_for_auto_class()


def cells_of(coordinates, rows, size):
    """Which cell of a grid each point lies in. coordinates (P,3), rows (P,) long: the scene of each point.

    Cells are numbered by scene, then by place, whatever the order of the points. Returns (P,) long.
    """
    places = torch.floor(coordinates / size).long()
    places = places - places.amin(dim=0)
    key = rows
    for axis, extent in zip(places.unbind(1), (places.amax(dim=0) + 1).tolist(), strict=True):
        key = key * extent + axis
    return key.unique(return_inverse=True)[1]


def mean_by_index(features, index, count):
    """Means of features (P,D) over those with the same index (P,), of `count` in all: two `index_add_`. Returns (count,D), 0 where there
    is none."""
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, index, features)
    counts = features.new_zeros(count).index_add_(0, index, features.new_ones(len(index)))
    return sums / counts.clamp(min=1)[:, None]


def voxel_segments(coordinates, mask, size):
    """Supervoxels of a grid of cells of edge `size`: coordinates (B,N,3), mask (B,N) bool. Returns (B,N) long, numbered from 0 in each
    scene, -1 for padding."""
    rows, places = mask.nonzero(as_tuple=True)
    cells = cells_of(coordinates[rows, places], rows, size)
    firsts = cells.new_full((len(mask),), torch.iinfo(cells.dtype).max).scatter_reduce(0, rows, cells, "amin")
    return torch.full_like(mask, -1, dtype=torch.long).index_put((rows, places), cells - firsts[rows])


def segment_means(features, segments, count=None):
    """Means over supervoxels: features (B,N,D), segments (B,N) long, -1 for padding; count of supervoxels (None: as many as the
    batch has).

    Returns (B,S,D), 0 for those that are empty, and the mask of those that are not (B,S) bool.
    """
    count = int(segments.max()) + 1 if count is None else count
    rows, places = (segments >= 0).nonzero(as_tuple=True)
    index = rows * count + segments[rows, places]
    means = mean_by_index(features[rows, places], index, len(segments) * count)
    there = torch.zeros(len(means), dtype=torch.bool, device=means.device).index_fill(0, index, True)
    return means.unflatten(0, (-1, count)), there.unflatten(0, (-1, count))


def of_points(values, segments):
    """What the supervoxel of each point has: values (B,S,...), segments (B,N) long. Returns (B,N,...), 0 for padding."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    index = (rows * values.shape[1] + segments.clamp(min=0)).flatten()
    found = values.flatten(0, 1).index_select(0, index).unflatten(0, segments.shape)
    return found.masked_fill((segments < 0).view(*segments.shape, *[1] * (found.dim() - 2)), 0)


def sample_views(patches, uv):
    """Image features where points are seen, bilinear between the patches of a view, mean over the views that see a point.

    patches (B,V,D,h,w); uv (B,N,V,2), from 0 to 1 of the width and the height of each view, anything else where it does not see the
    point. Returns (B,N,D), 0 for points that nothing sees.
    """
    seen = ((uv >= 0) & (uv <= 1)).all(dim=-1)
    # (B,N,V,2) to (BV,1,N,2), from -1 to 1
    places = (2 * uv.masked_fill(~seen[..., None], 0.0) - 1).transpose(1, 2).flatten(0, 1)[:, None]
    found = nn.functional.grid_sample(
        patches.flatten(0, 1), places.to(patches.dtype), padding_mode="border", align_corners=False
    )
    # (BV,D,1,N) to (B,N,V,D)
    found = found.squeeze(2).unflatten(0, (len(uv), -1)).permute(0, 3, 1, 2)
    found = found.masked_fill(~seen[..., None], 0.0)
    return found.sum(dim=2) / seen.sum(dim=2).clamp(min=1)[..., None]


class PointLayer(nn.Module):
    """h + MLP([LN h, mean of it in the cell, where the point lies in its cell, how the cell spreads]): over points of one cell of a grid."""

    def __init__(self, config, size):
        super().__init__()
        width, self.size = config.hidden_size, size
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(2 * width + 3 + 9, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden, coordinates, rows):
        """hidden (P,D), coordinates (P,3), rows (P,) long. Returns (P,D)."""
        cells = cells_of(coordinates, rows, self.size)
        count = int(cells.max()) + 1
        normed = self.norm(hidden)
        offsets = (coordinates - mean_by_index(coordinates, cells, count).index_select(0, cells)) / self.size
        # Flat, upright or round is what the second moments of a cell say.
        spread = (offsets[:, :, None] * offsets[:, None]).flatten(1)
        # The backward of index_select is many times as fast as that of an index, which sorts.
        means = mean_by_index(torch.cat([normed, spread], dim=-1), cells, count).index_select(0, cells)
        return hidden + self.mlp(torch.cat([normed, offsets, means], dim=-1))


class PointEncoder(PreTrainedModel):
    """Features of every point, from itself and from those in the same cells of ever coarser grids; plain torch.

    Stands where MIT has a sparse convolutional U-Net. Keeps the contract of `ENCODERS`: a token is a point.
    """

    config: PointsConfig
    main_input_name = "values"

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embeddings = nn.Sequential(nn.Linear(config.feature_size, width), nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList([PointLayer(config, size) for size in config.cell_sizes])
        self.final_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)

    def forward(self, values, mask=None):
        """values (B,N,F), mask (B,N) bool or None. Returns [(B,N,D)] and the mask; padding is 0."""
        if values.dim() != 3 or values.shape[-1] != self.config.feature_size:
            raise ValueError(
                f"points of shape {tuple(values.shape)} were given. Expected (batch, points, {self.config.feature_size}): coordinates and "
                "whatever else feature_size of the encoder's config counts."
            )
        real = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if mask is None else mask
        rows, places = real.nonzero(as_tuple=True)
        # Padding takes no part at all.
        points = values[rows, places].to(self.final_norm.weight.dtype)
        coordinates, others = points[:, :3], points[:, 3:]
        hidden = self.embeddings(torch.cat([coordinates / self.config.extent, others], dim=-1))
        for layer in self.layers:
            hidden = layer(hidden, coordinates, rows)
        hidden = self.final_norm(hidden)
        return [hidden.new_zeros(*real.shape, hidden.shape[-1]).index_put((rows, places), hidden)], mask
