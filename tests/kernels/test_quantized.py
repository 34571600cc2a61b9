"""Packed arrays: against qwix, published tables and bytes by hand; and as one tree in all that JAX does to trees."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.flax import load_file, save_file

from dynamoe.experiments.training.checkpoints import Checkpoints
from dynamoe.kernels.quantized import (
    FORMATS,
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    MXFP4,
    NF4,
    Format,
    Quantized,
    check_shards,
    dequantize,
    from_arrays,
    quantize,
    quantize_rows,
    to_arrays,
)

QWIX = np.load(Path(__file__).with_name("fixtures") / "quantized_by_qwix.npz")
QWIX_CASES = sorted({name.rpartition("/")[0] for name in QWIX.files} - {""})
KINDS = [(format, False) for format in FORMATS.values()] + [(format, True) for format in (INT8, INT4, INT2)]
"""Each format, and whether with zero points."""
EVERY_KIND = pytest.mark.parametrize(
    ("format", "zero_points"), KINDS, ids=lambda value: value.name if isinstance(value, Format) else str(value)
)
GROUP = {NF4: 64, MXFP4: 32}
pack = jax.jit(quantize, static_argnames=("format", "group_size", "zero_points"))
unpack = jax.jit(dequantize, static_argnames="dtype")


@functools.cache
def packed(format: Format, zero_points: bool = False, dtype: jax.typing.DTypeLike = jnp.float32) -> Quantized:
    """Two matrices of 64 by 5 in groups of 16 or the format's block."""
    array = np.random.default_rng(0).standard_normal((2, 64, 5))
    return pack(jnp.asarray(array, dtype), format, group_size=GROUP.get(format, 16), zero_points=zero_points)


def numbers_of_codes(format: Format) -> np.ndarray:
    """The number of every code, in float64, from the tables of others."""
    if format == FP8_E4M3:
        return np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if format == MXFP4:
        return np.arange(16).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    if format == NF4:
        return np.asarray(format.table, np.float64)  # held to the paper by hand below
    return np.arange(-(2 ** (format.bits - 1)), 2 ** (format.bits - 1), dtype=np.float64)


def scales_by_row(array: Quantized) -> np.ndarray:
    """The scale of every element, in float64."""
    scales = np.asarray(array.scales)
    if array.format == MXFP4:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return np.repeat(scales.astype(np.float64), array.group_size, axis=-2)


@pytest.mark.smoke
@pytest.mark.parametrize("case", QWIX_CASES)
def test_codes_scales_and_numbers_are_those_of_qwix(case):
    name, group_size, zero_points = case.split("/")
    x, size = jnp.asarray(QWIX["x"]), int(group_size) or None
    array = pack(x, FORMATS[name], group_size=size, zero_points=zero_points == "1")
    np.testing.assert_array_equal(unpack(array), QWIX[f"{case}/numbers"])
    np.testing.assert_array_equal(scales_by_row(array)[:, :: array.group_size], QWIX[f"{case}/scales"])
    codes = QWIX[f"{case}/codes"]
    if zero_points == "1":
        np.testing.assert_array_equal(array.zero_points, QWIX[f"{case}/zero_points"])
    if name == "nf4":
        np.testing.assert_array_equal(unpacked(array), codes)
    elif name == "mxfp4":
        np.testing.assert_array_equal(unpacked(array).astype(np.uint8).view(ml_dtypes.float4_e2m1fn), codes)
    elif name == "fp8_e4m3":
        np.testing.assert_array_equal(array.codes.astype(jnp.float32), codes)
    else:
        bits = FORMATS[name].bits
        signed = unpacked(array) if bits == 8 else (unpacked(array) ^ (1 << (bits - 1))) - (1 << (bits - 1))
        np.testing.assert_array_equal(signed, codes)


def unpacked(array: Quantized) -> np.ndarray:
    """The bits of each code, as an integer: byte row i holds the rows from i * 8 / bits on, the first lowest."""
    codes = np.asarray(array.codes).astype(np.int32)
    if array.format.bits == 8:
        return codes
    slots = [codes >> shift & (2**array.format.bits - 1) for shift in range(0, 8, array.format.bits)]
    return np.stack(slots, axis=-2).reshape(array.shape)


