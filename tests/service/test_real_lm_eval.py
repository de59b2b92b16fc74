"""lm-eval's own command, in an environment of its own, against the policy's own scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gateways import running_gateway, tiny_backend
from tests.models import character_tokenizer, save_tiny, tiny_model

pytestmark = pytest.mark.verify
ROOT = Path(__file__).parents[2]
LM_EVAL = "lm-eval[api]==0.4.13"
ITEMS = [
    {"question": "12+3=", "choices": ["15", "14", "3"], "label": 0},
    {"question": "what is red", "choices": [" blue", " green", " red"], "label": 2},
    {"question": "7+9=", "choices": ["6", "16"], "label": 1},
]
KINDS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["Q:"], "max_gen_toks": 6, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def task(kind: str, items: Path) -> str:
    """A task of lm-eval over the items; JSON is YAML."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(items)}}
    asked = {"test_split": "train", "doc_to_text": "{{question}}"}
    return json.dumps({"task": kind, **data, **asked, **KINDS[kind]})


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm-eval")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pinned = ["-c", str(ROOT / "constraints.txt"), LM_EVAL, "transformers"]
    subprocess.run([str(folder / "bin/pip"), "install", "-q", *pinned], check=True)
    return folder / "bin/lm_eval"


def scored(context: str, ending: str) -> tuple[float, bool]:
    """Log-likelihood of the ending, and whether greedy decoding says it, from one forward."""
    tokenizer = character_tokenizer()
    token_ids = tokenizer(context + ending)["input_ids"]
    first = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logprobs = tiny_model()(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
    places = range(first, len(token_ids))
    total = sum(logprobs[place - 1, token_ids[place]].item() for place in places)
    return total, all(int(logprobs[p - 1].argmax()) == token_ids[p] for p in places)


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval wrote of each item, in their order."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("as_tokens", [True, False])
def test_lm_eval_finds_what_the_policy_itself_says(command: Path, tmp_path: Path, as_tokens: bool):
    items, model, out = tmp_path / "items.jsonl", tmp_path / "tiny", tmp_path / "out"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for kind in KINDS:
        (tmp_path / f"{kind}.yaml").write_text(task(kind, items))
    folder = save_tiny(model)
    with running_gateway(lambda: tiny_backend(folder)) as gateway:
        asked = {
            "base_url": f"{gateway.url}/v1/completions",
            "model": "tiny",
            "tokenizer": folder,
            "tokenizer_backend": "huggingface",
            "tokenized_requests": as_tokens,
        }
        arguments = ",".join(f"{name}={value}" for name, value in asked.items())
        done = subprocess.run(
            [
                *(str(command), "run", "--model", "local-completions", "--model_args", arguments),
                *("--tasks", ",".join(KINDS), "--include_path", str(tmp_path)),
                *("--output_path", str(out), "--log_samples"),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        with gateway.client() as client:
            body = {"model": "tiny", "max_tokens": 6, "temperature": 0, "stop": ["Q:"]}
            texts = [
                client.post("/v1/completions", json={**body, "prompt": item["question"]})
                .json()["choices"][0]["text"]
                for item in ITEMS
            ]  # fmt: skip
    for item, sample in zip(ITEMS, samples(out, "choices"), strict=True):
        found = [(float(total), is_greedy == "True") for ((total, is_greedy),) in sample["resps"]]
        expected = [scored(item["question"], ending) for ending in item["choices"]]
        assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        best = max(range(len(expected)), key=lambda place: expected[place][0])
        assert sample["acc"] == float(best == item["label"])
    assert [sample["resps"][0][0] for sample in samples(out, "written")] == texts
    assert all(texts)
