"""A recipe comes back from its JSON as it was; what it cannot mean is refused, and the step is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoc.errors import UsageError
from octoc.qtensor import PALETTE_BITS, Scheme
from octoc.recipe import (
    CorrectBiases,
    Encode,
    Equalize,
    Factorize,
    FoldBatchNorm,
    Prune,
    QuantizeActivations,
    Recipe,
    Recover,
    read_recipe,
)

names = st.text(max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)
granularities = st.sampled_from([("tensor", 0), ("channel", 0), ("group", 8), ("group", 32)])
schemes = st.one_of(
    st.builds(lambda b, g, s: Scheme("affine", b, *g, s), st.integers(2, 8), granularities, st.booleans()),
    st.builds(lambda b, g, s: Scheme("palette", b, *g, s), st.sampled_from(PALETTE_BITS), granularities, st.booleans()),
    st.builds(lambda s: Scheme("cast", 16, sparse=s), st.booleans()),
)
ranges = st.tuples(st.floats(0, 1e30, exclude_min=True), st.integers(-128, 127))
steps = st.one_of(
    st.builds(Prune, names, st.floats(0, 1, exclude_max=True), names),
    st.builds(Factorize, names, st.integers(1, 2**40), names),
    st.just(FoldBatchNorm()),
    st.builds(Equalize, st.dictionaries(names, st.lists(st.integers(-32, 32)).map(tuple), max_size=3), names),
    st.builds(QuantizeActivations, st.dictionaries(names, ranges, max_size=3), names),
    st.builds(CorrectBiases, st.dictionaries(names, st.lists(floats).map(tuple), max_size=3), names),
    st.builds(
        Recover,
        names,
        st.integers(0, 2**40),
        st.integers(-(2**63), 2**63),
        st.dictionaries(names, st.lists(floats).map(tuple), max_size=3),
    ),
    st.builds(
        Encode, names, schemes.map(str), st.sampled_from(["float16", "float32"]), st.integers(0, 1), st.none() | names
    ),
)
recipes = st.builds(Recipe, names, names, names, st.integers(-(2**63), 2**63), st.lists(steps).map(tuple), names)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.json"


@given(recipe=recipes)
def test_any_recipe_comes_back_from_its_json_and_gives_the_same_bytes(file: Path, recipe: Recipe) -> None:
    file.write_text(recipe.to_json())
    back = read_recipe(file)
    assert back == recipe
    assert [type(step) for step in back.steps] == [type(step) for step in recipe.steps]
    assert back.to_json() == recipe.to_json()


@given(recipe=recipes)
def test_decisions_of_a_kind_keep_their_order(recipe: Recipe) -> None:
    kinds = (Prune, Factorize, FoldBatchNorm, Equalize, QuantizeActivations, CorrectBiases, Recover, Encode)
    assert sum(len(recipe.of(kind)) for kind in kinds) == len(recipe.steps)
    for kind in kinds:
        assert list(recipe.of(kind)) == [step for step in recipe.steps if type(step) is kind]


HEAD: dict[str, Any] = {"octoc": "1", "model": "m", "format": "onnx", "device": "d", "seed": 0}
GOOD: dict[str, dict[str, Any]] = {
    "prune": {"tensor": "w", "sparsity": 0.5},
    "factorize": {"tensor": "w", "rank": 2},
    "fold_batch_norm": {},
    "equalize": {"powers": {"conv2d": [1, 2]}},
    "quantize_activations": {"ranges": {"x": [0.5, 3]}},
    "correct_biases": {"shifts": {"b": [0.5, 1]}},
    "recover": {"method": "distill", "steps": 2, "seed": 0, "vectors": {"b": [0.5, 1]}},
    "encode": {"tensor": "w", "scheme": "int8-channel", "dtype": "float32", "axis": 0},
}


def read(file: Path, *steps: Any, **head: Any) -> Recipe:
    file.write_text(json.dumps({**HEAD, **head, "steps": list(steps)}))
    return read_recipe(file)


def test_the_smallest_form_of_each_step_is_read(file: Path) -> None:
    recipe = read(file, *({"step": step, **keys} for step, keys in GOOD.items()))
    assert [step.step for step in recipe.steps] == list(GOOD)


def test_whole_numbers_stand_for_floats(file: Path) -> None:
    recipe = read(
        file,
        {"step": "prune", "tensor": "w", "sparsity": 0},
        {"step": "quantize_activations", "ranges": {"x": [2, 0]}},
    )
    assert recipe.steps == (Prune("w", 0.0), QuantizeActivations({"x": (2.0, 0)}))


@pytest.mark.parametrize("step", GOOD)
def test_an_unknown_key_is_refused_and_its_step_named(file: Path, step: str) -> None:
    with pytest.raises(UsageError, match=rf"step 2 \({step}\).*colour"):
        read(file, {"step": "fold_batch_norm"}, {"step": step, **GOOD[step], "colour": 1})


@pytest.mark.parametrize(("step", "key"), [(step, key) for step, keys in GOOD.items() for key in keys])
def test_a_missing_key_is_refused_and_named(file: Path, step: str, key: str) -> None:
    with pytest.raises(UsageError, match=rf"step 1 \({step}\).*{key}"):
        read(file, {"step": step, **{k: v for k, v in GOOD[step].items() if k != key}})


# Every JSON value that is wrong for the key, in the text that JSON has for it: some have no form in Python.
WRONG: dict[tuple[str, str], list[str]] = {
    ("prune", "tensor"): ["1", "null", "[]", "true"],
    ("prune", "sparsity"): ['"a"', "null", "true", "1", "1.0", "-0.1", "NaN", "Infinity", "1" + "0" * 400],
    ("prune", "method"): ["1", "null"],
    ("factorize", "rank"): ["0", "-1", "1.5", "true", '"1"', "NaN"],
    ("equalize", "powers"): ["[]", "1", '{"a": 1}', '{"a": [1.0]}', '{"a": [true]}', '{"a": [33]}', '{"a": [null]}'],
    ("quantize_activations", "ranges"): [
        "[]",
        '{"a": 1}',
        '{"a": [1]}',
        '{"a": [0, 0]}',
        '{"a": [-1.0, 0]}',
        '{"a": [1.0, 128]}',
        '{"a": [1.0, -129]}',
        '{"a": [1.0, 0.5]}',
        '{"a": [1.0, 0, 0]}',
        '{"a": [NaN, 0]}',
        '{"a": [Infinity, 0]}',
        '{"a": [true, 0]}',
        '{"a": [1.0, true]}',
        '{"a": [1' + "0" * 400 + ", 0]}",
    ],
    ("correct_biases", "shifts"): [
        "[]",
        '{"a": 1.0}',
        '{"a": [NaN]}',
        '{"a": [true]}',
        '{"a": ["1"]}',
        '{"a": [1e999]}',
        '{"a": [1' + "0" * 400 + "]}",
    ],
    ("recover", "method"): ["1", "null"],
    ("recover", "steps"): ["-1", "1.5", "true", '"1"'],
    ("recover", "seed"): ["1.5", "null", "true"],
    ("recover", "vectors"): ["[]", '{"a": 1.0}', '{"a": [NaN]}', '{"a": ["1"]}'],
    ("encode", "scheme"): ['"int9-channel"', '"int8"', '""', "8", '"palette5-tensor"'],
    ("encode", "dtype"): ['"float64"', "16"],
    ("encode", "axis"): ["2", "-1", "false", "0.0"],
}


@pytest.mark.parametrize(("step", "key", "text"), [(*place, text) for place, texts in WRONG.items() for text in texts])
def test_a_wrong_value_is_refused_and_its_step_named(file: Path, step: str, key: str, text: str) -> None:
    entry = json.dumps({"step": step, **GOOD[step], key: "@"}).replace('"@"', text)
    file.write_text(json.dumps({**HEAD, "steps": ["@"]}).replace('"@"', entry))
    with pytest.raises(UsageError, match=rf"step 1 \({step}\)"):
        read_recipe(file)


@pytest.mark.parametrize("step", [{"step": "paint"}, {"step": ["prune"]}, {"step": None}, {}, [], 1, None, "prune"])
def test_an_unknown_step_is_refused_with_its_number_and_the_steps_that_exist(file: Path, step: Any) -> None:
    with pytest.raises(UsageError, match=r"step 2.*prune, factorize"):
        read(file, {"step": "fold_batch_norm"}, step)


@pytest.mark.parametrize("key", [*HEAD, "steps"])
def test_a_recipe_without_one_of_its_keys_is_refused(file: Path, key: str) -> None:
    file.write_text(json.dumps({k: v for k, v in {**HEAD, "steps": []}.items() if k != key}))
    with pytest.raises(UsageError, match=key):
        read_recipe(file)


@pytest.mark.parametrize(
    "head",
    [
        {"colour": 1},
        {"seed": 1.5},
        {"seed": "0"},
        {"seed": True},
        {"octoc": 1},
        {"model": None},
        {"format": []},
        {"device": {}},
    ],
)
def test_a_head_of_other_keys_or_types_is_refused(file: Path, head: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"recipe\.json"):
        read(file, **head)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"[" * 100_000, b'{"steps": 1' + b"0" * 5000 + b"}", b'{"steps": {}}'],
    ids=["empty", "cut", "no text", "list", "null", "deep", "long number", "table"],
)
def test_a_file_that_holds_no_recipe_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.json"):
        read_recipe(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json"):
        read_recipe(tmp_path / "absent.json")
