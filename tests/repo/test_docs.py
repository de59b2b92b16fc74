"""The documentation covers every key, metric and command there is, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from gmpo.abtest.plan import ExperimentPlan, GuardrailMetric, MeanMetric
from gmpo.recipe import recipe_keys

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])

FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```(?:bash|console|sh|shell)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)


def backticked(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def anchor(heading: str) -> str:
    """A heading's anchor as code hosts make it: lower case, no punctuation, dashes for spaces."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def links(page: Path) -> Iterator[str]:
    for match in LINK.finditer(FENCE.sub("", page.read_text())):
        target = match.group(1) or match.group(2)
        if not re.match(r"[a-z]+:", target):
            yield target


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `gmpo` or `make` command in a page's shell blocks, without output lines."""
    for block in FENCED.findall(page.read_text()):
        for line in block.splitlines():
            words = line.removeprefix("$ ").split()
            if words:
                words[0] = words[0].rpartition("/")[2]
            if words and words[0] in ("gmpo", "make"):
                yield words


def help_of(*words: str) -> str:
    program = "import sys; from gmpo.cli import main; sys.argv[0] = 'gmpo'; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_recipe_key_is_in_the_configuration_page():
    named = backticked((DOCS / "configuration.md").read_text())
    missing = [key for key in recipe_keys() if key not in named]
    assert not missing, f"docs/configuration.md does not name {missing}"


def test_every_setting_and_metric_of_an_experiment_is_in_its_page():
    named = backticked((DOCS / "abtest.md").read_text())
    metrics = get_args(MeanMetric) + get_args(GuardrailMetric)
    missing = [name for name in (*ExperimentPlan.model_fields, *metrics) if name not in named]
    assert not missing, f"docs/abtest.md does not name {missing}"


def test_the_configuration_page_names_no_key_that_is_gone():
    keys = recipe_keys()
    tables = {key.partition(".")[0] for key in keys}
    looks_like_a_key = re.compile(rf"({'|'.join(sorted(tables))})\.[a-z0-9_]+")
    named = {
        name
        for name in backticked((DOCS / "configuration.md").read_text())
        if looks_like_a_key.fullmatch(name)
        and not name.endswith((".py", ".md", ".toml", ".json", ".jsonl"))
    }
    assert named <= set(keys), f"no such key: {sorted(named - set(keys))}"


def test_every_environment_variable_of_ours_is_in_the_configuration_page():
    sources = (REPOSITORY / "src").rglob("*.py")
    read = {name for path in sources for name in re.findall(r'"(GMPO_[A-Z_]+)"', path.read_text())}
    read -= {"GMPO_DASHBOARD"}  # handed by the command to the page that it starts
    missing = read - backticked((DOCS / "configuration.md").read_text())
    assert not missing, f"docs/configuration.md does not name {missing}"


def test_every_metric_is_in_the_metrics_page():
    from gmpo.tracking import METRICS

    named = backticked((DOCS / "metrics.md").read_text())
    missing = [name for name in METRICS if name not in named]
    assert not missing, f"docs/metrics.md does not name {missing}"


def test_every_setting_of_the_checks_of_rows_is_in_their_page():
    from gmpo.data_checks.pii import PII_KINDS
    from gmpo.data_checks.quality import DataChecks
    from gmpo.feedback import FeedbackPolicy

    page = (DOCS / "data.md").read_text()
    named = {name.partition("=")[0] for name in backticked(page)}
    settings = [*DataChecks.model_fields, *FeedbackPolicy.model_fields]
    assert not [name for name in settings if name not in named]
    assert not [kind for kind in PII_KINDS if f"`{kind}`" not in page]


def test_every_key_of_a_federated_plan_is_in_its_page():
    from gmpo.federated.plan import FederatedPlan, JudgingSettings
    from gmpo.federated.settings import AggregationSettings

    named = backticked((DOCS / "federated.md").read_text())
    own = set(FederatedPlan.model_fields) - {"clients", "aggregation", "judging"}
    keys = own | {f"aggregation.{key}" for key in AggregationSettings.model_fields}
    keys |= {f"judging.{key}" for key in JudgingSettings.model_fields} | {"clients.NAME"}
    assert not keys - named


