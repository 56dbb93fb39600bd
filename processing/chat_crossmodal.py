"""Conversations in the form of transformers: lists of `{"role": ..., "content": ...}`, rendered to text, cut from the oldest.

Content is a string, or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image" | "url" | "path": ...}`.
Shipped to the Hub beside the weights: imports only transformers.
"""

from transformers.utils.chat_template_utils import render_jinja_template


# Plain words, so that any tokenizer has them. What an assistant said is marked for `return_assistant_tokens_mask`.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set said = namespace(text=message['content'] if message['content'] is string else '') -%}"
    "{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set said.text = said.text + (' ' if said.text else '') + part['text'] -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- message['role'] + ': ' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- said.text -}}{%- endgeneration -%}"
    "{%- else -%}{{- said.text -}}{%- endif -%}"
    "{{- '\n' if not loop.last or add_generation_prompt -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
)
_ROLES = ("system", "user", "assistant")


def is_conversation(value):
    """Whether a value is a list of messages, and not a list of something else."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, dict) for item in value)


def check_conversation(messages):
    """Raises ValueError saying what is wrong with a conversation and what is expected."""
    form = "Expected messages such as {'role': 'user', 'content': 'what is this?'}."
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {place} of the chat is {message!r:.100}. {form}")
        if message["role"] not in _ROLES:
            raise ValueError(
                f"message {place} of the chat has role {message['role']!r}. Expected one of {list(_ROLES)}."
            )
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(
            f"the chat has no user turn (roles: {[message['role'] for message in messages]}): there is nothing to answer. {form}"
        )


def render(messages, template=None, add_generation_prompt=True, **options):
    """The text of a conversation."""
    texts, _ = render_jinja_template(
        [list(messages)],
        chat_template=template or CHAT_TEMPLATE,
        add_generation_prompt=add_generation_prompt,
        **options,
    )
    return texts[0]


def without_oldest(messages):
    """A conversation without its oldest turn: it begins with the next user turn then (behind what the system said), which
    takes over the images of what is left out. None if there is no later user turn."""
    lead = 0
    while messages[lead]["role"] == "system":
        lead += 1
    later = [place for place in range(lead + 1, len(messages)) if messages[place]["role"] == "user"]
    if not later:
        return None
    first = messages[later[0]]
    left_out = [part for message in messages[lead : later[0]] for part in _parts(message)]
    images = [part for part in left_out if part.get("type") in ("image", "image_url")]
    if images:
        content = first["content"]
        own = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        first = {**first, "content": [*images, *own]}
    return [*messages[:lead], first, *messages[later[0] + 1 :]]


def _parts(message):
    return message["content"] if isinstance(message["content"], list | tuple) else []
