"""Models and tokenizers by name: what loads, what is refused and how it is said."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.models import character_tokenizer, save_tiny, tiny_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from gmpo.errors import ModelError
from gmpo.policy import hub
from gmpo.policy.agreement import extended_difference, scored_difference
from gmpo.policy.load import (
    choose_device,
    choose_dtype,
    end_token_ids,
    given_model,
    known_models,
    load_model,
    load_policy,
    load_tokenizer,
    model_folder,
    model_version,
    restore_stored_digits,
)
from gmpo.policy.score import Policy
from gmpo.sampler.agreement import decoded_difference
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import SampleRequest, complete

CPU = torch.device("cpu")


def load(name: str) -> Policy:
    return load_policy(name, device="cpu", dtype="fp32", warn=lambda _: None)


def test_a_folder_loads_with_its_weights_and_tokenizer(tmp_path: Path):
    folder = save_tiny(tmp_path / "model", seed=3)
    policy = load(folder)
    expected = dict(tiny_model(seed=3).named_parameters())
    assert (policy.device, policy.dtype, policy.shares_prompts) == (CPU, torch.float32, True)
    for name, weight in policy.named_weights():
        assert torch.equal(weight, expected[name]), name
    tokenizer = load_tokenizer(folder)
    assert tokenizer("12+3")["input_ids"] == character_tokenizer()("12+3")["input_ids"]
    assert tokenizer.chat_template == character_tokenizer().chat_template


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)],
)
def test_the_asked_precision_is_taken(tmp_path: Path, dtype: str, expected: torch.dtype):
    model = load_model(save_tiny(tmp_path / "model"), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-folder/"])
def test_an_unknown_name_is_refused_with_the_ways_to_name_a_model(name: str):
    message = rf"cannot load model '{name}': .*give 'smollm2-135m', the name of a model in"
    with pytest.raises(ModelError, match=message):
        load(name)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"cannot load model .* a folder with config.json"):
        load(str(tmp_path))


def test_encoder_decoders_are_refused(tmp_path: Path):
    # BART would load as its decoder alone, with an untrained embedding; T5 has no such class.
    bart = BartConfig(
        vocab_size=50,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
    )
    t5 = T5Config(vocab_size=50, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    BartForConditionalGeneration(bart).save_pretrained(tmp_path / "bart")
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name in ("bart", "t5"):
        with pytest.raises(ModelError, match=f"{name}' is an encoder-decoder; a decoder-only"):
            load(str(tmp_path / name))


def test_missing_weights_are_refused_by_name_instead_of_random(tmp_path: Path):
    folder = save_tiny(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, e.g. \['model.layers.1.mlp.up_proj"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"eos_token_id": 1', "JSONDecodeError: Expecting"),
        (b"[]", "TypeError: "),
        (b'{"eos_token_id": "\xff"}', "UnicodeDecodeError: "),
        (b'{"eos_token_id": "<end>"}', "its eos_token_id is '<end>', no token id or list"),
        (b'{"eos_token_id": [1, null]}', r"its eos_token_id is \[1, None\], no token id or list"),
        (b'{"max_new_tokens": 0}', "ValueError: `max_new_tokens` must be greater than 0"),
    ],
)
def test_damaged_generation_settings_are_refused_and_not_taken_for_absent(
    content: bytes, said: str, tmp_path: Path
):
    folder = Path(save_tiny(tmp_path / "model"))
    path = folder / "generation_config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{path} is damaged \({said}.*bring the file back"):
        load(str(folder))
    path.unlink()
    load(str(folder))


def test_a_damaged_weight_file_is_refused(tmp_path: Path):
    folder = save_tiny(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ModelError, match="cannot load model"):
        load(folder)


def test_a_missing_tokenizer_is_refused_with_the_remedy(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot load a tokenizer .* tokenizer.save_pretrained"):
        load_tokenizer(str(tmp_path / "model"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is available here")
def test_an_unavailable_device_is_refused_with_the_usable_ones(tmp_path: Path):
    with pytest.raises(ModelError, match=r"device 'cuda' is not available here; usable: \[.*'cpu'"):
        choose_device("cuda")
    with pytest.raises(ModelError, match="device 'cuda' is not available here"):
        load_model(save_tiny(tmp_path / "model"), device="cuda", dtype="fp32")


def test_the_asked_device_is_taken_and_auto_always_finds_one():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cuda", "mps", "cpu")


def test_an_asked_precision_is_not_measured_and_auto_takes_one_of_two():
    assert choose_dtype("fp64", device=CPU) == "fp64"
    assert choose_dtype("auto", device=CPU) in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "expected"),
    [
        (1, 1, (1,)),
        (7, 1, (1, 7)),
        ([9, 7], 1, (1, 7, 9)),
        (None, 4, (4,)),
        (3, None, (3,)),
        (None, None, ()),
    ],
)
def test_end_tokens_are_those_of_the_model_and_of_the_tokenizer(of_model, of_tokenizer, expected):
    model, tokenizer = tiny_model(), character_tokenizer()
    model.generation_config.eos_token_id = of_model
    tokenizer.eos_token = (
        None if of_tokenizer is None else tokenizer.convert_ids_to_tokens(of_tokenizer)
    )
    assert end_token_ids(model, tokenizer) == expected


def test_the_version_is_a_digest_of_the_weights():
    version = model_version(tiny_model())
    assert len(version) == 16 and int(version, 16) >= 0
    assert model_version(tiny_model()) == version
    assert model_version(tiny_model(seed=1)) != version
    nudged = tiny_model()
    with torch.no_grad():
        nudged.model.norm.weight[0] += 1e-6
    assert model_version(nudged) != version


def test_a_saved_model_keeps_its_version(tmp_path: Path):
    assert model_version(load(save_tiny(tmp_path / "model")).model) == model_version(tiny_model())


def test_the_bundled_model_is_listed_whether_or_not_it_is_installed():
    first = known_models()[0]
    assert first.name == "smollm2-135m"
    assert first.state.startswith(("bundled, ", "not installed: "))
    assert json.loads(json.dumps(first.as_dict())) == first.as_dict()


def test_a_folder_and_a_name_in_the_hubs_cache_stand_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert model_folder(str(tmp_path)) == str(tmp_path)
    for name in ("someone/some-model", "gpt2"):
        cached = tmp_path / f"models--{name.replace('/', '--')}"
        (cached / "snapshots" / "abc").mkdir(parents=True)
        (cached / "snapshots" / "abc" / "config.json").write_text("{}")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/some-model", "gpt2"):
        assert model_folder(name) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2-135", "no such folder.* OWNER/NAME; did you mean 'smollm2-135m'"),
        ("smolm2_135m", "no such folder.* OWNER/NAME; did you mean 'smollm2-135m'"),
        ("", "no such folder.* OWNER/NAME; give 'smollm2-135m'"),
        ("a/b/c", "no such folder.* OWNER/NAME"),
        ("/nowhere/model", "no such folder.* OWNER/NAME"),
        ("runs/quickstrat", "HF_HUB_OFFLINE is set.*; did you mean 'runs/quickstart'"),
        ("runs/quickstart/recipe.toml", "it is a file; give the folder 'runs/quickstart'"),
    ],
)
def test_a_name_that_no_model_can_have_is_refused_with_the_nearest_known(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text("")
    with pytest.raises(ModelError, match=f"cannot load model '{name}': .*{said}"):
        model_folder(name)


class Hub:
    """A hub that has one model, or none; it counts what it is asked."""

    def __init__(self, status: int, code: str = "") -> None:
        hub = self
        self.num_asked = 0

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.num_asked += 1
                self.send_response(status)
                self.send_header("x-repo-commit", "a" * 40)
                self.send_header("etag", '"b"')
                if code:
                    self.send_header("x-error-code", code)
                self.send_header("content-length", "2")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes an address the hub, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_HUB_SECONDS", 0.3)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def become(address: str) -> None:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return become


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (200, "", None),
        (404, "EntryNotFound", None),
        (404, "RepoNotFound", "has no such model that is open to you"),
        (403, "GatedRepo", "only to those who accepted its terms"),
        (503, "", "answers: .*503"),
    ],
)
def test_the_hub_is_asked_once_about_a_name_of_its_form(
    status: int, code: str, why: str | None, online: Callable[[str], None]
):
    there = Hub(status, code)
    threading.Thread(target=there.server.serve_forever, daemon=True).start()
    try:
        online(f"http://127.0.0.1:{there.server.server_address[1]}")
        found = hub.why_unknown("someone/some-model")
        assert hub.why_unknown("some-model") is not None
    finally:
        there.server.shutdown()
        there.server.server_close()
    assert there.num_asked == 1, "once, and about the first alone"
    assert found is None if why is None else re.search(why, str(found)), found


def test_a_hub_that_is_not_reached_or_does_not_answer_is_given_up_soon(
    online: Callable[[str], None],
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        online(f"http://127.0.0.1:{port}")
        began = time.perf_counter()
        with pytest.raises(ModelError, match=r"ReadTimeout.*mend the network, or set HF_HUB_OFFL"):
            load("someone/some-model")
    # The port is nobody's any more.
    with pytest.raises(ModelError, match=r"cannot be reached.*ConnectError.*HF_HUB_OFFLINE=1"):
        load_tokenizer("someone/some-model")
    assert time.perf_counter() - began < 3


# --- the bundled 135M model ---


@pytest.fixture(scope="module")
def smollm2() -> tuple[Policy, PreTrainedTokenizerBase, list[str]]:
    try:
        model_folder("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    warnings: list[str] = []
    policy = load_policy("smollm2-135m", device="cpu", dtype="fp32", warn=warnings.append)
    return policy, load_tokenizer("smollm2-135m"), warnings


@pytest.mark.real_model
def test_smollm2_takes_the_fast_path_with_its_modules_logits(smollm2):
    policy, _, warnings = smollm2
    assert policy.shares_prompts
    assert warnings == []
    assert sum(weight.numel() for _, weight in policy.named_weights()) == 134_515_008
    assert extended_difference(policy.body) < 1e-4
    assert scored_difference(policy.body) < 1e-4
    assert decoded_difference(policy.body) < 1e-4


@pytest.mark.real_model
def test_smollm2s_weights_are_the_ones_every_experiment_used(smollm2):
    policy, tokenizer, _ = smollm2
    assert model_version(policy.model) == "785e20b3e653276b"
    assert end_token_ids(policy.model, tokenizer) == (2,)


@pytest.mark.real_model
def test_smollm2s_greedy_answer_is_stable(smollm2):
    policy, tokenizer, _ = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    token_ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    sampler = LocalSampler(LlamaDecoder(policy.body, max_rows=1), context_length=2048, max_rows=1)
    request = SampleRequest(
        id="greedy",
        token_ids=token_ids,
        max_tokens=16,
        temperature=0.0,
        stop_ids=end_token_ids(policy.model, tokenizer),
    )
    (completion,) = complete(sampler, [request])["greedy"]
    assert tokenizer.decode(completion.token_ids) == "The capital of France is Paris.<|im_end|>"
    assert completion.finish_reason == "stop"


def test_a_model_in_fp16_is_refused():
    with pytest.raises(ModelError, match=r"the model is in torch\.float16; load it in torch\.fl"):
        Policy(tiny_model(dtype=torch.float16))


# PEFT asks transformers by a name that is to go.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_that_peft_wraps_and_what_is_no_model_are_refused():
    base = tiny_model("llama")
    assert given_model(base) is base
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"is a peft\..*PeftModel.*lora\.rank"):
        given_model(wrapped)
    with pytest.raises(ModelError, match=r"is a builtins\.int; give a transformers model"):
        given_model(3)


# Digits that bf16 takes


def stored_weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_masters_of_a_bf16_policy_begin_as_the_weights_are_stored(tmp_path: Path):
    folder = save_tiny(tmp_path)
    stored = stored_weights(folder)
    policy = load_policy(folder, device="cpu", dtype="bf16", warn=lambda _: None)
    assert policy.masters.keys() >= stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(policy.masters[name], tensor), name
        assert torch.equal(policy.model.get_parameter(name), tensor.bfloat16()), name
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in stored.values())


def test_a_step_as_large_as_half_a_rounding_moves_weights_that_are_stored_in_full(tmp_path: Path):
    folder = save_tiny(tmp_path)
    policy = load_policy(folder, device="cpu", dtype="bf16", warn=lambda _: None)
    weight = policy.model.model.layers[0].mlp.up_proj.weight
    master = policy.masters["model.layers.0.mlp.up_proj.weight"]
    before = weight.detach().clone()
    with torch.no_grad():
        master += 0.2 * 2.0**-8 * master.abs()  # a fifth to two fifths of the spacing
    policy.publish_masters()
    moved = (weight != before).float().mean().item()
    # Rounded weights would all stay; of others as many cross to the next as the move is long.
    assert 0.1 < moved < 0.5


def test_a_policy_that_has_moved_keeps_what_it_is(tmp_path: Path):
    folder = save_tiny(tmp_path)
    policy = load_policy(folder, device="cpu", dtype="bf16", warn=lambda _: None)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        policy.masters[name] *= 1.5
    policy.publish_masters()
    moved = policy.masters[name].clone()
    others = len(policy.masters) - 1
    assert policy.restore_masters(stored_weights(folder).items()) == others
    assert torch.equal(policy.masters[name], moved)


def test_a_model_that_is_not_the_stored_one_is_said_to_begin_rounded(tmp_path: Path):
    folder = save_tiny(tmp_path)
    said: list[str] = []
    same = Policy(load_model(folder, device="cpu", dtype="bf16"), engine="fast", warn=said.append)
    restore_stored_digits(same, folder, warn=said.append)
    assert said == []
    other = load_model(folder, device="cpu", dtype="bf16")
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    policy = Policy(other, engine="fast", warn=said.append)
    restore_stored_digits(policy, folder, warn=said.append)
    (sentence,) = said
    assert folder in sentence and "train in fp32" in sentence


def test_a_model_that_is_stored_in_bf16_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    asked: list[str] = []

    def counted(name: str, **options: str) -> object:
        asked.append(options["dtype"])
        return load_model(name, **options)

    monkeypatch.setattr("gmpo.policy.load.load_model", counted)
    load_policy(str(tmp_path), device="cpu", dtype="bf16", warn=lambda _: None)
    assert asked == ["bf16"]