def test_the_monitoring_page_says_what_to_do_about_each_detector_as_its_reports_do():
    from gmpo.monitoring.actions import ACTIONS
    from gmpo.monitoring.anomalies import SERVING_DETECTORS

    page = (DOCS / "monitoring.md").read_text()
    head, _, *lines = page[page.index("| detector | ") :].split("\n\n")[0].splitlines()
    assert head.endswith("| what to do |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    said = {cells[0].strip("`"): cells[-1] for cells in rows}
    assert said == {name: ACTIONS[name] for name in SERVING_DETECTORS}
    # The rules send whoever is paged to this table, with the detector's name.
    rules = (REPOSITORY / "deploy" / "prometheus" / "rules.yml").read_text()
    assert rules.count("docs/monitoring.md says what to do about each") == 2


def test_every_metric_is_named_stage_slash_quantity_and_described():
    from gmpo.tracking import METRICS

    # `stage/quantity`; a KL carries direction and estimator, as in `kl_old/k1`.
    wrong = [name for name in METRICS if not re.fullmatch(r"[a-z0-9_]+/[a-z0-9_/]+", name)]
    assert not wrong
    assert all(description.strip() for description in METRICS.values())


def test_the_commands_that_the_pages_show_exist():
    subcommands = help_of()
    make = set(re.findall(r"^([a-z][\w-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for page in PAGES:
        for words in commands(page):
            arguments = [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word)]
            if words[0] == "make":
                known = set(arguments) <= make
            else:
                known = not arguments or bool(
                    re.search(rf"^\W*{arguments[0]}\b", subcommands, re.MULTILINE)
                )
            if not known:
                wrong.append(f"{page.name}: {' '.join(words)}")
    assert not wrong, "\n".join(wrong)


def test_the_readme_leads_to_every_page():
    linked = {target.partition("#")[0] for target in links(REPOSITORY / "README.md")}
    missing = [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in linked]
    assert not missing, f"README.md links to none of {missing}"


def test_the_page_of_commands_is_what_the_command_line_says():
    from scripts.command_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), (
        "the command line has changed; run python -m scripts.command_page"
    )


def test_the_readme_shows_the_commands_a_newcomer_needs():
    shown = {" ".join(words[:2]) for words in commands(REPOSITORY / "README.md")}
    assert {"make train", "make test"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_the_links_of_a_page_lead_somewhere(page: Path):
    broken = []
    for target in links(page):
        name, _, fragment = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists():
            broken.append(target)
        elif fragment and other.suffix == ".md":
            text = FENCE.sub("", other.read_text())
            if fragment not in {anchor(heading) for heading in HEADING.findall(text)}:
                broken.append(target)
    assert not broken, f"{page.name} links to what is not there: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_row_is_in_a_table_with_a_head(page: Path):
    lines = FENCE.sub("", page.read_text()).splitlines()
    firsts = [n for n, line in enumerate(lines) if line[:1] == "|" and lines[n - 1][:1] != "|"]
    astray = [
        lines[n] for n in firsts if not re.match(r"\|[\s:|-]+\|$", "".join(lines[n + 1 : n + 2]))
    ]
    assert not astray


def entries_of(result: Path) -> list[str]:
    """The entries of docs/experiments.md that name the result file."""
    entries = (DOCS / "experiments.md").read_text().split("\n### ")[1:]
    return [entry for entry in entries if f"/{result.relative_to(DOCS / 'results')}" in entry]


def test_entries_give_the_load_that_their_results_were_measured_under():
    loads = {}
    for result in sorted((DOCS / "results").rglob("*.json")):
        found = re.search(r'"load_before": ([\d.]+)', result.read_text())
        if found and result.name != "roofline_counts.json":  # which has no times
            loads[result] = f"load {float(found[1]):.2f}"
    assert len(loads) > 5
    for result, load in loads.items():
        for entry in entries_of(result):
            # A second load of one sentence stands without the word.
            number = load.removeprefix("load ")
            assert re.search(rf"[Ll]oad ([\d.]+ and )?{re.escape(number)}\b", entry), (result, load)


def test_entries_say_that_the_tree_of_their_results_had_changes():
    for result in sorted((DOCS / "results").rglob("*.json")):
        if re.search(r'"commit": "\w+(-dirty|\+)"', result.read_text()):
            for entry in entries_of(result):
                assert "uncommitted" in entry, result
