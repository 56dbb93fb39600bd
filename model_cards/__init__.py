"""Templates of model cards, one per head."""

from pathlib import Path


def card_template(head):
    """Path of the Jinja template of a head's card, such as `CrossModalForVQA`."""
    return Path(__file__).parent / f"{head}.md"
