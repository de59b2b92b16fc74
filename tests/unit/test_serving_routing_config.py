"""The configuration of `gmpo serve --config`: what it means, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmpo.errors import ConfigError
from gmpo.serving.routing_config import EngineSettings, load_routing_config, routing_keys
from gmpo.serving.upstream import UpstreamSettings

WHOLE = """
name = "bot"
main = "here"
fallback = ["there"]
experiment = "greeting"

[backends.here]
engine = "runs/quickstart"

[backends.there]
url = "http://127.0.0.1:8001/v1"
model = "bot-4"
stall_seconds = 5

[quality]
mode = "buffered"
threshold = 0.4
weights = { probability = 2.0, terminated = 1.0 }

[breaker]
failures = 3

[shadow]
backend = "there"
share = 0.5
"""


def load(tmp_path: Path, text: str):
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return load_routing_config(path)


def test_a_whole_configuration(tmp_path: Path):
    found = load(tmp_path, WHOLE)
    here, there = found.backends.values()
    assert isinstance(here, EngineSettings) and here.engine == "runs/quickstart"
    assert isinstance(there, UpstreamSettings) and there.stall_seconds == 5
    assert there.connect_seconds == 5.0, "what is not said has its default"
    assert (found.main, found.fallback, found.experiment) == ("here", ("there",), "greeting")
    assert found.breaker.failures == 3 and found.quality.threshold == 0.4
    assert found.shadow is not None and found.shadow.max_running == 2
    assert found.needs_store == "experiment"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("fallback =", "fallbacks =", "unknown key 'fallbacks'; did you mean 'fallback'?"),
        ("stall_seconds", "stal_seconds", "'backends.there.stal_seconds'; did you mean 'stall_se"),
        ('model = "bot-4"\n', "", "missing key 'backends.there.model'"),
        ("engine = ", "motor = ", "unknown key 'backends.here.motor'; allowed: ['engine',"),
        ('main = "here"', 'main = "her"', "main names 'her', which is no backend; there are"),
        ('["there"]', '["here"]', "name a backend twice"),
        ('backend = "there"', 'backend = "here"', "is an engine, which would take the cores"),
        ("threshold = 0.4\n", "", "quality: mode 'buffered' needs to know"),
        ("threshold = 0.4", 'threshold = 0.4\ncalibration = "q"', "threshold comes with the cal"),
        ("threshold = 0.4", "threshold = 1.4", "quality.threshold = 1.4: input should be less"),
        ("probability = 2.0", "certainty = 2.0", "weights.certainty is no component"),
        ("probability = 2.0", "probability = -2.0", "none may be below 0"),
        ("failures = 3", "failures = 0", "breaker.failures = 0: input should be greater"),
        ("failures = 3", "max_open_seconds = 1", "below open_seconds 5.0"),
        ("http://", "htp://", "backends.there.url = 'htp://127.0.0.1:8001/v1'"),
        ("[quality]", "[quality", "not valid TOML"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, before: str, after: str, said: str):
    assert before in WHOLE
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, WHOLE.replace(before, after))
    assert said in str(caught.value) and "serve.toml" in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_routing_config(tmp_path / "none.toml")


def test_what_needs_a_store_is_known(tmp_path: Path):
    text = 'name = "b"\nmain = "x"\n[backends.x]\nengine = "m"\n'
    assert load(tmp_path, text).needs_store is None
    assert load(tmp_path, text + 'follow = "bot"\n').needs_store == "backends.x.follow"


def test_every_key_is_in_the_routing_page():
    page = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
    missing = [key for key in routing_keys() if f"`{key}`" not in page]
    assert not missing, f"docs/routing.md does not name {missing}"
