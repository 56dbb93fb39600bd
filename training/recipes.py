"""Training recipes: a YAML file plus `key=value` overrides, checked before anything is loaded."""

import copy
import difflib
from dataclasses import MISSING, asdict, dataclass, field, fields

import yaml
from transformers import GenerationConfig

from ..configs import load_preset, load_recipe
from .tasks import TASKS


# Arguments of TrainingArguments that a recipe leaves to the code.
_RESERVED = {
    "output_dir",
    "seed",
    "data_seed",
    "remove_unused_columns",
    "resume_from_checkpoint",
    "do_train",
    "hub_token",
}


@dataclass
class Recipe:
    """A whole training run.

    Args:
        task: row of `TASKS`.
        dataset: Hub id, folder or file.
        output_dir: becomes a whole Hub repo when training ends; holds `checkpoints/` while it runs.
        train_split, eval_split: names of splits.
        max_train_rows, max_eval_rows: use only so many rows, drawn with the seed.
        holdout: part of the training rows, in whole groups, kept out of training to choose the checkpoint by; at 0 it is
            chosen on `eval_split` itself, whose score is then a little too good. Where `eval_split` is part of `train_split`, these rows
            are what is measured.
        holdout_by: `group` draws groups, `time` takes the last rows of each recording.
        min_answer_count: answers rarer than this are no class.
        augment: row of `AUGMENTATIONS`, for training.
        rows_per_image: rows about one image (column `image_id`) that a training batch takes together; the image is then
            encoded once for all of them.
        streaming: read training rows shard by shard while training goes on, in place of all of them before (see streaming.py);
            evaluation rows are read into memory.
        shuffle_buffer: of a stream, rows among which the next one is drawn.
        labels: of a stream, all answers or labels that there are; None: they are read from the rows beforehand.
        max_broken_samples: training samples that cannot be read (an image that does not decode, a missing file, NaN) and are left out;
            one more ends training.
        model: `preset`, or `encoders` (modality to Hub id, folder, or config with `model_type`, or
            `{model: ..., levels: ..., context: ...}`; `image_weights` of a `crossmodal_mmvit` of sound: the folder of a model whose
            encoder of images it begins as), or `checkpoint` (Hub id or folder of a trained model, which is trained on, with its
            processor and answers that it shares), `config` (fields of CrossModalConfig; `class_weights: balanced` counts
            the labels), `freeze`, and `decoder` of tasks that write
            (fields of TextDecoderConfig, or the Hub id or folder of a causal model).
        processor: `image_size` [height, width] for encoders without an image processor of their own; `tokenizer`: a Hub
            id or folder, or `train` to train one of `vocab_size` on the questions; `audio`: of audio encoders likewise,
            arguments of their type's feature extractor, or of another, `feature_extractor_type`; `eeg`: those of EEGFeatureExtractor.
        token_cache: true keeps the tokens of frozen encoders with the checkpoints of the run, where they are computed once;
            a folder shares them between runs.
        learning_rates: per modality encoder, `fusion` and `head`; others take `training.learning_rate`.
        lora: adapt by low-rank updates (lora.py): a preset (`text` or another modality, `fusion`, `decoder`, `all`, `all-linear`), or
            `{preset: ..., r: 8, alpha: 16, dropout: 0.0, bits: 4}` (`bits`: QLoRA). Encoders that it does not reach are frozen; fusion
            and head are trained in full unless they come from `model.checkpoint`. The folder of the run holds the whole model,
            merged, and in `adapter/` the adapter.
        training: arguments of transformers' TrainingArguments.
        gradient_cache: of retrieval, rows that are encoded at a time: the contrast is over the whole batch all the same,
            with the activations of so many rows in memory. None: the whole batch at once.
        warm_up: stages on other data before this run, a list of `dataset` with any of `rows`, `train_split`, `augment`,
            `rows_per_image`, `learning_rates`, `freeze`, `training`. The next stage takes over every weight but answers
            it does not share; or, with `keep`, only those components (as in `learning_rates`), and others start afresh:
            a stage whose questions say little teaches fusion not to read them. Such a stage may train a model of its
            own: `modalities` (some of those of the run) and `config` (over `model.config`), and may serve another `task`. Of one with
            all modalities and the same fusion `fusion` can be kept too.
        unimodal_targets: labels of each modality alone, where the data has them, teach the classifiers of
            `model.config.auxiliary_loss_weight`; false: the labels of the rows do.
        mixing: of classification, arguments of `MixingCollator` (mixing.py): `mixup`, `time_cutmix`, SpecAugment.
        compare: variants of `crossmodal ablate` (such as `concat`) that are trained too, on the same rows, and shown beside.
        variants: of this recipe, by name, for `compare` and `crossmodal ablate`: keys that change, such as `mixing.mixup: 0.0`.
        pseudo_labels: of point_segmentation, a second stage: a new model, fully supervised by labels that the first is sure of, with
            `training` and `config` over those of the recipe. It is what is measured and kept.
        generation: of tasks that write, what `generate` does by itself (fields of GenerationConfig, such as `num_beams: 4`): in the final
            measurement and in the model that is kept. Checkpoints are chosen by what is written greedily.
        early_stopping_patience: evaluations without progress before training stops; None never stops.
    """

    task: str
    dataset: str
    output_dir: str
    train_split: str = "train"
    eval_split: str = "validation"
    seed: int = 42
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    holdout: float = 0.0
    holdout_by: str = "group"
    min_answer_count: int = 1
    augment: str | None = None
    rows_per_image: int = 1
    streaming: bool = False
    shuffle_buffer: int = 1000
    labels: list[str] | None = None
    max_broken_samples: int = 0
    model: dict = field(default_factory=dict)
    processor: dict = field(default_factory=dict)
    token_cache: str | bool | None = None
    learning_rates: dict = field(default_factory=dict)
    lora: str | dict | None = None
    training: dict = field(default_factory=dict)
    early_stopping_patience: int | None = None
    gradient_cache: int | None = None
    unimodal_targets: bool = True
    mixing: dict = field(default_factory=dict)
    compare: list[str] = field(default_factory=list)
    variants: dict = field(default_factory=dict)
    warm_up: list[dict] = field(default_factory=list)
    pseudo_labels: dict = field(default_factory=dict)
    generation: dict = field(default_factory=dict)
    name: str = ""

    _SECTIONS = {
        "model": ("preset", "encoders", "checkpoint", "config", "freeze", "decoder"),
        "processor": ("image_size", "tokenizer", "vocab_size", "audio", "eeg"),
        "pseudo_labels": ("config", "training"),
        "lora": ("preset", "r", "alpha", "dropout", "bits"),
    }
    _STAGE = (
        "task",
        "dataset",
        "rows",
        "train_split",
        "augment",
        "rows_per_image",
        "learning_rates",
        "freeze",
        "keep",
        "modalities",
        "config",
        "training",
    )

    def stated(self, leave_out=()):
        """What the recipe says beyond the defaults: the same whatever keys a later version knows. Paths where a run lies are left out by
        name."""
        plain = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        return {key: value for key, value in asdict(self).items() if key not in leave_out and value != plain[key]}

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown. Expected one of {nearest(self.task, TASKS)}.")
        if isinstance(self.lora, str):
            self.lora = {"preset": self.lora}
        # YAML reads `no` as false.
        self.training = {
            key: "no" if value is False and key.endswith("_strategy") else value
            for key, value in self.training.items()
        }
        for section, keys in self._SECTIONS.items():
            for key in getattr(self, section) or ():
                if key not in keys:
                    raise ValueError(f"{section}.{key} is no key of a recipe. Expected one of {nearest(key, keys)}.")
        if not isinstance(self.holdout, int | float) or not 0 <= self.holdout < 1:
            raise ValueError(
                f"holdout={self.holdout!r} is no part of the training rows. Expected 0 to 1, for example 0.05."
            )
        if self.holdout_by not in ("group", "time"):
            raise ValueError(f"holdout_by={self.holdout_by!r} is unknown. Expected 'group' or 'time'.")
        if self.pseudo_labels and self.task != "point_segmentation":
            raise ValueError(
                f"pseudo_labels with task={self.task!r}: only points of task 'point_segmentation' are given any."
            )
        if self.generation and not getattr(TASKS[self.task], "writes", False):
            raise ValueError(
                f"generation={self.generation} with task={self.task!r}, whose model writes nothing. Leave it out."
            )
        for key in self.generation:
            if not hasattr(GenerationConfig(), key):
                near = nearest(key, vars(GenerationConfig()))[:3]
                raise ValueError(f"generation.{key} is no field of GenerationConfig. Nearest: {near}.")
        if self.gradient_cache is not None and (self.task != "retrieval" or self.gradient_cache < 1):
            raise ValueError(
                f"gradient_cache={self.gradient_cache} with task={self.task!r}. Expected a number of rows for task 'retrieval'; "
                "others have losses of single rows: use training.gradient_accumulation_steps."
            )
        if self.mixing and self.task not in ("classification", "regression", "sentiment", "vqa"):
            raise ValueError(f"mixing={self.mixing} with task={self.task!r}: only labels and numbers can be mixed.")
        for name, changes in self.variants.items():
            if not isinstance(changes, dict):
                raise ValueError(
                    f"variants: {name!r} is {changes!r}. Expected keys and their values, such as mixing.mixup: 0.0."
                )
        self._check_stream()
        if sum(bool(self.model.get(key)) for key in ("preset", "encoders", "checkpoint")) != 1:
            raise ValueError("model: give either `preset`, `encoders` or `checkpoint`, one of them.")
        if self.lora and not self.lora.get("preset"):
            raise ValueError(f"lora={self.lora} lacks its preset. Give one, for example lora=text.")
        if self.lora and self.pseudo_labels:
            raise ValueError(
                "pseudo_labels train a second stage on the first one's weights, which lora keeps apart. Leave one out."
            )
        if self.model.get("checkpoint"):
            self._check_start()
            return self._check_training()
        names = list(self.model.get("encoders") or load_preset(self.model["preset"])["modalities"])
        _check_names("model.freeze", self.model.get("freeze"), names)
        if self.lora:
            presets = [*names, "fusion", "decoder", "all", "all-linear"]
            _check_names("lora.preset", [self.lora["preset"]], presets)
        for stage in self.warm_up:
            self._check_stage(stage, names)
        self._check_training()

    def _check_start(self):
        """Whether nothing is said that a model which is trained already has settled."""
        settled = ["model.decoder"] if self.model.get("decoder") else []
        settled += [key for key in ("processor", "warm_up", "compare") if getattr(self, key)]
        if settled:
            raise ValueError(
                f"{settled[0]} goes with a model that is composed, and model.checkpoint={self.model['checkpoint']!r} is trained. Leave out "
                "one of them."
            )

    def _check_training(self):
        allowed = _training_keys()
        stages = (*self.warm_up, self.pseudo_labels)
        for key in (key for part in (self.training, *(s.get("training", {}) for s in stages)) for key in part):
            if key not in allowed:
                near = nearest(key, allowed)[:3]
                raise ValueError(
                    f"training.{key} is no argument of TrainingArguments that a recipe sets. Nearest: {near}."
                )

    def _check_stream(self):
        if self.max_broken_samples and self.token_cache:
            raise ValueError(
                "max_broken_samples with token_cache: tokens are made of every row before training. Leave one out."
            )
        if not self.streaming:
            if self.labels is not None:
                raise ValueError("labels are read from the rows. Give them with streaming: true alone.")
            return
        for key, plain in (("token_cache", None), ("holdout", 0.0), ("max_train_rows", None), ("rows_per_image", 1)):
            if getattr(self, key) != plain:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} needs all rows at once, and streaming reads one after the other. Leave one of the two "
                    f"out{'; training.max_steps shortens a run' if key == 'max_train_rows' else ''}."
                )

    def _check_stage(self, stage, names):
        for key in stage:
            if key not in self._STAGE:
                raise ValueError(f"warm_up: {key} is no key of a stage. Expected one of {nearest(key, self._STAGE)}.")
        if not stage.get("dataset"):
            raise ValueError("warm_up: a stage lacks its dataset. Add one, for example dataset: drawn:shapes.")
        if stage.get("task", self.task) not in TASKS:
            raise ValueError(
                f"warm_up: task={stage['task']!r} is unknown. Expected one of {nearest(stage['task'], TASKS)}."
            )
        own = [key for key in ("modalities", "config") if key in stage]
        if stage.get("task", self.task) != self.task and not own:
            raise ValueError(
                f"warm_up: a stage of task {stage['task']!r} trains a model of its own. Say which, for example modalities: "
                "[vision], and what the run takes over from it: keep: [vision]."
            )
        if own and "keep" not in stage:
            raise ValueError(
                f"warm_up: a stage with {own[0]} trains a model of its own. Say what the run takes over from it, for "
                "example keep: [vision]."
            )
        _check_names("warm_up: modalities", stage.get("modalities"), names)
        present = stage.get("modalities") or names
        _check_names("warm_up: freeze", stage.get("freeze"), present)
        # The fusion of another model may have other shapes, and a head always has other answers.
        same = list(present) == list(names) and all(key.startswith(_OF_HEADS) for key in stage.get("config", {}))
        _check_names("warm_up: keep", stage.get("keep"), [*present, "fusion"] if same else present)

    @classmethod
    def load(cls, name, overrides=()):
        """A recipe by name or path, with overrides such as `dataset=data/x`, `training.num_train_epochs=2` or
        `warm_up.1.rows=1000` (the second stage).

        An override without a dot may also name a key of `training`.
        """
        values = load_recipe(name)
        known = {f.name for f in fields(cls)}
        if any(override.startswith("model.checkpoint=") for override in overrides):
            # What the file says of a model to compose, that model has settled.
            values = {
                key: value for key, value in values.items() if key not in ("model", "processor", "warm_up", "compare")
            }
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise ValueError(f"{override!r} is no override. Expected key=value, e.g. dataset=data/easy_vqa.")
            value = yaml.safe_load(text) if text else None
            section, *rest = key.split(".")
            if not rest and section not in known and section in _training_keys():
                section, rest = "training", [section]
            cls._check_key(section, known | _training_keys() if not rest else known)
            _put(values, [section, *rest], value)
        for key in values:
            cls._check_key(key, known)
        missing = [key for key in ("task", "dataset", "output_dir") if not values.get(key)]
        if missing:
            raise ValueError(f"the recipe {name!r} lacks {missing}. Add it to the file, or pass {missing[0]}=....")
        values["name"] = values.get("name") or str(name)
        return cls(**values)

    def changed(self, changes):
        """The recipe with other values of some keys, such as `{"mixing.time_cutmix": 0.0}`, and no variants."""
        values = asdict(self) | {"variants": {}}
        for key, value in changes.items():
            self._check_key(key.split(".")[0], values)
            _put(values, key.split("."), copy.deepcopy(value))
        return type(self)(**values)

    @staticmethod
    def _check_key(key, known):
        if key not in known:
            raise ValueError(f"{key!r} is no key of a recipe. Did you mean {nearest(key, known)[0]!r}?")


