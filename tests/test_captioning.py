"""`CrossModalForCaptioning`: caches change nothing, generation is transformers' own, decoders may start from another model."""

import pytest
import torch
import zoo
from crossmodal.training.building import train_tokenizer
from crossmodal.training.publish import export_folder
from test_modeling import CLOSE, EXACT, lively
from transformers import GPT2Config, GPT2LMHeadModel, TextIteratorStreamer, ViTImageProcessorPil
from world import picture, run_as_stranger

from crossmodal import CrossModalForCaptioning, CrossModalProcessor, TextDecoderConfig


BOS, EOS, PAD = 1, 2, 0
DECODERS = pytest.mark.parametrize("decoder_type", ["transformer", "gru"])


def model_of(*names, seed=0, decoder=None, **overrides):
    torch.manual_seed(seed)
    decoder_config = TextDecoderConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, **(decoder or {}),
    )  # fmt: skip
    config = zoo.tiny_config(*(names or ("vision", "text")), decoder_config=decoder_config, **overrides)
    return lively(CrossModalForCaptioning(config)).eval()


def labels_of(rows=4, length=6):
    torch.manual_seed(5)
    labels = torch.randint(3, 40, (rows, length))
    labels[:, -1] = EOS
    labels[1, 3:] = torch.tensor([EOS, -100, -100])
    return labels


@DECODERS
def test_the_loss_is_the_cross_entropy_of_each_word_after_those_before_it(decoder_type):
    model = model_of(decoder={"decoder_type": decoder_type, "label_smoothing": 0.1})
    batch, labels = zoo.tiny_batch(model.config), labels_of()
    output = model(**batch, labels=labels)
    assert output.logits.shape == (4, 6, 40)
    losses = []
    for row in range(4):
        words = [BOS]
        for word in labels[row].tolist():
            if word == -100:
                continue
            ids = torch.tensor([words] * 4)
            logits = model(**batch, decoder_input_ids=ids).logits[row, -1]
            logs = logits.log_softmax(-1)
            losses.append(-(0.9 * logs[word] + 0.1 * logs.mean()))
            words.append(word)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), **CLOSE)


