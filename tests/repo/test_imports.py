"""Imports run one way, from ground up to the adapters; some modules never load torch.

The tables below are the rule. A new module goes into `LAYERS`; a stage that has to know another
stage goes into `ALLOWED` with the reason.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"

# A package is one entry: modules inside it may import each other, but not in a circle.
LAYERS: dict[str, tuple[str, ...]] = {
    "ground": (
        "errors",
        "records",
        "task_config",
        "guard_config",
        "guard_events",
        "adaptive_config",
        "tracking_config",
        "config",
        "recipe",
        "named_functions",
        "shown_urls",
        "store",
        "flushing",
    ),
    "mathematics": (
        "geometric",
        "statistics",
        "detectors",
        "spikes",
        "guard_signals",
        "objective",
        "advantages",
        "kernels",
    ),
    "stages": (
        "tasks",
        "rewards",
        "grading",
        "policy",
        "sampler",
        "rollouts",
        "rollout_functions",
        "batch",
        "update",
        "checkpoint",
        "saved_rounds",
        "schedules",
        "guard",
        "memory",
        "sampling_memory",
        "host_memory",
        "tracking",
        "trackers",
        "monitoring",
        "abtest",
        "stored_tensors",
        "model_files",
    ),
    # In order: a joiner may import those before it, never those after it.
    "joiners": (
        "plots",
        "text_tables",
        "stability",
        "outcomes",
        "evaluation",
        "reward_table",
        "task_table",
        "contamination",
        "inputs",
        "forecast",
        "headroom",
        "data_parallel",
        "engine",
        "assembly",
        "decoding",
        "adaptation",
        "pace",
        "outlook",
        "suites",
        "data_checks",
        "feedback",
        "rounds",
        "steps",
        "reporting",
        "resumption",
        "watch",
        "rollback",
        "tracked_attempts",
        "training",
        "trainer_config",
        "trainer_rows",
        "callbacks",
        "trainer",
        "leash",
        "helper_process",
        "own_servers",
        "shared_cores",
        "locks",
        "run_process",
        "study",
        "tuning",
        "generation",
        "export",
        "inspection",
        "run_tables",
        "run_conditions",
        "store_conditions",
        "alert_book",
        "monitored",
        "terminal",
        "abtest_report",
        "gate",
        "safety",
        "registry",
        "fleet",
        "safety_runs",
        "live_shadow",
        "continual",
        "federated",
        "serving",
        "dashboard",
        "environment",
        "cli",
    ),
    # Last, so that nothing imports them: whoever has neither TRL nor verl never meets them.
    "adapters": ("adapters",),
}

# Other trainers; only the adapters may import them.
OTHER_TRAINERS = ("trl", "verl")

# (importer, imported): the reason. A name is a stage or one module of a stage.
ALLOWED: dict[tuple[str, str], str] = {
    ("rewards", "grading"): "the `correct` reward is a graded answer",
    ("rewards.classifier", "policy.hub"): "a reward model is named as a policy is",
    ("tasks.rows", "grading.answers"): "a solution's answer is found as a completion's is",
    ("tasks.gym", "grading.gym"): "items are made by the process that will score their answers",
    ("rollouts", "sampler"): "rollouts are the completions of sample requests",
    ("rollout_functions", "rollouts"): "the user's rollouts stand in for the usual ones",
    ("rollout_functions", "sampler"): "they ask the same sampler",
    ("update", "batch"): "an update consumes micro-batches",
    ("sampling_memory", "memory"): "sizes of the model",
    ("update", "host_memory"): "the optimizer has the process keep what each step frees",
    ("update", "schedules"): "an optimizer step asks for its step size",
    ("update", "policy.score"): "the gradient is that of what the policy scores",
    ("saved_rounds", "rewards"): "what is saved of a round are its rewarded rollouts",
    ("checkpoint", "policy.score"): "a checkpoint holds the policy's named weights",
    ("checkpoint", "policy.adapter_files"): "a LoRA checkpoint holds the adapters as PEFT's files",
    ("policy.score", "batch"): "scoring reads a micro-batch's tensors",
    ("policy.packed", "batch"): "the shared prefix is laid out in the micro-batch",
    ("policy.agreement", "batch"): "the training pass is checked on a small micro-batch",
    ("sampler.agreement", "policy"): "decoding is checked as the policy's other passes are",
    ("sampler.decoders", "policy.head"): "logits are widened alike before they are drawn from",
    ("sampler.cache", "policy.head"): "keys and values are widened as logits are",
    ("sampler.drawing", "policy.head"): "logits are widened a few rows at a time",
    ("sampler.local", "policy.head"): "a token's alternatives come from widened logits",
    ("sampler.decoders", "policy.llama"): "decoding and scoring are one model's arithmetic",
    ("trackers.prometheus", "monitoring.training_metrics"): "monitoring names its figures",
    ("model_files", "stored_tensors"): "a model's folder is read tensor by tensor",
    ("trackers.prometheus", "model_files"): "figures are labelled by the digest of the weights",
    ("sampler.forward", "policy.llama"): "a step runs that body's layers",
    ("sampler.graphed", "policy.llama"): "what is captured is a step of that body",
    ("sampler.prepared", "policy.llama"): "it lays out that body's linear layers for decoding",
    ("sampler.decoders", "policy.weights"): "weights reach a sampler as they reach a policy",
    ("sampler.decoders", "policy.prefix"): "prefill and training share beginnings alike",
    ("sampler.attention", "policy"): "queries and keys are turned and normed as that body does",
    ("sampler.prefilling", "policy"): "it runs that body's layers where `prefix` would",
}

# (layer, earlier layer): what alone it may know of that. Mathematics takes tensors, arrays and
# floats. An adapter gives the objective to a trainer that has records, policies and a loop itself.
KNOWS_ONLY: dict[tuple[str, str], tuple[str, ...]] = {
    ("mathematics", "ground"): ("errors",),
    ("adapters", "ground"): ("errors",),
    ("adapters", "mathematics"): ("objective",),
    ("adapters", "stages"): (),
    ("adapters", "joiners"): (),
}

# Importing these, in a fresh interpreter, leaves torch unloaded. `.*`: a package with its modules.
TORCH_FREE = (
    "gmpo",
    "gmpo.errors",
    "gmpo.records",
    "gmpo.config",
    "gmpo.recipe",
    "gmpo.named_functions",
    "gmpo.store",
    "gmpo.continual.*",
    "gmpo.federated",
    "gmpo.federated.report",
    "gmpo.environment",
    "gmpo.geometric",
    "gmpo.statistics",
    "gmpo.detectors",
    "gmpo.spikes",
    "gmpo.guard",
    "gmpo.gate.*",
    "gmpo.stored_tensors",
    "gmpo.model_files",
    "gmpo.safety",
    "gmpo.fleet",
    "gmpo.registry",
    "gmpo.registry.mirror",
    "gmpo.abtest.analysis",
    "gmpo.abtest.assignment",
    "gmpo.tasks",
    "gmpo.grading",
    "gmpo.rewards",
    "gmpo.plots",
    "gmpo.text_tables",
    "gmpo.stability",
    "gmpo.suites",
    "gmpo.suites.scores",
    "gmpo.suites.tables",
    "gmpo.suites.plots",
    "gmpo.study.*",
    "gmpo.run_process",
    "gmpo.tuning.*",
    "gmpo.inspection",
    "gmpo.run_tables",
    "gmpo.run_conditions",
    "gmpo.store_conditions",
    "gmpo.alert_book",
    "gmpo.monitored",
    "gmpo.dashboard.*",
    "gmpo.data_checks.pii",
    "gmpo.data_checks.profile",
    "gmpo.data_checks.quality",
    "gmpo.data_checks.files",
    "gmpo.feedback",
    "gmpo.monitoring.*",
    "gmpo.trackers.prometheus",
    "gmpo.serving",
    "gmpo.serving.access",
    "gmpo.serving.admission",
    "gmpo.serving.anomaly_watch",
    "gmpo.serving.answer_record",
    "gmpo.serving.answering",
    "gmpo.serving.app",
    "gmpo.serving.backend",
    "gmpo.serving.bodies",
    "gmpo.serving.breaker",
    "gmpo.serving.calibration",
    "gmpo.serving.engine_answer",
    "gmpo.serving.engine_options",
    "gmpo.serving.entrance",
    "gmpo.serving.event_stream",
    "gmpo.serving.faults",
    "gmpo.serving.feedback",
    "gmpo.serving.figures",
    "gmpo.serving.following",
    "gmpo.serving.judging",
    "gmpo.serving.protocol",
    "gmpo.serving.quality",
    "gmpo.serving.recording",
    "gmpo.serving.responses",
    "gmpo.serving.router",
    "gmpo.serving.routing_config",
    "gmpo.serving.sampling_thread",
    "gmpo.serving.server",
    "gmpo.serving.shadowing",
    "gmpo.serving.splitting",
    "gmpo.serving.text",
    "gmpo.serving.upstream",
    "gmpo.serving.upstream_events",
    "gmpo.serving.verifying",
)


_IMPORTS = (ast.Import, ast.ImportFrom)


def layer_of(stage: str) -> str | None:
    return next((layer for layer, stages in LAYERS.items() if stage in stages), None)


def modules(source: Path) -> Iterator[tuple[str, Path]]:
    """Name without the leading `gmpo.`, and file, of each module; "" is the package itself."""
    for path in sorted((source / "gmpo").rglob("*.py")):
        parts = path.relative_to(source / "gmpo").with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(text: str, *, module: str, is_package: bool) -> set[str]:
    """Modules of gmpo that a module's text imports, at any depth, without the leading `gmpo.`."""
    here = ["gmpo", *filter(None, module.split("."))]
    if not is_package:
        here.pop()
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            target = ".".join([*base, *filter(None, [node.module])])
            if target == "gmpo":
                # `from gmpo import training` is a module; `__version__` belongs to nobody.
                found |= {f"gmpo.{a.name}" for a in node.names if a.name != "__version__"}
            else:
                found.add(target)
    return {name.removeprefix("gmpo.") for name in found if name.startswith("gmpo.")}


