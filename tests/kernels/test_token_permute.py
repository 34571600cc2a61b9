"""`sort_by_expert` against NumPy's stable argsort; `permute` and `unpermute` against plain indexing in float64."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dynamoe.kernels import Permutation, fixed_groups, permute, sort_by_expert, unpermute
from dynamoe.kernels.token_permute.api import PERMUTES, SORTS
from dynamoe.kernels.token_permute.counting import CHUNKS

EVERY_SORT = pytest.mark.parametrize("implementation", SORTS)
EVERY_MOVE = pytest.mark.parametrize("implementation", PERMUTES)
TOKENS, PER_TOKEN, WIDTH, EXPERTS = 12, 2, 3, 5
ASSIGNMENTS = TOKENS * PER_TOKEN
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}

# Padding is E, 5. The last two are strangers.
EXPERT = np.array([4, 0, 0, 2, 4, 4, 1, 0, 2, 4, 0, 2, 5, 5, 4, 1, 1, 0, 2, 2, 0, 4, -1, 9], np.int32)


def by_numpy(expert: np.ndarray, experts: int) -> Permutation:
    """The definition, by NumPy's stable argsort of who is somebody's."""
    somebody = (expert >= 0) & (expert < experts)
    order = np.argsort(np.where(somebody, expert, experts), kind="stable")[: somebody.sum()]
    row, assignment = (np.full(len(expert), len(expert), np.int32) for _ in range(2))
    row[order] = np.arange(len(order))
    assignment[: len(order)] = order
    return Permutation(row, assignment, np.bincount(expert[somebody], minlength=experts).astype(np.int32))


def assert_same(found: Permutation, expected: Permutation) -> None:
    for name, one, other in zip(Permutation._fields, found, expected, strict=True):
        assert one.dtype == jnp.int32, name
        np.testing.assert_array_equal(one, other, err_msg=name)


@functools.cache
def compiled_sort(implementation: str | None, experts: int) -> Callable[[jax.Array], Permutation]:
    return jax.jit(functools.partial(sort_by_expert, experts=experts, implementation=implementation))


@EVERY_SORT
@given(data=st.data(), shape=st.sampled_from([(1, 1), (24, 5), (2 * CHUNKS + 7, 5), (2 * CHUNKS, 70)]))
def test_any_sort_is_that_of_numpy(implementation, data, shape):
    assignments, experts = shape
    of_one = st.integers(-1, experts + 1)
    expert = np.array(data.draw(st.lists(of_one, min_size=assignments, max_size=assignments)), np.int32)
    assert_same(compiled_sort(implementation, experts)(jnp.asarray(expert)), by_numpy(expert, experts))


@pytest.mark.smoke
@EVERY_SORT
@pytest.mark.parametrize("expert", [np.zeros(200), np.full(200, 6), np.full(200, 7), np.arange(200) % 8, 6 - EXPERT])
def test_one_expert_with_all_or_nobody_with_any_is_that_of_numpy(implementation, expert):
    expert = expert.astype(np.int32)
    assert_same(sort_by_expert(jnp.asarray(expert), 7, implementation=implementation), by_numpy(expert, 7))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
def test_small_integers_do_not_overflow(dtype):
    expert = np.random.default_rng(0).integers(0, jnp.iinfo(dtype).max, 150, endpoint=True, dtype=np.dtype(dtype))
    assert_same(sort_by_expert(jnp.asarray(expert), 256), by_numpy(expert.astype(np.int64), 256))


def test_numbers_too_large_to_pack_are_sorted_all_the_same():
    number = 50_000
    expert = np.random.default_rng(0).integers(0, number, number).astype(np.int32)
    assert (number + 1) * number > 2**31
    assert_same(sort_by_expert(jnp.asarray(expert), number, implementation="xla"), by_numpy(expert, number))


@pytest.mark.parametrize(("assignments", "experts", "sorts"), [(2048, 64, 0), (2047, 8, 1), (2048, 65, 1)])
def test_the_default_on_cpu_counts_where_there_are_many_assignments_for_each_expert(assignments, experts, sorts):
    expert = jax.ShapeDtypeStruct((assignments,), jnp.int32)
    lowered = compiled_sort(None, experts).lower(expert).as_text()
    assert lowered.count("stablehlo.sort") == sorts


@EVERY_SORT
def test_sorts_of_many_at_once_are_sorts_of_each(implementation):
    experts = np.stack([EXPERT, EXPERT[::-1]])
    mapped = jax.vmap(compiled_sort(implementation, EXPERTS))(jnp.asarray(experts))
    scanned = jax.lax.scan(lambda _, e: (None, compiled_sort(implementation, EXPERTS)(e)), None, jnp.asarray(experts))[
        1
    ]
    for i, expert in enumerate(experts):
        for many in (mapped, scanned):
            assert_same(jax.tree.map(lambda array, i=i: array[i], many), by_numpy(expert, EXPERTS))


def test_the_counting_sort_has_no_array_as_large_as_assignments_times_experts():
    assignments, experts = 20_000, 256
    sort = functools.partial(sort_by_expert, experts=experts, implementation="counting")
    lowered = jax.jit(sort).lower(jax.ShapeDtypeStruct((assignments,), jnp.int32)).as_text()
    sizes = [np.prod([int(n) for n in shape[:-1].split("x")]) for shape in re.findall(r"tensor<((?:\d+x)+)", lowered)]
    assert assignments <= max(sizes) <= 2 * (assignments + CHUNKS * experts)


def operands(dtype: jax.typing.DTypeLike = jnp.float32) -> list[jax.Array]:
    """x, a factor for each row, a weight for each assignment, and the gradient of y."""
    random = np.random.default_rng(0)
    shapes = (TOKENS, WIDTH), (ASSIGNMENTS, WIDTH), (ASSIGNMENTS,), (TOKENS, WIDTH)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


TOKEN = jnp.asarray(np.random.default_rng(1).permutation(np.repeat(np.arange(TOKENS), PER_TOKEN)), jnp.int32)
EVERY_TOKEN = pytest.mark.parametrize("token", [None, TOKEN], ids=["token-major", "tokens spelled out"])


@functools.cache
def compiled_round_trip(implementation: str | None) -> Callable[..., list[jax.Array]]:
    """y, and the gradients in x, the rows' factor and the weight."""

    def run(x, factor, weight, dy, expert, token):
        permutation = sort_by_expert(expert, EXPERTS)

        def there_and_back(x, factor, weight):
            rows = permute(x, permutation, token, implementation=implementation) * factor
            return unpermute(rows, weight, permutation, token, tokens=TOKENS, implementation=implementation)

        y, back = jax.vjp(there_and_back, x, factor, weight)
        return [y, *back(dy)]

    return jax.jit(run)