@DECODERS
def test_the_loss_in_chunks_is_the_loss_and_gives_its_gradient(decoder_type):
    options = {"decoder_type": decoder_type, "hidden_dropout": 0.0, "label_smoothing": 0.1}
    for weights in (None, torch.tensor([1.0, 0.3, 0.6, 1.0])):
        found = []
        for chunk in (None, 5):
            model = model_of(decoder=options | {"loss_chunk_size": chunk}, hidden_dropout=0.0).train()
            torch.manual_seed(3)
            output = model(**zoo.tiny_batch(model.config), labels=labels_of(), target_weights=weights)
            assert (output.logits is None) == (chunk is not None)
            output.loss.backward()
            found.append([output.loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_rows_count_what_they_weigh():
    model = model_of()
    batch, labels = zoo.tiny_batch(model.config), labels_of()
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    logs = model(**batch, labels=labels).logits.log_softmax(-1)
    rows = -logs.gather(2, labels.clamp(min=0)[..., None]).squeeze(-1).masked_fill(labels == -100, 0).sum(1)
    found = model(**batch, labels=labels, target_weights=weights).loss
    torch.testing.assert_close(found, (rows * weights).sum() / 4, **CLOSE)


@DECODERS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_with_and_without_a_cache_the_same_is_written(decoder_type, implementation):
    model = model_of(decoder={"decoder_type": decoder_type}, attn_implementation=implementation)
    batch = zoo.tiny_batch(model.config)
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    for beams in (1, 3):
        one, other = (
            model.generate(**batch, **options, num_beams=beams, use_cache=cached) for cached in (True, False)
        )
        assert one.shape == (4, 9) and torch.equal(one, other)
    again = model.generate(**batch, **options, cache_implementation="static")
    assert torch.equal(again, model.generate(**batch, **options))


@DECODERS
def test_greedy_writes_the_likeliest_word_each_time(decoder_type):
    model = model_of(decoder={"decoder_type": decoder_type})
    batch = zoo.tiny_batch(model.config)
    words = torch.full((4, 1), BOS)
    for _ in range(6):
        logits = model(**batch, decoder_input_ids=words).logits[:, -1]
        logits[:, EOS] = -torch.inf
        words = torch.cat([words, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False), words)


@DECODERS
def test_prompts_may_be_padded_on_the_left(decoder_type):
    model = model_of("vision", decoder={"decoder_type": decoder_type})
    batch = zoo.tiny_batch(model.config)
    prompt = torch.tensor([[BOS, 7, 9, 11], [PAD, PAD, BOS, 8], [PAD, BOS, 5, 6], [BOS, 3, 4, 5]])
    mask = prompt != PAD
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    together = model.generate(**batch, input_ids=prompt, attention_mask=mask.long(), **options)
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        words = model.generate(**alone, input_ids=prompt[row : row + 1, mask[row]], **options)
        assert together[row, -5:].tolist() == words[0, -5:].tolist()
    cached = model.generate(**batch, input_ids=prompt, attention_mask=mask.long(), **options, use_cache=False)
    assert torch.equal(cached, together)
    static = {"cache_implementation": "static"}
    assert torch.equal(
        model.generate(**batch, input_ids=prompt, attention_mask=mask.long(), **options, **static), together
    )


@DECODERS
def test_generation_goes_on_from_a_cache_and_from_fused_memory(decoder_type):
    model = model_of(decoder={"decoder_type": decoder_type})
    batch = zoo.tiny_batch(model.config)
    memory = model.encode(**batch)
    whole = model.generate(encoder_outputs=memory, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(whole, model.generate(**batch, max_new_tokens=8, min_new_tokens=8))
    first = model.generate(encoder_outputs=memory, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    rest = model.generate(
        encoder_outputs=memory,
        decoder_input_ids=first.sequences,
        past_key_values=first.past_key_values,
        max_new_tokens=5,
        min_new_tokens=5,
    )
    assert torch.equal(rest, whole)


def test_sampling_stopping_and_constraints_are_those_of_transformers():
    model = model_of()
    batch = zoo.tiny_batch(model.config)
    torch.manual_seed(1)
    one = model.generate(**batch, do_sample=True, max_new_tokens=8, top_k=10)
    torch.manual_seed(2)
    assert not torch.equal(one, model.generate(**batch, do_sample=True, max_new_tokens=8, top_k=10))
    forced = model.generate(**batch, max_new_tokens=4, num_beams=2, prefix_allowed_tokens_fn=lambda row, ids: [5, 6])
    assert set(forced[:, 1:].flatten().tolist()) <= {5, 6}
    stopped = model.generate(
        **batch,
        max_new_tokens=8,
        min_new_tokens=8,
        stopping_criteria=[lambda ids, scores: torch.tensor([ids.shape[1] >= 4] * 4)],
    )
    assert stopped.shape == (4, 4)


@pytest.mark.parametrize("lacks", [0, 1])
def test_rows_may_lack_modalities(lacks):
    model = model_of()
    batch = zoo.tiny_batch(model.config)
    presence = torch.ones(4, 2, dtype=torch.bool)
    presence[::2, lacks] = False
    together = model.generate(**batch, modality_mask=presence, max_new_tokens=6, min_new_tokens=6)
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        words = model.generate(**alone, modality_mask=presence[row : row + 1], max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(words[0], together[row])


@DECODERS
def test_embeddings_of_words_may_be_given_instead(decoder_type):
    model = model_of(decoder={"decoder_type": decoder_type})
    batch, words = zoo.tiny_batch(model.config), torch.tensor([[BOS, 5, 7]] * 4)
    one = model(**batch, decoder_input_ids=words).logits
    other = model(**batch, decoder_inputs_embeds=model.embed_tokens(words)).logits
    torch.testing.assert_close(one, other, **EXACT)


@DECODERS
def test_attention_to_every_modality_is_returned_on_request(decoder_type):
    model = model_of(decoder={"decoder_type": decoder_type})
    batch = zoo.tiny_batch(model.config)
    output = model(**batch, labels=labels_of(), output_attentions=True)
    length = output.encoder_last_hidden_state.shape[1]
    for weights in output.cross_attentions:
        assert weights.shape == (4, 2, 6, length)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 6), **CLOSE)
    torch.testing.assert_close(output.logits, model(**batch, labels=labels_of()).logits, **CLOSE)


def test_a_decoder_starts_as_the_causal_model_that_it_came_from():
    torch.manual_seed(0)
    causal = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20, bos_token_id=1, eos_token_id=2)
    ).eval()
    source = model_of("vision").config.vision_config
    model = CrossModalForCaptioning.from_encoders(
        vision=source, decoder=causal, hidden_size=32, num_attention_heads=2, intermediate_size=32
    ).eval()
    words = torch.tensor([[1, 7, 9, 30], [1, 3, 4, 5]])
    batch = {"pixel_values": zoo.tiny_batch(model.config)["pixel_values"][:2]}
    torch.testing.assert_close(
        model(**batch, decoder_input_ids=words).logits, causal(words).logits, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="model_type='bert'.*gpt2"):
        from transformers import BertConfig, BertLMHeadModel

        config = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
        )
        CrossModalForCaptioning.from_encoders(vision=source, decoder=BertLMHeadModel(config))


