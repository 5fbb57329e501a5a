"""The conversion engine on a made-up model: both directions, every tensor covered, one report for all problems."""

import re
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from rlawm_jax.weights.rules import (
    SAME,
    ConversionError,
    Rule,
    Table,
    choose_table,
    convert,
    enumerate_tensors,
    linear,
    norm,
    revert,
    split,
)

SHAPES = {
    "blocks.mlp.kernel": (3, 4, 5),
    "blocks.mlp.bias": (3, 5),
    "blocks.query.kernel": (3, 4, 4),
    "blocks.key.kernel": (3, 4, 4),
    "blocks.gain": (3,),
    "robots.panda.kernel": (2, 3),
    "robots.panda.bias": (3,),
    "robots.7.kernel": (6, 3),
    "robots.7.bias": (3,),
    "norm.scale": (4,),
    "norm.bias": (4,),
    "shift": (4,),
}
LEAVES = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
TABLE = Table(
    "made-up",
    (
        *linear("layer.{i}.fc", "blocks.mlp", "[{i}]"),
        Rule("layer.{i}.qk", ("blocks.query.kernel[{i}]", "blocks.key.kernel[{i}]"), split(2, transpose=True)),
        Rule("layer.{i}.gain", ("blocks.gain[{i}]",)),
        *linear("arms.{robot}.in", "robots.{robot}"),
        *norm("norm", "norm"),
        Rule("shift", ("shift",)),
    ),
    ignored={"mask": "pretraining only", "layer.{i}.buffer": "a constant"},
    optional={"shift": "left out where it is zero"},
    constants={"mask": np.zeros(4, np.float32)},
)


