"""From a folder back to answers: in this process, and in one that has never heard of this package."""

import json

import numpy as np
import pytest
import torch
from crossmodal.training.cli import app
from transformers import AutoModel, AutoModelForVisualQuestionAnswering
from world import COLORS, picture, run_as_stranger, tiny_processor_and_model

from crossmodal import (
    CrossModalClassificationPipeline,
    CrossModalForSequenceClassification,
    CrossModalForVQA,
    CrossModalVQAPipeline,
    FeatureSequenceConfig,
)


@pytest.fixture(scope="module")
def pipe():
    processor, model = tiny_processor_and_model()
    return CrossModalVQAPipeline(model=model, processor=processor, task="visual-question-answering")


def test_one_question_gives_the_best_answers_first(pipe):
    answers = pipe(picture(), "what color is this?", top_k=2)
    assert [set(answer) for answer in answers] == [{"score", "answer"}] * 2
    assert answers[0]["score"] >= answers[1]["score"] and answers[0]["answer"] in COLORS


def test_more_answers_than_there_are_gives_all(pipe):
    assert len(pipe(picture(), "what color is this?", top_k=50)) == len(COLORS)


def test_batches_and_lists_give_what_single_questions_give(pipe):
    questions = ["what color is this?", "which color does the picture have?", "what color is this?"]
    images = [picture("red"), picture("blue"), picture("green")]
    single = [pipe(i, q, return_modality_weights=True) for i, q in zip(images, questions, strict=True)]
    for batch_size in (1, 2, 3):
        batched = pipe(images, questions, return_modality_weights=True, batch_size=batch_size)
        for one, other in zip(single, batched, strict=True):
            assert [a["answer"] for a in one["answers"]] == [a["answer"] for a in other["answers"]]
            assert one["answers"][0]["score"] == pytest.approx(other["answers"][0]["score"], abs=1e-5)
            assert sum(other["modality_weights"].values()) == pytest.approx(1, abs=1e-5)


def test_one_image_serves_many_questions_and_one_question_many_images(pipe):
    assert len(pipe(picture(), ["what color is this?", "which color?"])) == 2
    assert len(pipe([picture(), picture("blue")], "what color is this?")) == 2


def test_samples_may_lack_a_modality_differently_within_a_batch(pipe):
    samples = [{"question": "what color is this?"}, {"image": picture()}, {"image": picture(), "question": "which?"}]
    found = pipe(samples, batch_size=3, return_modality_weights=True)
    assert found[0]["modality_weights"]["vision"] == 0 and found[1]["modality_weights"]["text"] == 0
    alone = pipe(samples[0])
    assert alone[0]["score"] == pytest.approx(found[0]["answers"][0]["score"], abs=1e-5)


def test_generators_are_answered_one_by_one(pipe):
    samples = ({"image": picture(color), "question": "what color is this?"} for color in COLORS)
    assert len(list(pipe(samples))) == len(COLORS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"top_k": 0}, "at least 1"),
        ({"topk": 3}, "no parameter of this pipeline"),
        ({"question": ""}, "at least one word"),
    ],
)
def test_wrong_arguments_are_clear(pipe, arguments, said):
    with pytest.raises(ValueError, match=said):
        pipe(**{"image": picture(), "question": "what color is this?"} | arguments)


def test_soft_target_models_give_independent_scores():
    processor, model = tiny_processor_and_model(problem_type="multi_label_classification")
    pipe = CrossModalVQAPipeline(model=model, processor=processor)
    with torch.no_grad():
        logits = model(**processor(images=picture(), text="which color?")).logits
    assert pipe(picture(), "which color?", top_k=1)[0]["score"] == pytest.approx(
        logits.sigmoid().max().item(), abs=1e-5
    )


_STRANGER = """
import sys, json, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor, pipeline
folder = sys.argv[1]
reference = torch.load(folder + "/reference.pt")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
batch = processor(images=[Image.open(folder + "/red.png"), None], text=["what color is this?", "which color?"])
same_batch = all(torch.equal(batch[key], value) for key, value in reference["batch"].items())
head = AutoModelForVisualQuestionAnswering.from_pretrained(folder, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    same_logits = torch.equal(head(**batch).logits, reference["logits"])
    same_base = torch.equal(base(**batch).pooler_output, reference["pooled"])
pipe = pipeline(model=folder, trust_remote_code=True)
answers = pipe(folder + "/red.png", "what color is this?", top_k=3)
# What was loaded can be saved and loaded again, still without the package.
head.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
again = pipeline(model=folder + "/again", trust_remote_code=True)(folder + "/red.png", "what color is this?", top_k=3)
print(json.dumps([config.modality_names, same_batch, same_logits, same_base, answers, again]))
"""


def test_checkpoint_loads_in_a_clean_process_without_crossmodal_installed(tmp_path):
    processor, model = tiny_processor_and_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture().save(folder / "red.png")
    batch = processor(images=[picture(), None], text=["what color is this?", "which color?"])
    with torch.no_grad():
        reference = {
            "batch": dict(batch),
            "logits": model(**batch).logits,
            "pooled": model.crossmodal(**batch).pooler_output,
        }
    torch.save(reference, folder / "reference.pt")
    here = CrossModalVQAPipeline(model=model, processor=processor)(picture(), "what color is this?", top_k=3)
    found = json.loads(run_as_stranger(_STRANGER, folder, cwd=tmp_path).splitlines()[-1])
    names, same_batch, same_logits, same_base, answers, again = found
    assert names == ["vision", "text"]
    assert same_batch and same_logits and same_base
    assert [a["answer"] for a in answers] == [a["answer"] for a in here] and again == answers
    assert answers[0]["score"] == pytest.approx(here[0]["score"], abs=1e-6)