def plain_round_trip(x, factor, weight, dy, token) -> list[np.ndarray]:
    """The same by plain indexing and a segment sum in float64, with the gradients that JAX derives."""
    found = by_numpy(EXPERT, EXPERTS).row
    mine = np.flatnonzero(found < ASSIGNMENTS)
    of_token = (np.arange(ASSIGNMENTS) // PER_TOKEN if token is None else np.asarray(token))[mine]
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(array, np.float64)) for array in (x, factor, weight, dy)]

        def there_and_back(x, factor, weight):
            values = x[of_token] * factor[found[mine]] * weight[mine][:, None]
            return jax.ops.segment_sum(values, of_token, TOKENS)

        y, back = jax.vjp(there_and_back, *arrays[:3])
        return [np.asarray(array) for array in (y, *back(arrays[3]))]


def assert_close(found: list[jax.Array], expected: list[np.ndarray], dtype: jax.typing.DTypeLike = jnp.float32) -> None:
    for name, array, oracle in zip(("y", "dx", "drows", "dweight"), found, expected, strict=True):
        scale = TOLERANCE[dtype] * max(np.abs(oracle).max(), 1.0)
        np.testing.assert_allclose(np.asarray(array, np.float64), oracle, atol=scale, rtol=0, err_msg=name)


