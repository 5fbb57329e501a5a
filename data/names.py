"""Valid names for datasets and splits."""

import re


def word(text: str) -> str:
    """`text` in ASCII letters, digits and underscores."""
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
