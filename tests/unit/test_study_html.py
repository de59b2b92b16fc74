"""The HTML report is whole, needs no network, and says what the figures allow."""

from __future__ import annotations

import base64
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.studies import plan_of, report_of, run_figures_of
from tests.tiny_runs import tiny_recipe, write_recipe

from gmpo.study.comparison import compare_arms
from gmpo.study.html import study_html
from gmpo.study.plots import plot_study


class Page(HTMLParser):
    """Open tags, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def html(tmp_path: Path) -> str:
    recipe = write_recipe(tmp_path / "a <b> & c.toml", tiny_recipe("no model", training__rounds=3))
    plan = plan_of(recipe, quick=True)
    baseline = {0: run_figures_of(1.0), 1: run_figures_of(2.0)}
    candidate = {0: run_figures_of(0.5), 1: run_figures_of(2.5)}
    found = compare_arms(baseline, candidate, names=("grpo", "gmpo"))
    report = report_of(plan, tmp_path, found)
    return study_html(report, plot_study(report, tmp_path / "plots"))


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(html: str):
    page = Page()
    page.feed(html)
    assert page.open == []
    assert len(page.sources) == 2
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in html


def test_it_says_what_made_it(html: str, tmp_path: Path):
    assert "Made with: gmpo 0.1.0, not from a repository" in html
    assert "more than one build" not in html
    recipe = write_recipe(tmp_path / "tiny.toml", tiny_recipe("no model"))
    one = report_of(plan_of(recipe), tmp_path, [])
    later = {"gmpo": "0.1.0", "commit": "abc"}
    page = study_html(replace(one, made_with=(*one.made_with, later)), [])
    assert "Made with: gmpo 0.1.0, not from a repository; gmpo 0.1.0, commit abc" in page
    assert "Runs were made with more than one build of gmpo" in page


def test_it_says_why_there_is_no_kl_to_the_start(html: str, tmp_path: Path):
    assert "KL to the start was not measured" not in html  # --quick measures it
    never = tiny_recipe("no model", training__kl_ref_every=0)
    plan = plan_of(write_recipe(tmp_path / "tiny.toml", never))
    page = study_html(report_of(plan, tmp_path, []), [])
    assert (
        "KL to the start was not measured in grpo and gmpo: training.kl_ref_every is 0 and a run "
        "has 2 rounds"
    ) in page


def test_it_says_that_pairs_were_not_checked_where_no_rollouts_were_kept(tmp_path: Path):
    recipe = write_recipe(tmp_path / "a.toml", tiny_recipe("no model", training__rounds=3))
    found = compare_arms(
        {0: run_figures_of(1.0), 1: run_figures_of(2.0)},
        {0: run_figures_of(0.5), 1: run_figures_of(2.5)},
        names=("grpo", "gmpo"),
    )
    report = replace(
        report_of(plan_of(recipe, quick=True), tmp_path, found), same_prompts=None, same_start=None
    )
    html = study_html(report, [])
    assert "alike was not checked: some have no other run" in html
    assert "or kept no rollouts (tracking.groups_per_round" in html
    assert "first round, in the runs of each seed: not checked, see above" in html


def test_names_are_escaped(html: str):
    assert "a &lt;b&gt; &amp; c.toml" in html
    assert "<b>" not in html


def test_it_says_what_it_found_and_what_it_cannot_show(html: str):
    assert "gmpo against grpo: no difference seen in any of 15 figures." in html
    assert "This is a quick study" in html
    assert "15 figures are compared, each at 95 %" in html
    assert "checked on the groups kept, yes" in html
    assert "With 2 pairs the exact sign-flip test cannot give a p below 0.5" in html
    assert "would have been seen with 80 % probability" in html
