"""METHOD.md is what the code cites: every reference leads to a section, and its figures are those of the code."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import base
from rlawm_jax import flow
from rlawm_jax.compile_check.abstract_programs import abstract_model
from rlawm_jax.compile_check.cost import matmul_flops
from rlawm_jax.models.vit import variant

ROOT = Path(__file__).parents[1]
METHOD = (ROOT / "rlawm_jax" / "METHOD.md").read_text()
FOLDERS = ("configs", "data", "launch", "rlawm_jax", "tests")
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".toml", ".html")

NUMBER = r"\d+(?:\.\d+)?"
REFERENCE = re.compile(rf"METHOD\.md\s+(?:sections?\s+)?({NUMBER}(?:(?:,\s+|\s+and\s+|\s+to\s+){NUMBER})*)")
ABSENT = re.compile(r"\bSPEC\s+sections?\b|\bSPEC\.md\b|\bfacts\s+file\b|\bfacts\s+\d", re.IGNORECASE)


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every page and source of the repository but this one."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    for path in [*paths, *sorted(ROOT.glob("*.md"))]:
        if path != Path(__file__):
            yield str(path.relative_to(ROOT)), path.read_text()


def sections() -> set[str]:
    return set(re.findall(rf"^#{{2,3}} ({NUMBER})[. ]", METHOD, re.MULTILINE))


def rows(section: str, columns: int) -> list[list[str]]:
    """Cells of the table rows of a section that have so many columns; headings and rules left out."""
    text = re.split(rf"^## {section}\. .*$", METHOD, flags=re.MULTILINE)[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if len(row) == columns and set(row[0]) != set("-")]


def test_every_reference_leads_to_a_section():
    references = {
        (path, number)
        for path, text in texts()
        for match in REFERENCE.finditer(text)
        for number in re.findall(NUMBER, match[1])
    }
    assert len(references) > 20  # the pattern still finds what is cited
    assert not {reference for reference in references if reference[1] not in sections()}


def test_nothing_is_cited_that_is_not_in_the_repository():
    assert not [(path, match[0]) for path, text in texts() for match in ABSENT.finditer(text)]


def test_the_page_refers_to_sections_that_it_has():
    assert set(re.findall(r"\b13\.\d+\b", METHOD)) <= sections()


def test_the_official_sizes_are_the_defaults_of_the_config():
    config, written = base.get_config(), {}
    for _, value, name in rows("1", 3):
        if name.startswith("`") and value.isdigit():
            written[name.strip("`")] = int(value)
    assert len(written) == 14
    for name, value in written.items():
        node = config
        for piece in name.split("."):
            node = node[piece]
        assert node == value, name
    shapes = {symbol: shape for symbol, _, _, shape in rows("1", 4)}
    spec, size = variant(config.backbone.name), config.backbone.image_size
    assert shapes["s_t"] == str(list(spec.token_shape((size, size))))
    assert shapes["z"] == shapes["x0"] == str([config.rla.num_tokens, config.rla.token_dim])
    assert shapes["I_t"] == str([config.backbone.image_size] * 2 + [3])


@pytest.mark.slow
def test_the_ledger_is_what_the_programs_cost():
    config = base.get_config()
    graphdef, state = nnx.split(abstract_model(config, with_backbone=True))
    size = config.backbone.image_size
    length, width = variant(config.backbone.name).token_shape((size, size))

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    def tflop(part: Callable, *args: Any) -> float:
        jaxpr = jax.make_jaxpr(lambda state, *args: part(nnx.merge(graphdef, state), *args))(state, *args)
        return matmul_flops(jaxpr.jaxpr) / 1e12

    def condition(model, tokens, actions, scalar):
        return model.denoiser.condition(tokens, actions, scalar, scalar)

    size, action_dim = config.backbone.image_size, max(config.denoiser.action_dims.values())
    tokens, latent = shape(length, width), shape(config.rla.num_tokens, config.rla.token_dim)
    given = tokens, shape(config.data.max_horizon, action_dim), shape(dtype=jnp.int32)
    conditioned = jax.eval_shape(lambda state, *args: condition(nnx.merge(graphdef, state), *args), state, *given)
    keys_values = tflop(lambda m, x: m.denoiser.flow_blocks.each(x, "keys_values"), shape(length, width))
    sampler = flow.Sampler(**config.sampler)
    counted = {
        "backbone": tflop(lambda m, x: m.encode(x), shape(size, size, 3, dtype=jnp.uint8)),
        "condition stage": tflop(condition, *given) - keys_values,
        "keys and values of the flow blocks": keys_values,
        "one flow step": tflop(lambda m, x, t, c: m.denoiser.velocity(x, t, c), latent, shape(), conditioned),
        "RLA decoder": tflop(lambda m, s, x: m.apply_latent(s, x), tokens, latent),
        "prediction, 30 steps": tflop(lambda m, s, a, n, e: m.predict(s, a, n, n, e, sampler)[0], *given, latent),
        "image decoder": tflop(lambda m, s: m.decode(s), tokens),
    }
    written = {part: cost for part, cost, _ in rows("10", 3) if part != "part"}
    assert {part: f"{cost:.{len(written[part]) - 2}f}" for part, cost in counted.items()} == written
