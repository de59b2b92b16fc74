"""Updates screened, weighed and put together, with coefficients computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tests.federated_updates import facts_of, update_of, updates_of

from gmpo.errors import ConfigError, FederationError, ModelError, TooFewUpdates
from gmpo.federated import (
    AggregationSettings,
    aggregate,
    read_update,
    screen,
    write_aggregate,
    write_update,
)
from gmpo.federated.updates import ClientUpdate
from gmpo.model_files import weights_version
from gmpo.recipe import settings_of


def settings(**changes: Any) -> AggregationSettings:
    return settings_of(AggregationSettings, changes, of="aggregation")


def left_out(updates: Sequence[ClientUpdate], **changes: Any) -> dict[str, str]:
    found = screen(updates, settings(**changes)).left_out
    return {updates[place].client: why for place, why in found.items()}


def model_folder(folder: Path, weights: dict[str, list[float]], **config: Any) -> Path:
    folder.mkdir()
    save_file(
        {name: np.array(value, dtype=np.float32) for name, value in weights.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_mean_is_by_sequences_or_of_equals(tmp_path: Path):
    updates = [
        update_of(tmp_path, "north", [1.0, 0.0], sequences=30),
        update_of(tmp_path, "south", [1.0, 1.0], sequences=10),
    ]
    made = aggregate(updates, settings())
    assert made.weights.tolist() == [0.75, 0.25]
    assert made.norm == pytest.approx(math.hypot(1.0, 0.25))
    assert [share.norm for share in made.shares] == pytest.approx([1.0, math.sqrt(2)])
    assert aggregate(updates, settings(weigh_by="equal")).weights.tolist() == [0.5, 0.5]
    halved = aggregate(updates, settings(step_size=0.5))
    assert halved.norm == pytest.approx(made.norm / 2)


def test_scores_weigh_by_their_geometric_product_and_a_zero_vetoes(tmp_path: Path):
    updates = updates_of(tmp_path, [[1.0], [1.0], [1.0]], sequences=10)
    accuracies = {"a": 0.9, "b": 0.4, "c": 0.0}
    made = aggregate(updates, settings(score_exponents={"accuracy": 0.5}), accuracies=accuracies)
    # sqrt 0.9 : sqrt 0.4 = 1.5 : 1
    assert made.weights == pytest.approx([0.6, 0.4, 0.0])
    assert made.left_out == {"c": "its accuracy is 0"}
    with pytest.raises(FederationError, match="that of b was not measured"):
        aggregate(updates, settings(score_exponents={"accuracy": 1.0}), accuracies={"a": 0.9})


def test_agreement_is_the_cosine_with_the_median(tmp_path: Path):
    updates = updates_of(tmp_path, [[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    made = aggregate(updates, settings(score_exponents={"agreement": 2.0}))
    # The median is the one that two sent; the third has a cosine of 0.6 with it, squared 0.36.
    assert made.weights == pytest.approx([1 / 2.36, 1 / 2.36, 0.36 / 2.36], abs=1e-4)
    assert made.shares[2].scores["agreement"] == pytest.approx(0.6, abs=1e-4)


def test_what_is_not_finite_too_long_or_turned_round_is_left_out_with_the_reason(tmp_path: Path):
    rows = [[1.0, 0.1], [1.0, -0.1], [1.1, 0.0], [math.nan, 0.0], [9.0, 0.0], [-1.0, 0.0]]
    updates = updates_of(tmp_path, rows)
    found = left_out(updates)
    assert sorted(found) == ["d", "e", "f"]
    assert found["d"] == "a value is NaN or infinite"
    # lengths of the five finite ones: 1, 1, 1.1, 9, 1 to a few thousandths, and their median 1.005
    assert found["e"] == "its length is 8.96 times the median, beyond largest_norm 3"
    assert found["f"] == "its cosine with the geometric median is -1.000, below least_cosine 0"
    assert sorted(left_out(updates, largest_norm=10.0, least_cosine=-1.0)) == ["d"]
    made = aggregate(updates, settings(min_clients=3))
    assert made.weights == pytest.approx([1 / 3] * 3 + [0.0] * 3)
    assert [share.norm for share in made.shares][3] is None
    json.dumps(made.as_dict(), allow_nan=False)


def test_of_two_no_limit_says_which_is_off(tmp_path: Path):
    assert left_out(updates_of(tmp_path, [[1.0, 0.0], [50.0, 1.0]]), largest_norm=1.5) == {}
    assert left_out(updates_of(tmp_path, [[1.0, 0.0], [-2.0, 0.0]])) == {}
    assert left_out(updates_of(tmp_path, [[1.0, 0.0], [-2.0, 0.0], [math.nan, 0.0]])).keys() == {
        "c"
    }


def test_one_of_any_length_cannot_have_the_others_left_out(tmp_path: Path):
    generator = np.random.default_rng(0)
    rows = [[1.0, *generator.normal(size=3) * 0.1] for _ in range(4)]
    updates = updates_of(tmp_path, [*rows, [-1e15, 0.0, 0.0, 0.0]])
    assert left_out(updates).keys() == {"e"}


def test_updates_whose_header_lies_about_their_base_are_refused(tmp_path: Path):
    base = model_folder(tmp_path / "base", {"w": [1.0, 2.0], "v": [0.5]})
    version = weights_version(base)
    for values in ({"w": [1.0, 2.0]}, {"w": [1.0], "v": [0.5]}, {"w": [[1.0, 2.0]], "v": [0.5]}):
        updates = [update_of(tmp_path, "a", values, base=version)]
        made = aggregate(updates, settings())
        with pytest.raises(FederationError, match="of different models"):
            write_aggregate(
                tmp_path / "next", base=base, updates=updates, aggregation=made, origin={}
            )


def test_too_few_are_refused_with_every_reason(tmp_path: Path):
    updates = updates_of(tmp_path, [[1.0], [math.inf], [math.nan]])
    said = "1 of 3 clients are left, and 2 are needed; b: a value is NaN or infinite; c: a value"
    with pytest.raises(TooFewUpdates, match=said):
        aggregate(updates, settings())
    assert aggregate(updates, settings(min_clients=1)).weights.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(TooFewUpdates, match="2 of 4 clients are left, 2 sent nothing, and 3 are"):
        aggregate(updates_of(tmp_path, [[1.0], [1.0]]), settings(), num_clients=4)
    with pytest.raises(TooFewUpdates, match="a: it trained on no sequence"):
        aggregate(updates_of(tmp_path, [[1.0], [1.0]], sequences=0), settings())


def test_the_geometric_median_is_of_those_that_are_left(tmp_path: Path):
    updates = updates_of(tmp_path, [[0.0, 1.0], [0.0, 2.0], [0.0, 2.6], [math.nan, 0.0]])
    made = aggregate(updates, settings(rule="geometric_median"))
    assert made.weights @ [1.0, 2.0, 2.6, 0.0] == pytest.approx(2.0, abs=1e-4)
    assert made.weights[3] == 0.0


def test_updates_of_other_models_or_of_one_client_twice_are_refused(tmp_path: Path):
    one = update_of(tmp_path, "one", [1.0])
    other = update_of(tmp_path, "other", [1.0], base="f" * 16)
    with pytest.raises(FederationError, match=r"other began with version f{16} and one with 0123"):
        screen([one, other], settings())
    longer = update_of(tmp_path, "longer", [1.0, 2.0])
    with pytest.raises(FederationError, match=r"1 tensors differ in name or shape, e\.g\. 'w'"):
        screen([one, longer], settings())
    with pytest.raises(FederationError, match="one sent more than one update"):
        screen([one, one], settings())
    with pytest.raises(FederationError, match="there are 0 updates"):
        screen([], settings())
    with pytest.raises(FederationError, match="there are 257 updates"):
        screen([one] * 257, settings())


def test_the_next_model_is_the_base_and_the_weighted_updates(tmp_path: Path):
    base = model_folder(tmp_path / "base", {"w": [1.0, 2.0], "v": [0.5]})
    trained = [
        model_folder(tmp_path / "north", {"w": [2.0, 2.0], "v": [0.5]}),
        model_folder(tmp_path / "south", {"w": [1.0, 6.0], "v": [0.25]}),
    ]
    updates = [
        write_update(tmp_path / f"{n}.update", client=f"c{n}", base=base, model=model, sequences=n)
        for n, model in enumerate(trained, start=1)
    ]
    assert load_file(updates[1].file)["w"].tolist() == [0.0, 4.0]
    made = aggregate(updates, settings(step_size=0.5))
    version = write_aggregate(
        tmp_path / "next", base=base, updates=updates, aggregation=made, origin={"round": 1}
    )
    found = load_file(tmp_path / "next" / "model.safetensors")
    # 0.5 x (1/3 d_1 + 2/3 d_2): w moves by (1/6, 4/3), v by -1/12
    assert found["w"] == pytest.approx([1 + 1 / 6, 2 + 4 / 3])
    assert found["v"] == pytest.approx([0.5 - 1 / 12])
    assert version == weights_version(tmp_path / "next") != weights_version(base)
    assert json.loads((tmp_path / "next" / "config.json").read_text()) == {"dtype": "float32"}
    assert (tmp_path / "next" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "next" / "gmpo.json").read_text()) == {"round": 1}
    with pytest.raises(FederationError, match="not overwritten"):
        write_aggregate(tmp_path / "next", base=base, updates=updates, aggregation=made, origin={})
    with pytest.raises(FederationError, match="name the folder of the model that the clients"):
        write_aggregate(
            tmp_path / "more", base=trained[0], updates=updates, aggregation=made, origin={}
        )


def test_an_update_left_out_for_nan_leaves_no_nan(tmp_path: Path):
    base = model_folder(tmp_path / "base", {"w": [1.0, 2.0]})
    version = weights_version(base)
    rows = {"a": [1.0, 0.0], "b": [1.0, 0.0], "c": [math.nan, 0.0]}
    updates = [update_of(tmp_path, name, row, base=version) for name, row in rows.items()]
    made = aggregate(updates, settings())
    write_aggregate(tmp_path / "next", base=base, updates=updates, aggregation=made, origin={})
    assert load_file(tmp_path / "next" / "model.safetensors")["w"].tolist() == [2.0, 2.0]


def test_a_model_of_another_shape_or_an_adapter_has_no_update(tmp_path: Path):
    base = model_folder(tmp_path / "base", {"w": [1.0, 2.0]})
    other = model_folder(tmp_path / "other", {"w": [1.0]})
    with pytest.raises(FederationError, match="different models"):
        write_update(tmp_path / "u", client="c", base=base, model=other, sequences=1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FederationError, match="is an adapter"):
        write_update(tmp_path / "u", client="c", base=base, model=adapter, sequences=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        write_update(tmp_path / "u", client="c", base=base, model=tmp_path / "empty", sequences=1)
    assert not (tmp_path / "u").exists()


def damaged(**changes: object) -> str:
    """An update's account of itself, with other values."""
    return json.dumps(facts_of("c") | changes)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (None, "is no client's update"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"format": 2}', "is an update of format 2; this version reads 1"),
        ('{"format": 1}', "damaged"),
        ("[]", "damaged"),
        (damaged(sequences=-1), "from 0 to"),
        (damaged(sequences=10**400), "from 0 to"),
        (damaged(sequences=True), "from 0 to"),
        (damaged(sequences=math.inf), "from 0 to"),
        (damaged(client="../c"), "no client's name"),
        (damaged(client="\x1b[2Jc"), "no client's name"),
        (damaged(client=3), "damaged"),
        (damaged(base="x"), "base is 'x', which is no version"),
    ],
)
def test_a_file_that_is_no_update_is_refused(facts: str | None, said: str, tmp_path: Path):
    metadata = {} if facts is None else {"gmpo_update": facts}
    save_file({"w": np.zeros(2, dtype=np.float32)}, tmp_path / "u", metadata=metadata)
    with pytest.raises(FederationError, match=said):
        read_update(tmp_path / "u")