@pytest.mark.smoke
def test_bytes_are_those_written_by_hand():
    # int4: the largest, 7.5, makes the scale 1; codes 1, -2 | 3, 7 (7.5 rounds to 8, which is cut to 7).
    int4 = pack(jnp.array([[1.0], [-2.0], [3.0], [7.5]]), INT4)
    np.testing.assert_array_equal(int4.codes, np.array([[0xE1], [0x73]], np.uint8))
    # int2: scale 1.5 / 1.5; codes 1, -1, 0, -2.
    int2 = pack(jnp.array([[1.0], [-1.0], [0.2], [-1.5]]), INT2)
    np.testing.assert_array_equal(int2.codes, [[0b10_00_11_01]])
    np.testing.assert_array_equal(unpack(int2)[:, 0], [1, -1, 0, -2])
    # With zero points: from -1 to 2 in 15 steps of 0.2; the zero point is -8 + 5.
    shifted = pack(jnp.array([[-1.0], [2.0], [0.0], [0.41]]), INT4, zero_points=True)
    assert shifted.zero_points is not None
    np.testing.assert_array_equal(shifted.zero_points, [[-3]])
    np.testing.assert_array_equal(shifted.codes, np.array([[0x78], [0xFD]], np.uint8))
    np.testing.assert_allclose(unpack(shifted)[:, 0], [-1, 2, 0, 0.4], atol=1e-6)


def test_nf4_holds_the_table_of_the_paper():
    # Dettmers et al. 2023, appendix E, each divided into the 64-block's largest, 2.
    paper = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    paper += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    paper += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1]
    block = jnp.asarray(2 * np.tile(paper, 4)[:, None], jnp.float32)
    array = pack(block, NF4)
    assert array.group_size == 64 and array.scales.item() == 2
    np.testing.assert_array_equal(unpacked(array)[:16, 0], np.arange(16))
    np.testing.assert_array_equal(unpack(array), block)


def test_mxfp4_follows_its_specification():
    # E2M1: a sign, two bits of exponent with bias 1, one of mantissa. E8M0: the exponent plus 127.
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    block = jnp.asarray(np.concatenate([numbers, np.zeros(16)])[:, None] * 2.0**-9, jnp.float32)
    array = pack(block, MXFP4)
    np.testing.assert_array_equal(array.scales, np.array([[127 - 9]], np.uint8))
    np.testing.assert_array_equal(unpacked(array)[:16, 0], np.arange(16))
    np.testing.assert_array_equal(unpack(array), block)
    # Halfway goes to the even code: 0.25 to 0, 0.75 to 1, 2.5 to 2, 5 to 4.
    halves = jnp.zeros((32, 1)).at[:5, 0].set(jnp.array([0.25, 0.75, 2.5, 5.0, 6.0]))
    np.testing.assert_array_equal(unpack(pack(halves, MXFP4))[:5, 0], [0, 1, 2, 4, 6])


@pytest.mark.parametrize("stored", [0, 1, 127, 254, 255])
def test_powers_of_two_are_those_of_e8m0(stored):
    expected = np.uint8(stored).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(MXFP4.scales(jnp.uint8(stored)), expected)


def test_every_code_of_8_bit_floats_is_the_number_that_others_read():
    bits = np.arange(256).astype(np.uint8)
    expected = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for stored in (jnp.asarray(bits), jnp.asarray(bits).view(jnp.float8_e4m3fn)):
        np.testing.assert_array_equal(FP8_E4M3.numbers(stored, 0), expected)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-40, 40),
    shift=st.sampled_from([0.0, 3.0, -40.0]),
)
def test_no_code_is_nearer_than_the_chosen_one(kind, seed, exponent, shift):
    format, zero_points = kind
    array = (np.random.default_rng(seed).standard_normal((2, 64, 5)) + shift) * 2.0**exponent
    array = array.astype(np.float32)
    found = pack(jnp.asarray(array), format, group_size=GROUP.get(format, 16), zero_points=zero_points)
    scales = scales_by_row(found)
    error = np.abs(np.asarray(unpack(found), np.float64) - array) / scales
    zero = 0.0 if found.zero_points is None else np.repeat(np.asarray(found.zero_points), found.group_size, axis=-2)
    choices = numbers_of_codes(format)[:, None, None, None] - zero
    nearest = np.nanmin(np.abs(choices - array / scales), axis=0)
    assert np.all(error <= nearest + 1e-4)
    if format.is_integer:
        assert np.all(error <= 0.5 + 1e-4)