@DECODERS
def test_answers_are_ranked_by_their_likelihood(decoder_type):
    model = model_of(decoder={"decoder_type": decoder_type})
    batch = zoo.tiny_batch(model.config)
    torch.manual_seed(7)
    candidates = torch.randint(3, 40, (9, 3))
    candidates[:, 0] = torch.arange(3, 12)
    candidates[::2, 1] = EOS
    candidates[::2, 2] = -100
    found, scores = model.rank_answers(candidates, top_k=9, batch_size=4, **batch)
    for row in range(4):
        alone = {key: value[row : row + 1].expand(9, *value.shape[1:]) for key, value in batch.items()}
        logs = model(**alone, labels=candidates).logits.log_softmax(-1)
        expected = logs.gather(2, candidates.clamp(min=0)[..., None]).squeeze(-1)
        expected = expected.masked_fill(candidates == -100, 0).sum(1)
        torch.testing.assert_close(scores[row], expected[found[row]], **CLOSE)
        assert found[row].tolist() == expected.argsort(descending=True).tolist()
    few, _ = model.rank_answers(candidates, top_k=2, **batch)
    assert few.shape == (4, 2)


@DECODERS
def test_a_folder_holds_the_whole(decoder_type, tmp_path):
    model = model_of(decoder={"decoder_type": decoder_type})
    model.save_pretrained(tmp_path)
    again = CrossModalForCaptioning.from_pretrained(tmp_path).eval()
    batch = zoo.tiny_batch(model.config)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, **EXACT)
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again.generate(**batch, max_new_tokens=5), model.generate(**batch, max_new_tokens=5))


def test_wrong_input_is_named():
    model = model_of()
    batch = zoo.tiny_batch(model.config)
    with pytest.raises(ValueError, match="nothing to write about.*pixel_values"):
        model.generate(max_new_tokens=3)
    with pytest.raises(ValueError, match="text of 25 words.*max_position_embeddings=24"):
        model.generate(**batch, decoder_input_ids=torch.full((4, 24), 5))
    with pytest.raises(ValueError, match="decoder_config is None"):
        CrossModalForCaptioning(zoo.tiny_config("vision"))
    with pytest.raises(ValueError, match="decoder_type='gr'.*'gru'"):
        TextDecoderConfig(decoder_type="gr").validate()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(**batch, max_new_tokens=0)


@pytest.fixture(scope="module")
def written():
    """A model that has learnt to name the color of a picture, and its processor, without a text modality."""
    colors = ["red", "blue", "green"]
    tokenizer = train_tokenizer([f"a {color} picture" for color in colors])
    bos, eos = tokenizer.cls_token_id, tokenizer.sep_token_id
    torch.manual_seed(0)
    decoder = TextDecoderConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, bos_token_id=bos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = CrossModalForCaptioning(zoo.tiny_config("vision", decoder_config=decoder))
    size = model.config.vision_config.image_size
    processor = CrossModalProcessor.from_config(
        model.config, ViTImageProcessorPil(size={"height": size, "width": size}), tokenizer
    )
    batch = processor(
        images=[picture(color) for color in colors], text_target=[f"a {color} picture" for color in colors]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), processor