def checkpoint() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"arms.panda.in.weight": (3, 2), "arms.panda.in.bias": (3,), "arms.7.in.weight": (3, 6)}
    shapes |= {"arms.7.in.bias": (3,), "norm.weight": (4,), "norm.bias": (4,), "shift": (4,), "mask": (4,)}
    for i in range(3):
        shapes |= {f"layer.{i}.fc.weight": (5, 4), f"layer.{i}.fc.bias": (5,), f"layer.{i}.qk": (8, 4)}
        shapes |= {f"layer.{i}.gain": ()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def lazy(tensors):
    return {name: (lambda t=tensor: t) for name, tensor in tensors.items()}


def report(tensors, table=TABLE) -> list[str]:
    with pytest.raises(ConversionError) as error:
        convert(lazy(tensors), table, LEAVES, "file as model")
    return str(error.value).splitlines()


def test_tensors_land_in_their_slots_transposed_split_and_stacked():
    tensors = checkpoint()
    leaves = convert(lazy(tensors), TABLE, LEAVES, "")
    assert {path: leaf.shape for path, leaf in leaves.items()} == SHAPES
    np.testing.assert_array_equal(leaves["blocks.mlp.kernel"][2], tensors["layer.2.fc.weight"].T)
    np.testing.assert_array_equal(leaves["blocks.key.kernel"][1], tensors["layer.1.qk"][4:].T)
    np.testing.assert_array_equal(leaves["blocks.gain"], [tensors[f"layer.{i}.gain"] for i in range(3)])
    np.testing.assert_array_equal(leaves["robots.7.kernel"], tensors["arms.7.in.weight"].T)


def test_the_same_table_backwards_restores_every_tensor_bit_for_bit():
    tensors = checkpoint()
    restored = dict(revert(convert(lazy(tensors), TABLE, LEAVES, ""), TABLE))
    assert restored.keys() == tensors.keys()
    for name in tensors.keys() - {"mask"}:
        assert restored[name].shape == tensors[name].shape
        assert restored[name].tobytes() == tensors[name].tobytes(), name
    np.testing.assert_array_equal(restored["mask"], 0)


def test_all_problems_are_named_in_one_report():
    tensors = checkpoint()
    for i in range(3):
        del tensors[f"layer.{i}.fc.bias"]
    tensors["layer.0.qk"] = np.zeros((6, 4), np.float32)
    tensors["layer.1.gain"] = np.array(1)
    tensors["layer.2.gain"] = np.array(1.0)
    tensors["norm.weight"] = np.array([1, np.nan, 1, 1], np.float32)
    tensors["norm.bias"] = np.array([1, np.inf, 1, 1], np.float32)
    tensors["layer.3.fc.bias"] = np.zeros(5, np.float32)
    tensors["head.weight"] = np.zeros(5, np.float32)
    header, *lines = report(tensors)
    assert header == "file as model: 10 tensors do not fit (made-up names):"
    assert sorted(line.strip() for line in lines) == [
        "head.weight: unexpected: the target has no such parameter",
        "layer.0.qk: expected shape (8, 4), found (6, 4)",
        "layer.1.gain: expected float32 or a narrower float, found int64",
        "layer.2.gain: expected float32 or a narrower float, found float64",
        "layer.3.fc.bias: unexpected: the target has no such parameter",
        "layer.{0-2}.fc.bias: missing",
        "norm.bias: holds NaN or infinity",
        "norm.weight: holds NaN or infinity",
    ]


def test_runs_of_layers_fold_and_gaps_show():
    tensors = checkpoint()
    del tensors["layer.0.qk"], tensors["layer.2.qk"]
    assert [line.strip() for line in report(tensors)[1:]] == ["layer.{0,2}.qk: missing"]


def test_a_table_that_leaves_a_leaf_out_or_fills_it_twice_is_refused():
    without = Table("short", tuple(rule for rule in TABLE.rules if rule.source != "layer.{i}.gain"))
    with pytest.raises(ValueError, match=r"table short: no rule fills blocks\.gain"):
        enumerate_tensors(without, LEAVES)
    twice = Table("double", (*TABLE.rules, Rule("again.{i}", ("blocks.gain[{i}]",))))
    with pytest.raises(ValueError, match=r"table double: again\.0 and layer\.0\.gain both fill blocks\.gain"):
        enumerate_tensors(twice, LEAVES)


def test_optional_tensors_may_be_absent_and_are_then_zero():
    tensors = checkpoint()
    del tensors["shift"]
    np.testing.assert_array_equal(convert(lazy(tensors), TABLE, LEAVES, "")["shift"], 0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_widen_exactly(dtype):
    tensors = {name: np.asarray(tensor).astype(dtype) for name, tensor in checkpoint().items()}
    leaves = convert(lazy(tensors), TABLE, LEAVES, "")
    assert leaves["shift"].dtype == np.float32
    np.testing.assert_array_equal(leaves["shift"], tensors["shift"].astype(np.float32))


def test_ignored_tensors_are_never_read_and_the_others_once():
    tensors, reads = checkpoint(), []
    source = {name: (lambda n=name: reads.append(n) or tensors[n]) for name in tensors}
    source["layer.1.buffer"] = lambda: pytest.fail("an ignored tensor was read")
    convert(source, TABLE, LEAVES, "")
    assert sorted(reads) == sorted(tensors.keys() - {"mask"})


def test_one_source_tensor_is_in_memory_at_a_time():
    tensors, alive, most = checkpoint(), set(), 0

    def read(name):
        nonlocal most
        copy = np.array(tensors[name])
        alive.add(name)
        weakref.finalize(copy, alive.discard, name)
        most = max(most, len(alive))
        return copy

    convert({name: (lambda n=name: read(n)) for name in tensors}, TABLE, LEAVES, "")
    assert most == 1


def test_the_dialect_is_the_one_that_knows_most_names():
    other = Table(
        "other", tuple(Rule(rule.source.replace("layer", "block"), rule.targets, SAME) for rule in TABLE.rules)
    )
    tensors = lazy(checkpoint())
    assert choose_table([other, TABLE], tensors, "").name == "made-up"
    renamed = {name.replace("layer", "block"): read for name, read in tensors.items()}
    assert choose_table([TABLE, other], renamed, "").name == "other"
    message = "x.pt: expected tensors under one of the name styles made-up, other, found conv.weight"
    with pytest.raises(ConversionError, match=re.escape(message)):
        choose_table([TABLE, other], lazy({"conv.weight": np.zeros(1)}), "x.pt")