def test_a_saved_base_becomes_a_head_in_a_clean_process(tmp_path):
    _, model = tiny_processor_and_model()
    model.crossmodal.save_pretrained(tmp_path / "base")
    script = """
import sys
from transformers import AutoModelForVisualQuestionAnswering
head, info = AutoModelForVisualQuestionAnswering.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
print(type(head).__name__, {key.split(".")[0] for key in info["missing_keys"]})
"""
    assert run_as_stranger(script, tmp_path / "base", cwd=tmp_path).strip() == "CrossModalForVQA {'classifier'}"
    # And so does one that a stranger saved again.
    resave = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[1] + "/../again")
"""
    run_as_stranger(resave, tmp_path / "base", cwd=tmp_path)
    assert run_as_stranger(script, tmp_path / "again", cwd=tmp_path).strip() == "CrossModalForVQA {'classifier'}"


def test_auto_classes_find_the_family_once_the_package_is_imported(tmp_path):
    _, model = tiny_processor_and_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path), CrossModalForVQA)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "CrossModalModel"


# Classification


def classifier(**overrides):
    features = {"motion": FeatureSequenceConfig(feature_size=5, hidden_size=32, num_attention_heads=4)}
    processor, model = tiny_processor_and_model(features, **overrides)
    model = CrossModalForSequenceClassification(model.config).eval()
    return CrossModalClassificationPipeline(model=model, processor=processor, task="crossmodal-classification")


def test_any_subset_of_raw_inputs_is_classified():
    pipe = classifier()
    motion = np.random.default_rng(0).normal(size=(7, 5))
    samples = [{"text": "which color?"}, {"image": picture(), "motion": motion}, {"text": "what?", "motion": motion}]
    singles = [pipe(sample, top_k=3, return_modality_weights=True) for sample in samples]
    for single, batched in zip(
        singles, pipe(samples, top_k=3, return_modality_weights=True, batch_size=3), strict=True
    ):
        assert sum(item["score"] for item in single["labels"]) == pytest.approx(1, abs=1e-5)
        assert [item["label"] for item in single["labels"]] == [item["label"] for item in batched["labels"]]
        assert single["labels"][0]["score"] == pytest.approx(batched["labels"][0]["score"], abs=1e-5)
    assert [round(w, 6) == 0 for w in singles[0]["modality_weights"].values()] == [True, False, True]
    assert pipe(text="which color?") == singles[0]["labels"][:1] and len(pipe(samples)) == 3
    with pytest.raises(ValueError, match="both given"):
        pipe(samples, text="which color?")
    with pytest.raises(ValueError, match="'txt' is no parameter"):
        pipe(txt="which color?")


def test_several_labels_hold_from_their_thresholds_on_and_a_regression_gives_its_number():
    pipe = classifier(problem_type="multi_label_classification", thresholds=[0.0, 1.0, 0.0])
    assert sorted(item["label"] for item in pipe(text="which color?")) == ["blue", "red"]
    assert len(pipe(text="which color?", top_k=3)) == 3
    pipe = classifier(problem_type="regression", id2label={0: "valence"})
    (number,) = pipe(text="which color?")
    with torch.no_grad():
        expected = pipe.model(**pipe.processor(text="which color?")).logits.item()
    assert number == {"label": "valence", "score": pytest.approx(expected)}


def test_a_stranger_classifies_from_a_folder_and_so_does_the_command_line(tmp_path, capsys):
    pipe = classifier()
    pipe.model.save_pretrained(tmp_path / "m")
    pipe.processor.save_pretrained(tmp_path / "m")
    picture("blue").save(tmp_path / "blue.png")
    np.save(tmp_path / "motion.npy", np.ones((3, 5), dtype=np.float32))
    expected = pipe({"text": "which color?", "image": picture("blue"), "motion": np.ones((3, 5))}, top_k=2)
    said = run_as_stranger(
        """
import json, sys
import numpy as np
from transformers import pipeline
folder, image, motion = sys.argv[1:]
pipe = pipeline("crossmodal-classification", model=folder, trust_remote_code=True)
print(json.dumps(pipe({"text": "which color?", "image": image, "motion": np.load(motion)}, top_k=2)))
""",
        tmp_path / "m",
        tmp_path / "blue.png",
        tmp_path / "motion.npy",
        cwd=tmp_path,
    )
    found = json.loads(said.splitlines()[-1])
    given = [str(tmp_path / "m"), "--image", str(tmp_path / "blue.png"), "--text", "which color?"]
    app(["predict", *given, "--input", f"motion={tmp_path / 'motion.npy'}", "--json"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["labels"]
    for labels in (found, printed[:2]):
        assert [item["label"] for item in labels] == [item["label"] for item in expected]
        assert labels[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
