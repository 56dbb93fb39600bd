"""The card that `push_to_hub` of a model writes where a repo has none yet: what it is and how it loads, and no more than that.

Shipped to the Hub beside the weights: imports sibling files and the standard library alone.
"""

# What transformers would write there is a form that nobody has filled in; this is how it is known.
UNFILLED = "This model card has been automatically generated."

_CARD = """---
library_name: transformers
license: apache-2.0
tags:
- crossmodal
- multimodal
- {fusion}
---

# {title}

`{head}`: {modalities}, fused by cross-modal attention (`{fusion}`).

```python
from transformers import {auto_class}, AutoProcessor

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```

The processor is pushed by itself, `processor.push_to_hub("{repo_id}")`. `trust_remote_code=True` runs the code of this repo: give the
`revision` (a commit hash) that you have read.

What it was trained on and what it scores is not said here: `crossmodal publish` writes a card that does.
"""


def plain_card(model, repo_id):
    """Text of a card for `model` in the repo `repo_id`."""
    config, head = model.config, type(model).__name__
    encoders = [f"{name} ({getattr(config, f'{name}_config').model_type})" for name in config.modality_names]
    auto_class = next(key for key, value in config.auto_map.items() if value.rpartition(".")[2] == head)
    return _CARD.format(
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        head=head,
        fusion=config.fusion_type,
        modalities=", ".join(encoders),
        auto_class=auto_class,
    )
