"""The report built from the toy world: complete, self-contained, well-formed, no claim beyond its intervals."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rlawm_jax.evaluation import motion, open_loop
from rlawm_jax.evaluation.results import format_estimate
from rlawm_jax.evaluation.statistics import Estimate
from rlawm_jax.reports import film_strips, plots
from rlawm_jax.reports import open_loop as report
from tests.toy_world import ToyLoader, ToyModel, toy_config

SECTIONS = ("headline", "table", "horizon", "strips", "maps", "halfway", "training", "glossary", "provenance")
VOID = {"meta", "img", "br", "link", "use", "path"}
PROVENANCE = {
    "config": json.dumps({"eval": {"chunk": 4}}),
    "command": "launch.train --config=<toy>",
    "git": "abc1234",
    "versions": {"jax": "0.10.2"},
    "step": 300,
}
HISTORY = [
    {"step": s, "rla/l1": 1 / s, "rla/copy_l1": 1.0, "denoiser/l1": 0.0 if s < 30 else 2 / s}
    for s in range(10, 100, 10)
]


def make(*, images):
    loop = open_loop.OpenLoop(ToyModel(noise_scale=0.02), toy_config(), ToyLoader(with_frames=images), images=images)
    return loop, open_loop.evaluate(loop), film_strips.collect(loop)


@pytest.fixture(scope="module")
def reported():
    return make(images=True)


@pytest.fixture(scope="module")
def page(reported, tmp_path_factory):
    _, evaluation, gallery = reported
    path = report.write_report(
        tmp_path_factory.mktemp("report"), evaluation, gallery, history=HISTORY, provenance=PROVENANCE
    )
    return path.read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects ids and references and insists that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], set(), []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def check(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_the_page_is_well_formed_and_has_every_section(page):
    assert set(SECTIONS) <= check(page).ids


def test_the_page_needs_no_other_file(page):
    links = check(page).links
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "url(http" not in page and "@import" not in page


def test_every_image_in_the_page_can_be_read(page):
    images = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    assert len(images) > 80
    for data in images:
        Image.open(io.BytesIO(base64.b64decode(data))).load()


def test_table_figures_and_provenance_are_on_the_page(page, reported):
    cell = reported[1].table[0].rows["mean"].metrics["dino_l1"]
    assert f"{cell.value:.3f}<small>{cell.low:.3f}\N{EN DASH}{cell.high:.3f}</small>" in page
    assert "bootstrap over episodes" in page and "abc1234" in page
    assert "launch.train --config=&lt;toy&gt;" in page  # escaped


def test_drawings_take_all_their_colours_from_the_page(page):
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 2
    assert "var(--mean)" in charts[0] and not re.search(r"#0[0-9]0\d0\d\b", charts[0])


def test_films_end_where_the_rollout_does_and_start_at_the_frame_that_was_seen(reported):
    gallery = reported[2]
    film = gallery.films[0]
    assert film.ends == [3, 6, 8] and {len(frames) for frames in film.rows.values()} == {9}
    for row in ("decoded", "prediction", "copy"):
        np.testing.assert_array_equal(film.rows[row][0], film.rows["truth"][0])
    np.testing.assert_array_equal(film.rows["copy"][-1], film.rows["truth"][0])
    with Image.open(io.BytesIO(report.animate(gallery.films))) as animation:
        # equal neighbours are merged, so there may be fewer than nine frames
        assert 2 <= animation.n_frames <= 9


def test_shown_windows_are_those_with_most_change_of_different_episodes(reported):
    loop = reported[0]
    loader = loop.loader
    shown = film_strips.moving_windows(loop, 9)
    change = {
        w: np.abs(loader.tokens[w.episode, w.start + 8] - loader.tokens[w.episode, w.start]).mean()
        for w in film_strips.pool_windows(loop, 9)
    }
    assert len({w.episode for w in shown}) == len(shown) == 2
    np.testing.assert_allclose(change[shown[0]], max(change.values()), rtol=1e-5)


def test_halfway_errors_of_plain_guesses_are_their_definitions(reported):
    loop, _, gallery = reported
    windows = film_strips.pool_windows(loop, 3)
    tokens = [loop.loader.tokens[w.episode, w.start : w.start + 3] for w in windows]
    guesses = {"first": lambda t: t[0], "last": lambda t: t[2], "blend": lambda t: (t[0] + t[2]) / 2}
    for name, guess in guesses.items():
        expected = np.mean([np.abs(guess(t) - t[1]).mean() for t in tokens])
        np.testing.assert_allclose(gallery.halfway_errors[name].value, expected, rtol=1e-4)


def test_principal_components_of_equal_tokens_are_equal_colours():
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((4, 16, 6))
    project = film_strips.fit_components(tokens)
    colours = project(tokens)
    assert colours.shape == (4, 16, 3) and colours.dtype == np.uint8
    np.testing.assert_array_equal(project(tokens[1]), colours[1])
    assert np.std(colours[..., 0]) > 30  # stretched over the range, not one flat colour


def test_without_an_image_decoder_the_page_still_has_every_section(tmp_path):
    _, evaluation, gallery = make(images=False)
    path = report.write_report(tmp_path, evaluation, gallery, history=[], provenance=PROVENANCE)
    text = path.read_text(encoding="utf-8")
    assert set(SECTIONS) <= check(text).ids
    assert "no trained image decoder" in text and "no training log" in text
    assert not (tmp_path / "rollout.gif").exists()


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.5, 0.9, "better than"), (0.8, 1.1, "not told apart"), (1.05, 1.3, "worse than")]
)
def test_words_claim_only_what_the_interval_allows(low, high, words):
    assert report.verdict(Estimate(0.5 * (low + high), low, high, 10, 5)).startswith(words)
    assert report.verdict(Estimate(0.5, np.nan, np.nan, 10, 1)).startswith("not told apart")


def test_training_curves_leave_out_steps_at_which_a_part_did_not_train():
    assert plots._series(HISTORY, "denoiser/l1")[0] == list(range(30, 100, 10))
    assert plots.training_curves([]) == ""
    assert plots.training_curves([{"step": 1, "rla/l1": None}]) == ""


@pytest.mark.parametrize("ends", [[1], [3], [14], [7, 14, 21, 28], [2, 4, 6, 7], list(range(14, 29 * 14, 14))])
def test_strips_show_the_first_frame_the_last_one_and_a_page_wide_choice_between(ends):
    times = report.strip_times(ends)
    assert times[0] == 0 and times[-1] == ends[-1]
    assert times == sorted(set(times)) and len(times) <= 1 + report.STRIP_FRAMES
    if len(ends) <= 4:
        assert set(ends) <= set(times)


def test_motion_in_time_has_a_table_and_a_chart_where_it_was_measured(reported, page):
    loop, found, gallery = reported
    measured = motion.measure(loop)
    shown = {"history": [], "provenance": PROVENANCE}
    text = report.render(dataclasses.replace(found, motion=measured), gallery, b"", **shown)
    assert "motion" in check(text).ids
    assert f"<td>{format_estimate(measured.scores['noise']['error'], 2)}</td>" in text
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 2 and "nearest true frame" in charts[1] and "var(--copy)" in charts[1]
    assert "Needs a prediction of two steps" in page and "nearest true frame, as" not in page


def test_a_missing_training_log_is_an_empty_history(tmp_path):
    assert report.read_history(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rla/l1": 0.5}\n')
    assert report.read_history(tmp_path / "metrics.jsonl") == [{"step": 1, "rla/l1": 0.5}]
