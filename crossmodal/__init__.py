"""CrossModal: a family of Hub-native models that fuse any encoders by cross-modal attention.

Importing this package registers the family with transformers' Auto classes.
"""

from importlib import import_module


__version__ = "0.1.0"

_EXPORTS = {
    "CrossModalConfig": "modeling.configuration_crossmodal",
    "FeatureSequenceConfig": "modeling.configuration_crossmodal",
    "EEGConfig": "modeling.eeg_crossmodal",
    "MMViTConfig": "modeling.mmvit_crossmodal",
    "MMViTEncoder": "modeling.mmvit_crossmodal",
    "PointsConfig": "modeling.points_crossmodal",
    "CrossModalModel": "modeling.modeling_crossmodal",
    "CrossModalForVQA": "modeling.classification_crossmodal",
    "CrossModalForSequenceClassification": "modeling.classification_crossmodal",
    "CrossModalForRetrieval": "modeling.retrieval_crossmodal",
    "CrossModalForCaptioning": "modeling.captioning_crossmodal",
    "CrossModalForPointSegmentation": "modeling.segmentation_crossmodal",
    "TextDecoderConfig": "modeling.configuration_crossmodal",
    "EEGFeatureExtractor": "processing.feature_extraction_eeg_crossmodal",
    "CrossModalProcessor": "processing.processing_crossmodal",
    "CrossModalVQAPipeline": "processing.pipeline_crossmodal",
    "CrossModalClassificationPipeline": "processing.pipeline_crossmodal",
    "CrossModalRetrievalPipeline": "processing.pipeline_crossmodal",
    "CrossModalPointSegmentationPipeline": "processing.pipeline_crossmodal",
    "CrossModalTrainer": "training.trainer",
}

__all__ = ["__version__", *_EXPORTS]


# Auto class to the head that it loads; AutoConfig, AutoModel and AutoProcessor are registered too.
_AUTO_CLASSES = {
    "AutoModel": "CrossModalModel",
    "AutoModelForVisualQuestionAnswering": "CrossModalForVQA",
    "AutoModelForSequenceClassification": "CrossModalForSequenceClassification",
    "AutoModelForZeroShotImageClassification": "CrossModalForRetrieval",
    "AutoModelForImageTextToText": "CrossModalForCaptioning",
    "AutoModelForSemanticSegmentation": "CrossModalForPointSegmentation",
}
HEADS = tuple(head for head in _AUTO_CLASSES.values() if head != "CrossModalModel")


def _register():
    import transformers

    config = __getattr__("CrossModalConfig")
    transformers.AutoConfig.register(config.model_type, config)
    transformers.AutoProcessor.register(config, __getattr__("CrossModalProcessor"))
    for auto_class, model in _AUTO_CLASSES.items():
        getattr(transformers, auto_class).register(config, __getattr__(model))
    # Encoders of the family that are saved by themselves.
    for model_type, encoder in import_module("crossmodal.modeling.encoders_crossmodal").ENCODERS.items():
        transformers.AutoConfig.register(model_type, encoder.config_class)
        transformers.AutoModel.register(encoder.config_class, encoder)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'crossmodal' has no attribute {name!r}. It has {sorted(_EXPORTS)}.")
    return getattr(import_module(f"crossmodal.{_EXPORTS[name]}"), name)


def __dir__():
    return sorted(__all__)


_register()
