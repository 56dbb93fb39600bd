"""Templates of model cards: one per head, around what all of them have in common."""

from pathlib import Path


# Of the code that lies beside published weights.
LICENSE = Path(__file__).parent / "LICENSE"


def card_template(head):
    """Path of the Jinja template of a head's card, such as `CrossModalForVQA`, or of the part that is `common`."""
    return Path(__file__).parent / f"{head}.md"
