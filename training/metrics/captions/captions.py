"""Metrics of captions for `evaluate.load`, from a local path: the scorers of COCO (pycocoevalcap), with tokens that need no Java."""

# One import per line: `evaluate` parses these lines to find what to copy beside this file, and what must be installed.
import shutil

import datasets
import evaluate
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from .ptb import ptb_tokens


_DESCRIPTION = """
BLEU-1 to 4 (corpus counts, closest reference length), ROUGE-L, CIDEr-D and, where Java is there, METEOR 1.5, as the official
evaluation of COCO captions computes them, on the tokens of its PTB tokenizer.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: a caption (str) per row.
    references: per row the list of its references, at least one of which has a word.
    meteor: also METEOR; None: if Java is there.
Returns:
    bleu1, bleu2, bleu3, bleu4, rouge_l in [0, 1]; cider_d as its scorer scales it (times 10; its weights of words come from the
    references of all rows: of a single row it is 0); meteor in [0, 1].
Examples:
    >>> metric = evaluate.load("training/metrics/captions")
    >>> metric.compute(predictions=["a red car"], references=[["a red car.", "the car is red"]], meteor=False)["bleu1"]
    0.9999999993333338
"""

_CITATION = """
@article{chen2015coco,
  title={Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author={Xinlei Chen and Hao Fang and Tsung-Yi Lin and Ramakrishna Vedantam and Saurabh Gupta and Piotr Dollar and
          C. Lawrence Zitnick},
  journal={arXiv:1504.00325},
  year={2015}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Captions(evaluate.Metric):
    """BLEU, ROUGE-L, CIDEr-D and METEOR of captions."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=["https://github.com/tylin/coco-caption"],
        )

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Score the rows given here, or those added by `add` and `add_batch`."""
        # Checked before evaluate stores the rows: its own errors for empty or unequal lists name no fix.
        if predictions is not None and references is not None:
            if len(predictions) != len(references) or not len(predictions):
                raise ValueError(
                    f"{len(predictions)} predictions for {len(references)} rows of references. Give one for each, and at "
                    "least one."
                )
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references, meteor=None):
        wanted = {row: [" ".join(ptb_tokens(text)) for text in texts] for row, texts in enumerate(references)}
        for row, texts in wanted.items():
            # A reference without a word is none; official scorers would count it as a caption of length 0.
            wanted[row] = [text for text in texts if text]
            if not wanted[row]:
                raise ValueError(
                    f"row {row} has no reference with a word in it: {references[row]!r:.80}. Give at least one, or leave the "
                    "row out."
                )
        given = {row: [" ".join(ptb_tokens(text))] for row, text in enumerate(predictions)}
        bleu, _ = Bleu(4).compute_score(wanted, given, verbose=0)
        found = {f"bleu{n}": float(value) for n, value in enumerate(bleu, 1)}
        found["rouge_l"] = float(Rouge().compute_score(wanted, given)[0])
        found["cider_d"] = float(Cider().compute_score(wanted, given)[0])
        if meteor is None:
            meteor = shutil.which("java") is not None
        if meteor:
            scorer = Meteor()
            try:
                found["meteor"] = float(scorer.compute_score(wanted, given)[0])
            finally:
                scorer.meteor_p.kill()
                scorer.meteor_p.wait()
        return found
