"""VQA accuracy for `evaluate.load`, from a local path. The rules are in `vqa_scoring.py`."""

# One import per line: `evaluate` parses these lines to find what to copy beside this file.
import datasets
import evaluate

from .vqa_scoring import check_lengths, vqa_accuracy


_DESCRIPTION = """
Official VQA accuracy: a prediction scores min(#annotators who gave it / 3, 1), averaged over the ways to
leave one annotator out, after the official cleaning of answers. Pinned to the official evaluation of October
2016 to March 2021: predictions are always cleaned; annotators' answers have their punctuation cleaned only
when they disagree.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one answer (str) per question.
    references: per question the list of its annotators' answers (ten in VQA v2), or a single answer (str),
        which is then an exact match after cleaning both sides.
Returns:
    vqa_accuracy: mean score in [0, 1].
Examples:
    >>> metric = evaluate.load("training/metrics/vqa_accuracy")
    >>> metric.compute(predictions=["Two."], references=[["2", "2", "3", "3", "3", "3", "3", "3", "3", "3"]])
    {'vqa_accuracy': 0.6}
"""

_CITATION = """
@inproceedings{antol2015vqa,
  title={{VQA}: Visual Question Answering},
  author={Stanislaw Antol and Aishwarya Agrawal and Jiasen Lu and Margaret Mitchell and Dhruv Batra and
          C. Lawrence Zitnick and Devi Parikh},
  booktitle={International Conference on Computer Vision (ICCV)},
  year={2015}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VQAAccuracy(evaluate.Metric):
    """Mean VQA score of the predicted answers."""

    def _info(self):
        answer = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": answer, "references": datasets.Sequence(answer)}),
                datasets.Features({"predictions": answer, "references": answer}),
            ],
            reference_urls=["https://visualqa.org/evaluation.html", "https://github.com/GT-Vision-Lab/VQA"],
        )

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Score the rows given here, or those added by `add` and `add_batch`."""
        # Checked before evaluate stores the rows: its own errors for empty or unequal lists name no fix.
        if predictions is not None and references is not None:
            check_lengths(predictions, references)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references):
        return {"vqa_accuracy": vqa_accuracy(predictions, references)}
