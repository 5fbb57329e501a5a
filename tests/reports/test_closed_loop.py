"""The table and the page of a closed-loop evaluation: complete, well-formed, no claim beyond an interval."""

from html.parser import HTMLParser

import pytest

from rlawm_jax.evaluation import closed_loop
from rlawm_jax.evaluation.closed_loop import ClosedLoop, EpisodeOutcome, ImaginedReturns
from rlawm_jax.reports import closed_loop as report
from tests.sim.stick import TASK

VOID = {"meta", "img", "br", "link"}


def evaluation(scores, policy):
    settings = {"policy": policy, "task": closed_loop.plain(TASK), "rows": 8, "image_size": 6, "command": "launch <x>"}
    return ClosedLoop(
        settings, [EpisodeOutcome(100 + i, score > 0.85, score, score / 2, 20) for i, score in enumerate(scores)]
    )


BEFORE, AFTER = evaluation([0.2, 0.4, 0.6, 0.1], "runs/bc"), evaluation([0.5, 0.6, 0.95, 0.5], "runs/rl")
IMAGINED = ImaginedReturns([-2.0, -3.0], [-1.0, -2.5], [0, 1])


class Checker(HTMLParser):
    """Insists that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_table_has_a_row_per_measure_and_states_its_settings():
    text = report.format_markdown(AFTER)
    assert text.count("\n| ") == 5
    assert "| success (way > 0.85) | 0.250 [" in text
    assert "| way 0.5 reached | 1.000 [" in text
    assert "seeds 100 to 103" in text and "At most 20 steps at 5 Hz, 8 of them per observation" in text
    assert "1 of 4 episodes succeed" in text
    assert "McNemar" not in text and "Imagined" not in text


def test_a_comparison_adds_the_other_policy_the_differences_and_the_tests():
    text = report.format_markdown(AFTER, closed_loop.compare(AFTER, BEFORE))
    assert "|  | runs/rl | runs/bc | difference |" in text
    assert (
        "- way 0.5 reached: 3 seeds by the first policy alone, 0 by the second alone; McNemar's exact p = 0.25." in text
    )


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [((0.1, 0.1, 0.1, 0.1), "higher"), ((-0.1,) * 4, "lower"), ((0.3, -0.3, 0.2, -0.2), "not told apart")],
)
def test_words_claim_no_more_than_the_interval(shift, verdict):
    base = [0.4, 0.5, 0.3, 0.6]
    this = evaluation([a + b for a, b in zip(base, shift, strict=True)], "runs/rl")
    words = report.in_words(this, closed_loop.compare(this, evaluation(base, "runs/bc")))
    assert words.endswith(f"best way is {verdict}.")
    assert "success is not told apart" in words


def test_imagined_return_stands_beside_the_true_scores():
    text = report.format_markdown(AFTER, closed_loop.compare(AFTER, BEFORE), IMAGINED)
    assert "| imagined return | -2.500 [" in text and "| +0.750 [" in text
    assert "| true way, best of the episode | 0.325 [" in text
    assert "Before: runs/bc; after: runs/rl." in text
    assert "Before: not evaluated (add --against)" in report.format_markdown(AFTER, imagined=IMAGINED)


@pytest.mark.parametrize("comparison", [None, closed_loop.compare(AFTER, BEFORE)])
@pytest.mark.parametrize("imagined", [None, IMAGINED])
def test_the_page_is_well_formed_and_needs_no_other_file(comparison, imagined, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "seed_101.mp4").write_bytes(b"film")
    (tmp_path / "videos" / "seed_999.mp4").write_bytes(b"of another evaluation")
    page = report.write_report(tmp_path, AFTER, comparison, imagined)
    assert page == tmp_path / "closed_loop.html"
    text, checker = page.read_text(encoding="utf-8"), Checker()
    checker.feed(text)
    assert not checker.open
    sources = [attributes["src"] for _, attributes in checker.tags if "src" in attributes]
    assert sources == ["data:video/mp4;base64,ZmlsbQ=="]
    assert "seed 101: no success after 20 steps, best way 0.60" in text
    assert "launch &lt;x&gt;" in text
    assert ("imagined return" in text) == (imagined is not None)
    assert (tmp_path / "closed_loop.md").read_text(encoding="utf-8") == report.format_markdown(
        AFTER, comparison, imagined
    )