def test_the_processor_makes_targets_and_prompts_padded_on_their_own_sides(written):
    _, processor = written
    images = [picture("red")] * 2
    batch = processor(images=images, text=["", "a red"])
    bos, eos, pad = (
        processor.writer["bos_token_id"],
        processor.writer["eos_token_id"],
        processor.tokenizer.pad_token_id,
    )
    a, red, shown = processor.tokenizer.convert_tokens_to_ids(["a", "red", "picture"])
    assert batch["input_ids"].tolist() == [[pad, pad, bos], [bos, a, red]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    batch = processor(images=images, text_target=["a red picture", "a"])
    assert batch["labels"].tolist() == [[a, red, shown, eos], [a, eos, -100, -100]]
    both = processor(images=images, text=["", "a red"], text_target=["a red", "picture"])
    assert both["decoder_input_ids"].tolist() == [[bos, a, red, pad], [bos, a, red, shown]]
    assert both["labels"].tolist() == [[a, red, eos, -100], [-100, -100, shown, eos]]
    with pytest.raises(ValueError, match="3 targets for 2 rows"):
        processor(images=[picture("red")] * 2, text_target=["a"] * 3)
    with pytest.raises(ValueError, match="no input was given"):
        processor(text="a red")


def test_the_stock_pipeline_captions_in_a_process_that_has_never_heard_of_us(written, tmp_path):
    model, processor = written
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for color in ("red", "blue"):
        picture(color).save(tmp_path / f"{color}.png")
    code = """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
files = [f"{sys.argv[2]}/{color}.png" for color in ("red", "blue")]
print(pipe(files[1], text="", max_new_tokens=6)[0]["generated_text"])
print([found["generated_text"] for found in pipe(files, text=["a", "a"], max_new_tokens=6)])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(processor.batch_decode(model.generate(**processor(images=files), max_new_tokens=6, num_beams=2), skip_special_tokens=True))
"""
    lines = run_as_stranger(code, tmp_path / "model", tmp_path, cwd=tmp_path).splitlines()
    assert lines[-3:] == [
        "a blue picture",
        "['a red picture', 'a blue picture']",
        "['a red picture', 'a blue picture']",
    ]


def test_a_processor_has_the_words_of_the_decoder(written):
    model, processor = written
    named = {"vision": processor.image_processor, "decoder": processor.tokenizer}
    again = CrossModalProcessor.from_encoders(model.config, **named)
    assert again.writer == processor.writer and again.tokenizer is processor.tokenizer
    more = train_tokenizer(["a red picture", "quite another word"])
    with pytest.raises(ValueError, match=r"tokenizer has \d+ words and the decoder vocab_size"):
        CrossModalProcessor.from_encoders(model.config, **named | {"decoder": more})
    both = zoo.tiny_config("vision", "text", decoder_config=model.config.decoder_config)
    other = CrossModalProcessor.from_encoders(both, **named | {"text": more})
    assert other.tokenizer is more and other.writing_tokenizer is processor.tokenizer


def test_the_card_says_how_it_is_used(written, tmp_path):
    export_folder(*written, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "transformer\ndecoder of 1 layers" in card
    assert "processor(images=[...])" in card and "how the text begins" in card


def test_words_are_streamed_as_they_are_written(written):
    model, processor = written
    streamer = TextIteratorStreamer(processor.tokenizer, skip_special_tokens=True)
    model.generate(**processor(images=picture("green")), max_new_tokens=6, streamer=streamer)
    assert "".join(streamer).strip() == "a green picture"


def test_words_can_be_added_to_the_decoder():
    model = model_of()
    batch, words = zoo.tiny_batch(model.config), torch.tensor([[BOS, 7, 9]] * 4)
    before = model(**batch, decoder_input_ids=words).logits
    model.resize_token_embeddings(44)
    assert model.config.decoder_config.vocab_size == 44 and model.lm_head.weight is model.embed_tokens.weight
    after = model(**batch, decoder_input_ids=words.masked_fill(words == 9, 43)).logits
    assert after.shape == (4, 3, 44)
    torch.testing.assert_close(after[:, :2, :40], before[:, :2], **CLOSE)


def test_every_parameter_learns():
    """What had no gradient would stop training on several devices."""
    model = model_of().train()
    model(**zoo.tiny_batch(model.config), labels=labels_of()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_attention_is_chosen_for_the_decoder_too():
    model = model_of(attn_implementation="eager")
    model.set_attn_implementation("sdpa")
    assert model.config.decoder_config._attn_implementation == "sdpa"
    model.set_attn_implementation({"decoder_config": "eager"})
    assert model.config.decoder_config._attn_implementation == "eager" and model.config._attn_implementation == "sdpa"


def test_the_decoder_may_have_other_words_than_the_text_that_is_read(tmp_path):
    read = train_tokenizer(["what color is it"], 60)
    said = train_tokenizer(["red blue green purple"], 90)
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(said), n_embd=16, n_layer=1, n_head=2, n_positions=16,
            bos_token_id=said.cls_token_id, eos_token_id=said.sep_token_id,
        )
    )  # fmt: skip
    text = zoo.tiny_config("text").text_config
    text.vocab_size = len(read)
    vision = zoo.tiny_config("vision").vision_config
    model = CrossModalForCaptioning.from_encoders(
        vision=vision, text=text, decoder=decoder, hidden_size=16, num_attention_heads=2
    ).eval()
    side = vision.image_size
    named = {"vision": ViTImageProcessorPil(size={"height": side, "width": side}), "text": read, "decoder": said}
    processor = CrossModalProcessor.from_encoders(model.config, **named)
    assert processor.tokenizer is read and processor.writing_tokenizer is said
    batch = processor(images=picture("red"), text="what color is it", text_target=["blue red"])
    assert batch["input_ids"][0].tolist() == read("what color is it")["input_ids"]
    assert processor.decode(batch["labels"][0], skip_special_tokens=True) == "blue red"
    assert model(**batch).loss.isfinite()
    export_folder(model, processor, tmp_path / "model")
    picture("red").save(tmp_path / "red.png")
    code = """
from transformers import AutoProcessor, pipeline
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(len(processor.tokenizer), len(processor.decoder_tokenizer))
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
print(pipe(sys.argv[2], text="what color is it", max_new_tokens=4)[0]["generated_text"])
"""
    sizes, *_ = run_as_stranger(code, tmp_path / "model", tmp_path / "red.png", cwd=tmp_path).splitlines()
    assert sizes == f"{len(read)} {len(said)}"
