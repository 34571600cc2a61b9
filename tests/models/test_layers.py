"""Runs of equal layers, and the way between stacked and unstacked, on layers small enough to read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dynamoe.models.layers import LONGEST_UNIT, Run, build_segments, runs_of, stack, unstack


class Tiny(nnx.Module):
    """A layer with a matrix, a vector without logical axes and, by kind, another width."""

    def __init__(self, width, key):
        self.kernel = nnx.Param(jax.random.normal(key, (width, 2)), axes=("embed", "mlp"))
        self.plain = nnx.Param(jax.random.normal(jax.random.fold_in(key, 1), (3,)))


WIDTHS = {"a": 4, "b": 5}


def build(kinds, *, stacked):
    keys = jax.random.split(jax.random.key(0), len(kinds))
    return build_segments(list(kinds), keys, lambda kind, key: Tiny(WIDTHS[kind], key), stacked=stacked)


def flat(segments):
    """Every variable: path -> (array, logical axes)."""
    return {
        (index, *path): (np.asarray(variable.get_value()), variable.get_metadata().get("axes"))
        for index, segment in enumerate(segments)
        for path, variable in nnx.to_flat_state(nnx.state(segment))
    }


def assert_same(some, others):
    some, others = flat(some), flat(others)
    assert list(some) == list(others)
    for (array, axes), (other, other_axes) in zip(some.values(), others.values(), strict=True):
        np.testing.assert_array_equal(array, other)
        assert axes == other_axes


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ("a", [Run(0, 1, 1)]),
        ("aaaa", [Run(0, 1, 4)]),
        ("ab", [Run(0, 1, 1), Run(1, 1, 1)]),
        ("abab", [Run(0, 2, 2)]),
        ("aabaab", [Run(0, 3, 2)]),
        ("abbb", [Run(0, 1, 1), Run(1, 1, 3)]),
        ("ababa", [Run(0, 2, 2), Run(4, 1, 1)]),
        ("aaab", [Run(0, 1, 3), Run(3, 1, 1)]),
    ],
)
def test_runs_by_hand(kinds, runs):
    assert runs_of(kinds) == runs


@given(st.text("abc", max_size=24))
def test_runs_cover_every_layer_once_and_repeat_exactly(kinds):
    rebuilt = ""
    for run in runs_of(kinds):
        assert run.start == len(rebuilt) and 1 <= run.length <= LONGEST_UNIT and run.repeats >= 1
        rebuilt += kinds[run.start : run.start + run.length] * run.repeats
    assert rebuilt == kinds


every_pattern = pytest.mark.parametrize("kinds", ["a", "aaa", "abab", "abb", "ababa"])


@every_pattern
def test_each_layer_has_the_same_numbers_in_both_forms(kinds):
    separate = build(kinds, stacked=False)
    assert [segment.depth for segment in separate] == [1] * len(kinds)
    assert_same(unstack(build(kinds, stacked=True)), separate)


@every_pattern
def test_stacking_undoes_unstacking_in_arrays_paths_and_axes(kinds):
    stacked = build(kinds, stacked=True)
    assert_same(stack(unstack(stacked), list(kinds)), stacked)
    assert_same(stack(stacked, list(kinds)), stacked)
    separate = build(kinds, stacked=False)
    assert_same(unstack(stack(separate, list(kinds))), separate)


def test_a_stacked_array_is_its_layers_in_order_with_an_axis_of_that_name():
    (segment,) = build("aaa", stacked=True)
    layers = [separate.unit.layers[0] for separate in build("aaa", stacked=False)]
    kernel = segment.unit.layers[0].kernel
    assert segment.depth == 3 and kernel.get_metadata()["axes"] == ("layers", "embed", "mlp")
    np.testing.assert_array_equal(kernel[...], jnp.stack([layer.kernel[...] for layer in layers]))
    assert layers[0].kernel.get_metadata()["axes"] == ("embed", "mlp")


def test_a_variable_without_logical_axes_is_stacked_too():
    plain = build("aa", stacked=True)[0].unit.layers[0].plain
    assert plain.shape == (2, 3) and plain.get_metadata().get("axes") is None


def test_a_unit_of_two_layers_holds_each_kind_once():
    (segment,) = build("abab", stacked=True)
    assert (segment.repeats, segment.depth) == (2, 4)
    assert [layer.kernel.shape for layer in segment.unit.layers] == [(2, 4, 2), (2, 5, 2)]