def test_an_update_in_another_precision_is_refused(tmp_path: Path):
    metadata = {"gmpo_update": damaged()}
    save_file({"w": np.zeros(2, dtype=np.float64)}, tmp_path / "u", metadata=metadata)
    with pytest.raises(FederationError, match="must be F32"):
        read_update(tmp_path / "u")


def test_a_starting_model_in_bf16_and_in_shards_is_the_same_one(tmp_path: Path):
    base = model_folder(tmp_path / "base", {"w": [1.0, 2.0], "v": [0.5]})
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text('{"dtype": "bfloat16"}')
    (shards / "model.safetensors.index.json").write_text("{}")
    for name, values in (("w", [1.0, 2.0]), ("v", [0.5])):
        save_torch(
            {name: torch.tensor(values, dtype=torch.bfloat16)}, shards / f"{name}.safetensors"
        )
    assert weights_version(shards) == weights_version(base)
    trained = model_folder(tmp_path / "trained", {"w": [1.5, 2.0], "v": [0.25]})
    update = write_update(tmp_path / "u", client="c", base=shards, model=trained, sequences=1)
    made = aggregate([update], settings())
    write_aggregate(tmp_path / "next", base=shards, updates=[update], aggregation=made, origin={})
    found = load_file(tmp_path / "next" / "model.safetensors")
    assert (found["w"].tolist(), found["v"].tolist()) == ([1.5, 2.0], [0.25])
    assert not list((tmp_path / "next").glob("*.index.json"))
    assert json.loads((tmp_path / "next" / "config.json").read_text()) == {"dtype": "float32"}


def test_what_a_full_disk_broke_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = model_folder(tmp_path / "base", {"w": [1.0, 2.0]})
    version = weights_version(base)
    updates = [update_of(tmp_path, "a", [1.0, 0.0], base=version)]
    made = aggregate(updates, settings())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gmpo.federated.aggregation.write_tensors", full)
    monkeypatch.setattr("gmpo.federated.updates.write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        write_aggregate(tmp_path / "next", base=base, updates=updates, aggregation=made, origin={})
    with pytest.raises(OSError, match="No space"):
        write_update(tmp_path / "u", client="c", base=base, model=base, sequences=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base"]


def test_settings_outside_their_range_are_refused():
    for table, said in (
        ({"rule": "sum"}, "rule"),
        ({"score_exponents": {"accuracy": 0.0}}, "above 0"),
        ({"score_exponents": {"trust": 1.0}}, "score_exponents"),
        ({"largest_norm": 1.0}, "largest_norm"),
        ({"least_cosin": 0.1}, "least_cosine"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings(**table)
