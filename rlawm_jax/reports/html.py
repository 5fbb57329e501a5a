"""Static HTML from the templates in `templates/`, shared by all reports."""

from pathlib import Path
from typing import Any

import jinja2

from rlawm_jax.reports import plots


def page(template: str, **values: Any) -> str:
    """The rendered template; a name that it uses but is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"jpeg": plots.jpeg, "png": plots.png}
    return environment.get_template(template).render(**values)
