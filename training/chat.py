"""A conversation with a model that writes: turns kept, answers streamed."""

from threading import Thread

from transformers import TextIteratorStreamer

from ..processing.reading_crossmodal import read_image


class Conversation:
    """Turns about images, one model and its processor.

    Args:
        model: CrossModalForCaptioning. processor: with a chat template: one that was trained on dialogues.
        images: paths, URLs or PIL images, which go before the first question.

    Raises:
        ValueError: for a model that was not trained on dialogues, and images that cannot be read.
    """

    def __init__(self, model, processor, images=()):
        if processor.chat_template is None:
            raise ValueError(
                "this model was not trained on dialogues: its processor has no chat template. Use `crossmodal predict` for single "
                "questions, or train one with task: dialogue."
            )
        self.model, self.processor, self.messages = model.eval(), processor, []
        self.waiting = [read_image(image, f"image {number}") for number, image in enumerate(images)]

    def show(self, image):
        """Adds an image, before the next question."""
        self.waiting.append(read_image(image))

    def ask(self, question, **options):
        """Yields the answer as it is written, in pieces. options: of `generate`.

        The question and its answer are kept once the answer is whole; where it fails, nothing is.
        """
        content = [{"type": "image", "image": image} for image in self.waiting]
        asked = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        batch = self.processor.apply_chat_template(
            [*self.messages, asked], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.writing_tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed = []

        def write():
            try:
                # What is shown as it is written has no other beams.
                self.model.generate(**batch, streamer=streamer, **{"num_beams": 1, **options})
            except Exception as error:
                failed.append(error)
                streamer.end()

        thread, pieces = Thread(target=write, daemon=True), []
        thread.start()
        for piece in streamer:
            if piece:
                pieces.append(piece)
                yield piece
        thread.join()
        if failed:
            raise failed[0]
        self.messages += [asked, {"role": "assistant", "content": "".join(pieces).strip()}]
        self.waiting = []


def written_about(model, processor, image=None, text=None, **options):
    """What a model writes about an image, a question, or both. options: of `generate`."""
    if text is not None and processor.chat_template is not None:
        text = [{"role": "user", "content": text}]
    inputs = {"images": image, "text": text}
    batch = processor(**{key: value for key, value in inputs.items() if value is not None}).to(model.device)
    return processor.written(model.eval().generate(**batch, **options), batch)[0]