@EVERY_KIND
def test_a_group_of_zeros_stays_zeros_and_one_with_nan_or_infinity_is_nan(format, zero_points):
    array = np.random.default_rng(1).standard_normal((2, 64, 5)).astype(np.float32)
    array[0, :, 0] = 0.0
    array[0, :, 1] = 1e-30
    array[1, 3, 2], array[1, 4, 3], array[1, 5, 4] = np.nan, np.inf, -np.inf
    packed_array = pack(jnp.asarray(array), format, group_size=GROUP.get(format, 16), zero_points=zero_points)
    found = np.asarray(unpack(packed_array))
    np.testing.assert_array_equal(found[0, :, :2], 0)
    bad = np.zeros(array.shape, bool)
    bad[1, : GROUP.get(format, 16), 2:] = True
    np.testing.assert_array_equal(np.isnan(found), bad)


@EVERY_KIND
def test_bytes_are_counted_from_the_buffers(format, zero_points):
    array = packed(format, zero_points)
    groups = 2 * (64 // array.group_size) * 5
    scale_bytes = groups * (1 if format == MXFP4 else 4) + groups * zero_points
    assert array.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(array)) == 640 * format.bits // 8 + scale_bytes
    assert array.bits_per_element == 8 * array.nbytes / 640
    assert (array.shape, array.ndim, array.size, array.dtype) == ((2, 64, 5), 3, 640, jnp.float32)


@EVERY_KIND
def test_an_array_of_bfloat16_comes_back_in_it(format, zero_points):
    array = packed(format, zero_points, jnp.bfloat16)
    numbers = unpack(array)
    assert numbers.dtype == jnp.bfloat16
    np.testing.assert_array_equal(numbers, unpack(array, dtype=jnp.float32).astype(jnp.bfloat16))
    assert unpack(array.astype(jnp.float32)).dtype == jnp.float32


@EVERY_KIND
def test_transformations_see_one_tree_with_the_leading_axis_in_front(format, zero_points):
    array = packed(format, zero_points)
    whole = unpack(array)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), None, array)
    np.testing.assert_array_equal(scanned, whole)
    np.testing.assert_array_equal(jax.jit(jax.vmap(dequantize))(array), whole)
    assert array[0].shape == (64, 5) and array[...] is array
    np.testing.assert_array_equal(dequantize(array[0]), whole[0])
    np.testing.assert_array_equal(dequantize(array[jnp.array([1, 1, 0])]), whole[jnp.array([1, 1, 0])])
    assert jax.eval_shape(lambda: array).shape == array.shape
    assert jax.eval_shape(dequantize, array).shape == array.shape
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(array)]
    assert paths == [".codes", ".scales", ".zero_points"][: 2 + zero_points]


@pytest.mark.parametrize("index", [(0, 1), None])
def test_an_index_that_is_not_of_the_leading_axis_is_refused(index):
    with pytest.raises(ValueError, match=r"index is .* of an array \[2, 64, 5\]; allowed is one of an axis before D"):
        packed(INT4)[index]
    with pytest.raises(ValueError, match=r"index is 0 of an array \[64, 5\]"):
        packed(INT4)[0][0]


def test_mapped_quantizing_is_quantizing_of_the_whole():
    x = jnp.asarray(QWIX["x"])
    for one, other in zip(
        jax.tree.leaves(jax.vmap(lambda matrix: quantize(matrix, INT4, group_size=16))(x)),
        jax.tree.leaves(quantize(x, INT4, group_size=16)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_donated_buffers_are_used_again():
    array = jax.tree.map(jnp.copy, packed(INT4))
    before = unpack(array)
    same = jax.jit(lambda array: array, donate_argnums=0, keep_unused=True)(array)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(array))
    np.testing.assert_array_equal(dequantize(same), before)


@EVERY_KIND
def test_safetensors_give_it_back(format, zero_points, tmp_path):
    state = {"up": packed(format, zero_points), "norm": jnp.ones(3)}
    arrays, descriptions = to_arrays(state)
    save_file(arrays, tmp_path / "state.safetensors", descriptions)
    with safe_open(tmp_path / "state.safetensors", "flax") as file:
        descriptions = file.metadata()
    found = from_arrays(load_file(tmp_path / "state.safetensors"), descriptions)
    assert_same_trees(found, state)


def assert_same_trees(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_checkpoint_gives_it_back(tmp_path):
    state = {format.name: packed(format, zero_points) for format, zero_points in KINDS}
    state["variable"] = nnx.Param(packed(NF4), axes=("expert", "embed", "mlp"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    found, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    checkpoints.close()
    assert_same_trees(found, state)


def split_over_devices() -> None:
    """One partition for all leaves, and each device dequantizes its own part."""
    mesh = jax.make_mesh((2, 2, 2), ("expert", "embed", "mlp"), axis_types=(AxisType.Auto,) * 3)
    spec = PartitionSpec("expert", "embed", "mlp")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 128, 6)), jnp.float32)
    for format, zero_points in ((INT4, True), (MXFP4, False)):
        array = quantize(x, format, group_size=GROUP.get(format, 16), zero_points=zero_points)
        check_shards(array, 2, "w")
        split = jax.device_put(array, NamedSharding(mesh, spec))
        assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in jax.tree.leaves(split))
        own = jax.jit(jax.shard_map(dequantize, mesh=mesh, in_specs=spec, out_specs=spec))(split)
        np.testing.assert_array_equal(own, dequantize(array))