def complaints(importer: str, target: str) -> Iterator[str]:
    """What is wrong with one import, if anything."""
    mine, other = importer.partition(".")[0], target.partition(".")[0]
    if mine == other:
        return
    layers = list(LAYERS)
    my_layer, other_layer = layer_of(mine), layer_of(other)
    arrow = f"gmpo.{importer} imports gmpo.{target}"
    if my_layer is None or other_layer is None:
        unknown = mine if my_layer is None else other
        yield f"{arrow}, but {unknown!r} is in no layer; add it to LAYERS in {Path(__file__).name}"
    elif layers.index(other_layer) > layers.index(my_layer):
        yield f"{arrow}: {my_layer} may not know {other_layer}"
    elif (my_layer, other_layer) in KNOWS_ONLY:
        allowed = KNOWS_ONLY[my_layer, other_layer]
        if other not in allowed:
            yield f"{arrow}: of {other_layer}, {my_layer} may know only {allowed}"
    elif my_layer == "joiners" == other_layer:
        joiners = LAYERS["joiners"]
        if joiners.index(other) > joiners.index(mine):
            yield f"{arrow}: a joiner may import only those listed before it"
    elif my_layer == "stages" == other_layer:
        pairs = {(a, b) for a in (importer, mine) for b in (target, other)}
        if not pairs & ALLOWED.keys():
            yield f"{arrow}: stages exchange records; if it must be, add it to ALLOWED and say why"


