"""Dialogues: conversations rendered and cut, losses on answers alone, models that need what was said before."""

import copy
import json

import datasets
import pytest
import torch
from crossmodal.training.chat import Conversation, written_about
from crossmodal.training.cli import app
from crossmodal.training.datasets import RowDataset
from crossmodal.training.evaluate import evaluate
from crossmodal.training.recipes import Recipe
from crossmodal.training.robustness import robustness
from crossmodal.training.shapes import dialogues_dataset
from crossmodal.training.train import train
from crossmodal.training.trainer import beginnings
from test_captioning_training import DECODER
from transformers import AutoProcessor
from typer.testing import CliRunner
from world import COLORS, TINY_RECIPE, picture, run_as_stranger


def turns(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def dialogue_rows(count=24):
    """The second question repeats the first, whatever that was: alone it says nothing."""
    names, columns = list(COLORS), {"image": [], "image_id": [], "messages": []}
    for number in range(count):
        name = names[number % 3]
        question, answer = (("what color is it?", name), ("what is it?", "picture"))[number // 3 % 2]
        columns["image"].append(picture(name))
        columns["image_id"].append(number)
        columns["messages"].append(turns(question, answer, "again?", answer))
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def recipe(folder, *modalities, **changes):
    values = copy.deepcopy(TINY_RECIPE) | {"task": "dialogue", "dataset": "rows", "output_dir": str(folder)}
    values["model"]["encoders"] = {name: values["model"]["encoders"][name] for name in modalities}
    values["model"]["decoder"] = DECODER | {"max_position_embeddings": 40}
    values["training"] |= {"num_train_epochs": 40, "learning_rate": 2.0e-3, "adam_beta2": 0.98}
    values["training"] |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    return Recipe(**values | changes)


@pytest.fixture(
    scope="module", params=[("vision", "text"), ("vision",)], ids=["question read", "question gone on from"]
)
def talker(request, tmp_path_factory):
    """(folder, result) of a model that reads the conversation as a modality, or goes on with it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("talker") / "model"
    rows = dialogue_rows()
    return folder, train(recipe(folder, *request.param), rows, rows, write=lambda line: None)


def test_later_turns_are_learnt_with_what_the_model_said_before(talker):
    _, result = talker
    assert (
        result["metrics"]["later_turns"] == result["metrics"]["exact_match"] == result["metrics"]["first_turns"] == 1
    )
    rows = dialogue_rows()
    alone = evaluate(result["model"], result["processor"], rows, None, progress=False, history=False)
    assert alone["first_turns"] == 1 and alone["later_turns"] <= 0.5
    assert result["majority"]["exact_match"] < 0.6


def test_the_folder_chats_with_strangers(talker, tmp_path):
    folder, _ = talker
    picture("green").save(tmp_path / "green.png")
    code = """
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
asked = {"role": "user", "content": [{"type": "image", "url": sys.argv[2]}, {"type": "text", "text": "what color is it?"}]}
chat = pipe(text=[asked], max_new_tokens=4)[0]["generated_text"]
chat = pipe(text=[*chat, {"role": "user", "content": [{"type": "text", "text": "again?"}]}])[0]["generated_text"]
print([message["content"].strip() for message in chat if message["role"] == "assistant"])
"""
    assert run_as_stranger(code, folder, tmp_path / "green.png", cwd=tmp_path).splitlines()[-1] == "['green', 'green']"


def test_the_command_line_chats_and_predicts(talker, tmp_path):
    folder, result = talker
    picture("blue").save(tmp_path / "blue.png")
    picture("red").save(tmp_path / "red.png")
    lines = (
        f"what color is it?\nagain?\n/image {tmp_path / 'nothing.png'}\n/new\n\nwhat is it?\nagain?\n/exit\nnever\n"
    )
    done = CliRunner().invoke(app, ["chat", str(folder), "--image", str(tmp_path / "blue.png")], input=lines)
    assert done.exit_code == 0, done.output
    assert [line.strip() for line in done.stdout.splitlines()] == ["blue", "blue", "picture", "picture"]
    assert "nothing.png" in done.stderr and "cannot be read" in done.stderr
    done = CliRunner().invoke(
        app, ["predict", str(folder), "--image", str(tmp_path / "red.png"), "--text", "what color is it?", "--json"]
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"generated_text": "red"}
    assert written_about(result["model"], result["processor"], picture("red"), "what color is it?") == "red"


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(talker):
    _, result = talker
    talk = Conversation(result["model"], result["processor"], [picture("red")])
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(talk.ask("what color is it?", max_new_tokens=0))
    assert talk.messages == [] and len(talk.waiting) == 1
    assert "".join(talk.ask("what color is it?")).strip() == "red"
    assert len(talk.messages) == 2 and talk.waiting == []


def test_a_dialogue_may_begin_with_a_stage_of_another_task(tmp_path):
    rows = dialogue_rows(12)
    seeing = {"task": "vqa", "dataset": "drawn:shape_facts", "rows": 8, "modalities": ["vision"], "keep": ["vision"]}
    seeing["config"] = {"fusion_type": "concat"}
    turns_alone = {"dataset": "drawn:shape_turns", "rows": 12}
    changed = recipe(tmp_path / "model", "vision", "text", warm_up=[seeing, turns_alone])
    changed.training["num_train_epochs"] = 1
    lines = []
    result = train(changed, rows, rows, write=lines.append)
    assert "labels" in lines[0] and "texts to write" in lines[1]
    assert type(result["model"]).__name__ == "CrossModalForCaptioning" and "exact_match" in result["metrics"]


def test_robustness_of_a_dialogue_is_measured(talker):
    _, result = talker
    table = robustness(result["model"], result["processor"], dialogue_rows(6), None, write=lambda line: None)
    assert table[0]["exact_match"] == 1
    assert {row["kind"] for row in table} >= {"gaussian", "blur"}


def test_the_loss_is_on_answers_alone(talker):
    _, result = talker
    model, processor = result["model"].eval(), result["processor"]
    messages = turns("what color is it?", "red", "again?")
    batch = processor(images=[picture("red")] * 2, text=[messages, messages[:1]], text_target=["red", "red"])
    loss = model(**batch).loss
    single = []
    for own in (messages, messages[:1]):
        words = [*processor.tokenizer("red", add_special_tokens=False)["input_ids"], processor.writer["eos_token_id"]]
        given = processor(images=picture("red"), text=own)
        begun = given.pop("input_ids") if processor.writes_on else torch.tensor([[processor.writer["bos_token_id"]]])
        given.pop("attention_mask") if processor.writes_on else None
        for word in words:
            logs = model(**given, decoder_input_ids=begun).logits[0, -1].log_softmax(-1)
            single.append(-logs[word])
            begun = torch.cat([begun, torch.tensor([[word]])], dim=1)
    torch.testing.assert_close(loss, torch.stack(single).mean(), rtol=1e-4, atol=1e-5)


def test_what_is_gone_on_from_is_found_again_for_generation(talker):
    processor = talker[1]["processor"]
    if not processor.writes_on:
        pytest.skip("the conversation is a modality here")
    texts = ["what is it?", "again?"]
    prompts = processor(images=[picture()] * 2, text=texts)
    whole = processor(images=[picture()] * 2, text=texts, text_target=["red", "picture"])
    words, mask = beginnings(whole["decoder_input_ids"], whole["labels"], processor.tokenizer.pad_token_id)
    assert words.tolist() == prompts["input_ids"].tolist() and mask.tolist() == prompts["attention_mask"].tolist()
    with pytest.raises(ValueError, match="row 0: a text of 60 words to go on with"):
        processor(images=picture(), text="it " * 60, text_target=["red"])


def test_what_the_assistant_said_is_marked(talker):
    processor = talker[1]["processor"]
    found = processor.apply_chat_template(
        turns("what is it?", "picture", "again?", "picture"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"images": [picture()]},
    )
    words = found["input_ids"][0][torch.tensor(found["assistant_masks"][0]).bool()]
    assert processor.tokenizer.decode(words) == "picture picture"


def test_a_long_chat_loses_its_oldest_turns_and_keeps_its_image(talker, caplog):
    processor = copy.deepcopy(talker[1]["processor"])
    asked = {
        "role": "user",
        "content": [{"type": "image", "image": picture("red")}, {"type": "text", "text": "what is it?"}],
    }
    messages = [
        {"role": "system", "content": "it is a picture"}, asked, {"role": "assistant", "content": "picture"},
        *turns(*["again?", "picture"] * 20), {"role": "user", "content": "what color is it?"},
    ]  # fmt: skip
    text = processor.tokenizer.decode(
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ][0],
        skip_special_tokens=True,
    )
    assert "it is a picture user : again?" in text and text.rstrip().endswith("user : what color is it? assistant :")
    assert 1 <= text.count("again") < 10
    found = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert found["pixel_values"].shape[0] == 1
    # What is given stays as it was.
    assert len(messages) == 44 and messages[1] is asked


def test_chats_that_are_none_are_refused(talker):
    processor = talker[1]["processor"]
    for messages, what in (
        ([{"role": "assistant", "content": "hello"}], "no user turn"),
        ([{"role": "narrator", "content": "hello"}], "role 'narrator'"),
        ([{"role": "user"}], "message 0 of the chat is"),
    ):
        with pytest.raises(ValueError, match=what):
            processor.apply_chat_template(messages, tokenize=True)
    two = {
        "role": "user",
        "content": [{"type": "image", "image": picture()}] * 2 + [{"type": "text", "text": "what is it?"}],
    }
    with pytest.raises(ValueError, match="row 0 has 2 images, and this model takes one per row"):
        processor.apply_chat_template([two], tokenize=True, return_dict=True)


def test_a_model_without_dialogues_does_not_chat(talker):
    processor = copy.deepcopy(talker[1]["processor"])
    processor.chat_template = None
    with pytest.raises(ValueError, match="was not trained on dialogues"):
        Conversation(talker[1]["model"], processor)


def test_the_template_is_saved(talker):
    folder, result = talker
    assert (folder / "chat_template.jinja").is_file()
    again = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert again.chat_template == result["processor"].chat_template


def test_turns_of_one_dialogue_are_samples():
    samples = RowDataset(dialogue_rows(3), "dialogue")
    assert len(samples) == 6 and samples.places[:2] == [(0, 1), (0, 3)]
    assert [message["content"] for message in samples[1]["text"]] == ["what color is it?", "red", "again?"]
    assert samples[1]["target"] == {"text": "red", "references": ["red"]} and samples.groups == [0, 0, 1, 1, 2, 2]


def test_drawn_turns_stand_for_themselves():
    rows = dialogues_dataset(20, "train", apart=True)
    assert len(rows) == 120 and all(len(row["messages"]) == 2 for row in rows)
    assert rows["image_id"][:7] == [0] * 6 + [1] and {kind for row in rows for kind in row["kinds"]} <= {
        "caption", "color", "shape", "side", "count", "exists",
    }  # fmt: skip


def test_drawn_dialogues_hold_what_they_say():
    rows = dialogues_dataset(120, "validation")
    assert rows[:3]["messages"] == dialogues_dataset(120, "validation")[:3]["messages"]
    kinds = set()
    for row in rows:
        questions, answers = ([m["content"] for m in row["messages"][n::2]] for n in (0, 1))
        things = answers[0].replace(" and ", ", ").split(", ")
        kinds |= set(row["kinds"])
        last = None
        for kind, question, answer in zip(row["kinds"][1:], questions[1:], answers[1:], strict=True):
            if kind == "count":
                assert answer == str(len(things))
            if kind == "exists":
                phrase = question.removeprefix("is there ").removesuffix("?")
                assert answer == ("yes" if phrase in things else "no")
            if kind in ("color", "shape"):
                named = question.removesuffix("?").split(" is the ")[1].removesuffix(" thing")
                assert sum(named in thing and answer in thing for thing in things) == 1
            if kind in ("it", "and"):
                # Said right after a question that names a thing, or goes on from one that does.
                assert last in ("color", "shape", "side", "exists", "it", "and")
            last = kind
    assert kinds == {"caption", "color", "shape", "side", "count", "exists", "it", "and"}