def test_it_splits_over_devices_as_its_array_does(run_with_devices):
    run_with_devices(8, split_over_devices)


def test_a_split_through_a_group_is_refused_by_name():
    array = packed(INT4)  # 64 rows in groups of 16
    check_shards(array, 4, "up")
    with pytest.raises(ValueError, match="up has D = 64 and group_size 16, 4 groups .* over 8 shards .* a multiple"):
        check_shards(array, 8, "up")


X = jnp.zeros((6, 3))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("array", "arguments", "message"),
    [
        (X[0], {"format": INT8}, r"array has shape \(3,\); it must be \[..., D, F\]"),
        (X.astype(jnp.int32), {"format": INT8}, "array has dtype int32; allowed are float32, bfloat16, float16"),
        (X[:5], {"format": INT4}, "a group has 5 rows of D; int4 packs 2 of them into a byte, so .* a multiple of 2"),
        (X, {"format": INT2}, "a group has 6 rows of D; int2 packs 4"),
        (X, {"format": INT4, "group_size": 3}, "a group has 3 rows of D; int4 packs 2"),
        (X, {"format": INT8, "group_size": 4}, "group_size is 4; it must divide D, the second-last axis, which is 6"),
        (X, {"format": INT8, "group_size": 0}, "group_size is 0; it must divide D"),
        (X, {"format": NF4}, "group_size is 64; it must divide D, the second-last axis, which is 6"),
        (X, {"format": MXFP4, "group_size": 2}, "group_size is 2; mxfp4 has groups of 32 alone"),
        (X, {"format": FP8_E4M3, "zero_points": True}, "zero_points is True; the codes of fp8_e4m3 are not integers"),
    ],
)
def test_what_does_not_pack_is_refused(unchecked, array, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(array, **arguments)


def test_a_dtype_that_packed_arrays_do_not_stand_for_is_refused():
    with pytest.raises(ValueError, match="dtype is int16; allowed are float32, bfloat16, float16"):
        dequantize(packed(INT8), jnp.int16)
    with pytest.raises(ValueError, match="dtype is int8; allowed are float32, bfloat16, float16"):
        packed(INT8).astype(jnp.int8)


def test_arrays_that_do_not_fit_their_description_are_named():
    arrays, descriptions = to_arrays({"w": packed(INT4, True)})
    with pytest.raises(ValueError, match="the description of 'w' is 'int5'; it must be like 'int4 group_size=64"):
        from_arrays(arrays, {"w": "int5"})
    with pytest.raises(ValueError, match=r"w.codes is uint8\[2, 32, 5\]; it must be int8\[2, 32, 5\]"):
        from_arrays(arrays, {"w": "int8 group_size=16 dtype=float32"})
    with pytest.raises(ValueError, match=r"w.scales is float32\[2, 4, 5\]; it must be float32\[2, 2, 5\]"):
        from_arrays(arrays, {"w": "int4 group_size=32 dtype=float32"})
    with pytest.raises(ValueError, match=r"w.scales is missing; it must be float32\[2, 4, 5\]"):
        from_arrays({"w.codes": arrays["w.codes"]}, descriptions)
    with pytest.raises(ValueError, match=r"weights holds two arrays for the name 'w.codes'"):
        to_arrays({"w": packed(INT4), "w.codes": jnp.ones(1)})
    assert set(from_arrays(arrays, descriptions | {"format": "pt"})) == {"w"}
    assert set(from_arrays(arrays, None)) == {"w.codes", "w.scales", "w.zero_points"}


def test_rows_have_a_scale_each():
    x = jnp.array([[1.0, -127.5, 0.4], [0.0, 0.0, 0.0], [jnp.nan, 1.0, 2.0], [2.55, 1.0, 0.0]])
    codes, scales = jax.jit(quantize_rows)(x)
    np.testing.assert_array_equal(codes, np.array([[1, -128, 0], [0, 0, 0], [0, 0, 0], [127, 50, 0]], np.int8))
    np.testing.assert_allclose(scales[:, 0], [1, 1, np.nan, 0.02])