def test_every_module_is_in_the_table_of_layers():
    stages = {name.partition(".")[0] for name, _ in modules(SOURCE) if name}
    unknown = sorted(stage for stage in stages if layer_of(stage) is None)
    assert not unknown, f"{unknown} are in no layer; add them to LAYERS in tests/repo/test_imports"


def test_the_tables_name_each_module_once_and_none_that_is_gone():
    listed = [stage for stages in LAYERS.values() for stage in stages]
    assert len(listed) == len(set(listed))
    there = {name for name, _ in modules(SOURCE)}
    gone = [name for name in listed if name not in there]
    gone += [name for pair in ALLOWED for name in pair if name not in there]
    assert not gone, f"{gone} are in a table of {Path(__file__).name} and nowhere else"


def test_imports_run_one_way():
    wrong = [
        complaint
        for name, path in modules(SOURCE)
        if name
        for target in sorted(
            imported(path.read_text(), module=name, is_package=path.name == "__init__.py")
        )
        for complaint in complaints(name, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_of_a_package_do_not_import_in_a_circle():
    package: dict[str, set[str]] = {}
    for name, path in modules(SOURCE):
        # What a function imports when it is called may lead back.
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, _IMPORTS)]
        found = imported(
            ast.unparse(ast.Module(body=list(top), type_ignores=[])),
            module=name,
            is_package=path.name == "__init__.py",
        )
        family = name.partition(".")[0]
        package[name] = {t for t in found - {name} if t.partition(".")[0] == family}
    try:
        TopologicalSorter(package).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("objective.gmpo", "from gmpo.config import RunConfig"),
        ("objective.gmpo", "from ..records import Group"),
        ("advantages", "from gmpo import training"),
        ("tasks.jsonl", "import gmpo.rollouts"),
        ("sampler", "def late():\n    from gmpo.policy.load import load_policy"),
        ("training", "from gmpo.cli import main"),
        ("records", "from gmpo.objective import gmpo_loss"),
        ("surprise", "from gmpo.records import Group"),
        ("training", "import gmpo.surprise"),
        ("adapters.trl", "from gmpo.policy.score import Policy"),
        ("cli", "from gmpo.adapters.trl import TRLGMPOTrainer"),
    ],
)
def test_a_wrong_import_is_found(module: str, text: str):
    targets = imported(text, module=module, is_package=False)
    assert [c for target in targets for c in complaints(module, target)]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("objective.gmpo", "from .ratio import token_mean\nfrom gmpo.errors import DataError"),
        ("rewards", "from gmpo.grading import grade"),
        ("policy.score", "from gmpo.batch import MicroBatch"),
        ("cli", "from gmpo.training import train\nfrom gmpo import __version__"),
        ("update", "from gmpo.objective import OBJECTIVES\nimport torch"),
    ],
)
def test_a_right_import_passes(module: str, text: str):
    targets = imported(text, module=module, is_package=False)
    assert not [c for target in targets for c in complaints(module, target)]