@EVERY_MOVE
@EVERY_TOKEN
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_plain_indexing(implementation, token, dtype):
    arrays = operands(dtype)
    found = compiled_round_trip(implementation)(*arrays, jnp.asarray(EXPERT), token)
    assert [array.dtype for array in found] == [dtype] * 4
    assert_close(found, plain_round_trip(*arrays, token), dtype)


@EVERY_TOKEN
def test_a_float32_weight_of_bfloat16_rows_keeps_its_bits(token):
    x, factor, weight, dy = operands(jnp.bfloat16)
    arrays = x, factor, operands()[2], dy
    found = compiled_round_trip(None)(*arrays, jnp.asarray(EXPERT), token)
    assert found[3].dtype == jnp.float32
    assert_close(found, plain_round_trip(*arrays, token), jnp.bfloat16)
    exact = permute(x, sort_by_expert(jnp.asarray(EXPERT), EXPERTS), token)
    one = unpermute(exact, arrays[2], sort_by_expert(jnp.asarray(EXPERT), EXPERTS), token, tokens=TOKENS)
    expected = plain_round_trip(x, jnp.ones_like(factor), arrays[2], dy, token)[0]
    np.testing.assert_array_equal(one, jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16))


@EVERY_MOVE
@EVERY_TOKEN
def test_nothing_leaks_out_of_empty_rows_or_from_whom_has_no_row(implementation, token):
    x, factor, weight, dy = operands()
    expected = plain_round_trip(x, factor, weight, dy, token)
    permutation = by_numpy(EXPERT, EXPERTS)
    weight = jnp.where(permutation.row == ASSIGNMENTS, jnp.nan, weight)
    permutation = jax.tree.map(jnp.asarray, permutation)
    empty = (permutation.assignment == ASSIGNMENTS)[:, None]
    rows = permute(x, permutation, token, implementation=implementation)
    assert (np.asarray(rows)[empty[:, 0]] == 0).all()
    move = functools.partial(unpermute, tokens=TOKENS, implementation=implementation)
    y, back = jax.vjp(lambda rows, weight: move(rows, weight, permutation, token), rows * factor, weight)
    dirty, _ = jax.vjp(
        lambda rows, weight: move(rows, weight, permutation, token), jnp.where(empty, jnp.nan, rows * factor), weight
    )
    drows, dweight = back(dy)
    _, to_x = jax.vjp(lambda x: permute(x, permutation, token, implementation=implementation), x)
    (dx,) = to_x(jnp.where(empty, jnp.nan, drows * factor))
    assert_close([dirty, dx, drows * rows, dweight], expected)
    np.testing.assert_array_equal(dirty, y)
    assert (np.asarray(drows)[empty[:, 0]] == 0).all()


@EVERY_TOKEN
def test_scan_checkpoint_and_vmap_change_nothing(token):
    arrays = operands()
    permutation = sort_by_expert(jnp.asarray(EXPERT), EXPERTS)
    x, factor, weight, dy = (jnp.stack([array, 2 * array]) for array in arrays)

    def total(x, factor, weight, dy):
        rows = permute(x, permutation, token) * factor
        return (unpermute(rows, weight, permutation, token, tokens=TOKENS) * dy).sum()

    @jax.jit
    def scanned(*arrays):
        step = jax.checkpoint(lambda sum, slices: (sum + total(*slices), None))
        return jax.lax.scan(step, jnp.zeros(()), arrays)[0]

    each = [plain_round_trip(*(scale * array for array in arrays), token)[1:] for scale in (1, 2)]
    for whole in (scanned, lambda *arrays: jax.vmap(total)(*arrays).sum()):
        found = jax.grad(whole, (0, 1, 2))(x, factor, weight, dy)
        for array, first, second in zip(found, *each, strict=True):
            np.testing.assert_allclose(array, np.stack([first, second]), atol=1e-4)


