"""A trained model on a split of a dataset."""

from .datasets import RowDataset
from .loading import contexts_of, cut_recordings, load_rows
from .schemas import DATASETS
from .tasks import TASKS, name_of


def task_of(model, columns=()):
    """The task that a head serves. A model that writes serves several: columns of the data tell which."""
    head = type(model).__name__
    if head == "CrossModalForCaptioning":
        name = "dialogue" if "messages" in columns else "answering" if model.reads_text else "captioning"
        return TASKS[name].from_config(model.config)
    if head == "CrossModalForSequenceClassification" and model.config.problem_type == "regression":
        of_sentiment = [adapter.columns for adapter in DATASETS.values() if adapter.task == "sentiment"]
        return TASKS["sentiment" if any(set(columns) >= set(own) for own in of_sentiment) else "regression"]()
    for task in TASKS.values():
        if task.model_class == head:
            return task.from_config(model.config)
    raise ValueError(f"{type(model).__name__} has no task to evaluate. Heads that have: {list(TASKS)}.")


def samples_of(model, rows, task):
    """The RowDataset of rows as a model was trained on them."""
    settings = model.config.modality_settings
    return RowDataset(cut_recordings(rows, settings), name_of(task), contexts=contexts_of(settings))


def evaluate(model, processor, dataset, split, batch_size=128, unknown_answers_wrong=False, progress=True, **options):
    """Metrics of a model on a split, by name. `dataset` is a Hub id, folder, file, or rows; options: of the task."""
    rows = load_rows(dataset, split) if isinstance(dataset, str) else dataset
    task = task_of(model, rows.column_names)
    for name in options:
        if name not in task.evaluate_options:
            allowed = list(task.evaluate_options) or "none"
            raise ValueError(f"{name} does not go with {type(model).__name__}. Options of its evaluation: {allowed}.")
    samples = samples_of(model, rows, task)
    task.check_targets(samples.targets, unknown_answers_wrong)
    return task.evaluate(model, processor, samples, batch_size, progress, **options)