def test_only_the_adapters_import_other_trainers():
    guilty = [
        f"gmpo.{name} imports {found}"
        for name, path in modules(SOURCE)
        if name.partition(".")[0] != "adapters"
        for found in foreign(path.read_text())
        if found in OTHER_TRAINERS
    ]
    assert not guilty, "\n".join(guilty)
    assert foreign("import os, trl.trainer\nfrom verl import DataProto") == {"os", "trl", "verl"}


def foreign(text: str) -> set[str]:
    """Top-level packages that a module's text imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def torch_free() -> Iterator[str]:
    """The names of `TORCH_FREE`, packages written out."""
    there = sorted(f"gmpo.{name}" for name, _ in modules(SOURCE) if name)
    for name in TORCH_FREE:
        package = name.removesuffix(".*")
        yield package
        if package != name:
            yield from (module for module in there if module.startswith(f"{package}."))


def test_the_torch_free_modules_do_not_load_torch():
    # One interpreter for all: the first module after which torch is there is the one that took it.
    program = (
        "import importlib, json, sys\n"
        "guilty = None\n"
        f"for name in {tuple(torch_free())!r}:\n"
        "    importlib.import_module(name)\n"
        "    if guilty is None and 'torch' in sys.modules:\n"
        "        guilty = name\n"
        "print(json.dumps(guilty))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    guilty = json.loads(done.stdout)
    assert guilty is None, f"importing {guilty} loads torch; it must not"
