"""How datasets and splits may be called."""

import re


def word(text: str) -> str:
    """`text` in ASCII letters, digits and underscores."""
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
