"""A trained model on a split of a dataset."""

from .datasets import RowDataset, load_rows
from .tasks import TASKS, name_of


def task_of(model):
    """The task that a head serves."""
    head = type(model).__name__
    if head == "CrossModalForCaptioning" and model.reads_text:
        return TASKS["answering"].from_config(model.config)
    for task in TASKS.values():
        if task.model_class == head:
            return task.from_config(model.config)
    raise ValueError(f"{type(model).__name__} has no task to evaluate. Heads that have: {list(TASKS)}.")


def evaluate(model, processor, dataset, split, batch_size=128, unknown_answers_wrong=False, progress=True, **options):
    """Metrics of a model on a split, by name. `dataset` is a Hub id, folder, file, or rows; options: of the task."""
    task = task_of(model)
    for name in options:
        if name not in task.evaluate_options:
            allowed = list(task.evaluate_options) or "none"
            raise ValueError(f"{name} does not go with {type(model).__name__}. Options of its evaluation: {allowed}.")
    rows = load_rows(dataset, split) if isinstance(dataset, str) else dataset
    samples = RowDataset(rows, name_of(task))
    task.check_targets(samples.targets, unknown_answers_wrong)
    return task.evaluate(model, processor, samples, batch_size, progress, **options)