def permute_on_each_device() -> None:
    """Each device sorts assignments of its own to tokens that all share."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    own, shared = PartitionSpec("data"), PartitionSpec()
    x, factor, weight, dy = operands()
    for implementation in ("counting", "xla"):

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(shared, own, own), out_specs=own)
        def local(x, weight, expert, implementation=implementation):
            permutation = sort_by_expert(expert, EXPERTS, implementation=implementation)
            return unpermute(permute(x, permutation), weight, permutation, tokens=TOKENS)

        def run(x, weight, local=local):
            y, back = jax.vjp(lambda x, weight: local(x, weight, jnp.concatenate([EXPERT, EXPERT])), x, weight)
            return [y, *back(jnp.concatenate([dy, dy]))]

        y, dx, dweight = jax.jit(run)(x, jnp.concatenate([weight, 3 * weight]))
        ones = jnp.ones_like(factor)
        first, second = (plain_round_trip(x, ones, scale * weight, dy, None) for scale in (1, 3))
        np.testing.assert_allclose(y, np.concatenate([first[0], second[0]]), atol=1e-4)
        np.testing.assert_allclose(dx, first[1] + second[1], atol=1e-4)
        np.testing.assert_allclose(dweight, np.concatenate([first[3], second[3]]), atol=1e-4)


def test_under_shard_map_the_gradient_of_shared_tokens_is_summed(run_with_devices):
    run_with_devices(2, permute_on_each_device)


def test_fixed_groups_by_hand():
    # Expert 0 has assignments 1, 2, 5, expert 1 none, expert 2 has 0 and 4; 3 is nobody's. Two rows for each.
    sorted_rows = sort_by_expert(jnp.array([2, 0, 0, 3, 2, 0]), 3)
    found = fixed_groups(sorted_rows, 2)
    np.testing.assert_array_equal(found.assignment, [1, 2, 6, 6, 0, 4])
    np.testing.assert_array_equal(found.row, [4, 0, 1, 6, 5, 6])
    np.testing.assert_array_equal(found.group_sizes, [2, 2, 2])
    with pytest.raises(ValueError, match="capacity is 0; it must be at least 1 row"):
        fixed_groups(sorted_rows, 0)


@EVERY_MOVE
@pytest.mark.parametrize("capacity", [2, 9])
def test_with_fewer_or_more_rows_the_dropped_add_nothing_and_get_no_gradient(implementation, capacity):
    x, _, weight, dy = operands()
    permutation = fixed_groups(sort_by_expert(jnp.asarray(EXPERT), EXPERTS), capacity)
    assert permutation.assignment.shape == (EXPERTS * capacity,)
    kept = np.asarray(permutation.row) < EXPERTS * capacity

    def there_and_back(x, weight):
        rows = permute(x, permutation, implementation=implementation)
        return unpermute(rows, weight, permutation, tokens=TOKENS, implementation=implementation)

    y, back = jax.vjp(there_and_back, x, weight)
    dx, dweight = back(dy)
    total = np.where(kept, weight, 0).reshape(TOKENS, PER_TOKEN).sum(axis=1, keepdims=True)
    products = np.repeat(np.asarray(x * dy).sum(axis=1), PER_TOKEN)
    np.testing.assert_allclose(y, total * np.asarray(x), atol=1e-5)
    np.testing.assert_allclose(dx, total * np.asarray(dy), atol=1e-5)
    np.testing.assert_allclose(dweight, np.where(kept, products, 0), atol=1e-5)


def test_nothing_to_permute_is_empty_or_zero():
    none = sort_by_expert(jnp.zeros(0, jnp.int32), 3)
    assert_same(none, by_numpy(np.zeros(0, np.int32), 3))
    assert permute(jnp.ones((4, 2)), none).shape == (0, 2)
    assert permute(jnp.ones((0, 2)), none).shape == (0, 2)
    y = unpermute(jnp.ones((0, 2)), jnp.ones(0), none, tokens=4)
    np.testing.assert_array_equal(y, np.zeros((4, 2)))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("expert", "experts", "message"),
    [
        (jnp.zeros((2, 3), jnp.int32), 4, r"expert has shape \(2, 3\); it must be \[A\]"),
        (jnp.zeros(3), 4, "expert has dtype float32; it must be of integers"),
        (jnp.zeros(3, jnp.int32), 0, "experts is 0; it must be at least 1"),
    ],
)
def test_experts_that_do_not_fit_are_named(unchecked, expert, experts, message):
    with pytest.raises(ValueError, match=message):
        sort_by_expert(expert, experts)


SIX = Permutation(jnp.arange(6), jnp.arange(6), jnp.array([6]))
X, WEIGHT = jnp.zeros((3, 4)), jnp.zeros(6)


@pytest.mark.parametrize(
    ("x", "permutation", "token", "message"),
    [
        (X[0], SIX, None, r"x has shape \(4,\) and dtype float32; it must be \[T, D\], floating"),
        (X.astype(jnp.int32), SIX, None, r"x has shape \(3, 4\) and dtype int32; it must be \[T, D\], floating"),
        (X[:2].repeat(2, 0), SIX, None, "token is None, with 6 assignments and 4 tokens; .* equally many assignments"),
        (X[:0], SIX, None, "token is None, with 6 assignments and 0 tokens"),
        (X, SIX, jnp.zeros(5, jnp.int32), r"token has shape \(5,\) and dtype int32; .* it must be \(6,\), of integers"),
        (X, SIX, jnp.zeros(6), r"token has shape \(6,\) and dtype float32; .* it must be \(6,\), of integers"),
        (X, SIX, jnp.array([0, 1, 2, 3, 0, 0]), "token holds 3; allowed are 0 to 2"),
        (X, SIX, jnp.array([0, 1, 2, -3, 0, 0]), "token holds -3; allowed are 0 to 2"),
        (X, SIX._replace(row=WEIGHT), None, r"permutation.row has shape \(6,\) and dtype float32; .* integers"),
        (X, SIX._replace(assignment=SIX.row[None]), None, r"permutation.assignment has shape \(1, 6\)"),
    ],
)
def test_tokens_that_do_not_fit_are_named(unchecked, x, permutation, token, message):
    with pytest.raises(ValueError, match=message):
        permute(x, permutation, token)


@pytest.mark.parametrize(
    ("rows", "weight", "tokens", "message"),
    [
        (WEIGHT, WEIGHT, 3, r"rows has shape \(6,\) and dtype float32; it must be \[M, D\], floating"),
        (X, WEIGHT, 3, r"rows has shape \(3, 4\); the permutation has 6 rows: it must be \(6, D\)"),
        (X.repeat(2, 0), WEIGHT[1:], 3, r"weight has shape \(5,\) and dtype float32; .* it must be \(6,\), floating"),
        (X.repeat(2, 0), SIX.row, 3, r"weight has shape \(6,\) and dtype int32; .* it must be \(6,\), floating"),
        (X.repeat(2, 0), WEIGHT, 4, "token is None, with 6 assignments and 4 tokens"),
        (X.repeat(2, 0), WEIGHT, -3, "token is None, with 6 assignments and -3 tokens"),
    ],
)
def test_rows_that_do_not_fit_are_named(unchecked, rows, weight, tokens, message):
    with pytest.raises(ValueError, match=message):
        unpermute(rows, weight, SIX, tokens=tokens)


def test_an_unknown_implementation_is_named():
    allowed = "implementation is 'fast'; allowed are None, "
    with pytest.raises(ValueError, match=allowed + "'counting', 'xla', 'reference'"):
        sort_by_expert(SIX.row, 6, implementation="fast")
    with pytest.raises(ValueError, match=allowed + "'xla', 'reference'"):
        permute(X, SIX, implementation="fast")
    with pytest.raises(ValueError, match=allowed + "'xla', 'reference'"):
        unpermute(X.repeat(2, 0), WEIGHT, SIX, tokens=3, implementation="fast")