def _put(values, parts, value):
    """Sets a value of nested dicts and lists, by the parts of its key."""
    *parts, last = parts
    for part in parts:
        part = _place(values, part)
        if isinstance(values, dict):
            values.setdefault(part, {})
        values = values[part]
        if not isinstance(values, dict | list):
            raise ValueError(f"{part!r} holds {values!r}, not further keys. Give {part}=... itself.")
    values[_place(values, last)] = value


def _place(values, part):
    """A key of a dict, or the number of an item of a list (a stage of warm_up)."""
    if isinstance(values, dict):
        return part
    if not part.isdigit() or int(part) >= len(values):
        raise ValueError(f"{part!r} is no item of a list of {len(values)}. Expected 0 to {len(values) - 1}.")
    return int(part)


def _training_keys():
    from transformers import TrainingArguments

    return {f.name for f in fields(TrainingArguments) if f.init} - _RESERVED


# Keys of a model's config, by their beginnings, that leave its encoders and its fusion as they are.
_OF_HEADS = (
    "alignment",
    "classifier_",
    "contrastive_",
    "cross_weight",
    "label_smoothing",
    "logit_scale",
    "loss_weighting",
    "matching",
    "pooled_shortcut",
    "projection_dim",
    "query_bank",
    "rank_weight",
    "triplet_margin",
)


def _check_names(key, given, allowed):
    if given is None:
        return
    if not isinstance(given, list | tuple):
        raise ValueError(
            f"{key}={given!r} is no list. Expected some of {sorted(allowed)}, for example [{allowed[0]}]."
        )
    for name in given:
        if name not in allowed:
            raise ValueError(f"{key} has {name!r}. Expected any of {nearest(name, allowed)}.")


def nearest(given, allowed):
    """The allowed values, those that look most like `given` first."""
    return sorted(allowed, key=lambda value: -difflib.SequenceMatcher(None, str(given), value).ratio())
