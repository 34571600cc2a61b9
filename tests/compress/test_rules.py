"""Rules decide what is compressed; whatever they cannot do is one error, before any compute."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.compress import RoundToNearest, Rule, Technique, compress
from dynamoe.kernels.quantized import FORMATS, INT4, INT8, MXFP4, Quantized, dequantize, quantize

INT4_GROUPS = RoundToNearest(format=INT4, group_size=4)


@pytest.fixture
def arrays(key):
    shapes = {"layers.0.experts.up": (2, 8, 6), "layers.0.norm": (8,), "layers.1.ffn.up": (8, 6), "head": (8, 10)}
    return {path: jax.random.normal(jax.random.fold_in(key, len(path)), shape) for path, shape in shapes.items()}


def test_each_path_gets_the_technique_of_the_first_rule_that_fits(arrays):
    rules = [
        Rule(pattern="*.experts.*", technique=INT4_GROUPS),
        Rule(pattern="*.up", technique=RoundToNearest(format=INT8)),
    ]
    smaller, report = compress(arrays, rules)
    expected = quantize(arrays["layers.0.experts.up"], INT4, group_size=4)
    np.testing.assert_array_equal(smaller["layers.0.experts.up"].codes, expected.codes)
    assert smaller["layers.1.ffn.up"].format == INT8
    assert smaller["head"] is arrays["head"] and smaller["layers.0.norm"] is arrays["layers.0.norm"]
    techniques = ["int4, groups of 4", None, "int8, whole columns", None]
    assert [entry.technique for entry in report.entries] == techniques and list(smaller) == list(arrays)


def test_what_is_to_stay_stays_whatever_the_rules_say(arrays):
    smaller, _ = compress(arrays, [Rule(pattern="*", technique=INT4_GROUPS)], leave=("*.norm", "head"))
    assert [path for path, array in smaller.items() if isinstance(array, Quantized)] == [
        "layers.0.experts.up",
        "layers.1.ffn.up",
    ]


def test_all_that_cannot_be_done_is_listed_in_one_error(arrays):
    rules = [
        Rule(pattern="*", technique=RoundToNearest(format=INT4, group_size=3)),
        Rule(pattern="*.up", technique=INT4_GROUPS),
        Rule(pattern="*.expert.*", technique=INT4_GROUPS),
    ]
    with pytest.raises(ValueError) as caught:
        compress(arrays, rules, leave=("*.bias",), unfit={"head": "its module multiplies by hand"})
    message = str(caught.value)
    for part in (
        r"leave names the pattern '*.bias', which no path fits",
        r"rule 1 has the pattern '*.up': all paths that it fits are decided by `leave` or an earlier rule",
        r"rule 2 has the pattern '*.expert.*': no path fits it",
        r"layers.0.experts.up [2, 8, 6]: group_size is 3; it must divide D, the second-last axis, which is 8",
        r"layers.0.norm [8]: it is a vector, not a matrix",
        r"layers.1.ffn.up [8, 6]: group_size is 3;",
        r"head [8, 10]: its module multiplies by hand",
        r"paths are layers.0.experts.up, layers.0.norm,",
    ):
        assert part in message
    with pytest.raises(ValueError, match="there is no rule"):
        compress(arrays, [])


@dataclass(frozen=True, kw_only=True)
class LargestInputs(Technique):
    """A technique of one's own, with statistics and another result: the rows of the most used inputs alone."""

    needs_statistics: ClassVar[bool] = True
    keep: int
    name = "largest inputs"

    def compress(self, weight, statistics=None):
        rows = jnp.argsort(-statistics)[: self.keep]
        return {"rows": rows, "values": weight[rows], "all": jnp.zeros(weight.shape[0], jnp.int8)}

    def expand(self, compressed):
        full = jnp.zeros((len(compressed["all"]), compressed["values"].shape[1]))
        return full.at[compressed["rows"]].set(compressed["values"])


def test_a_technique_of_ones_own_gets_the_statistics_of_its_path(arrays):
    rule = Rule(pattern="head", technique=LargestInputs(keep=2))
    with pytest.raises(ValueError, match=r"head \[8, 10\]: largest inputs needs statistics, and there are none"):
        compress(arrays, [rule])
    smaller, report = compress(arrays, [rule], statistics={"head": jnp.arange(8.0)})
    np.testing.assert_array_equal(smaller["head"]["values"], arrays["head"][jnp.array([7, 6])])
    weight = np.asarray(arrays["head"], np.float64)
    expected = np.linalg.norm(weight[:6]) / np.linalg.norm(weight)
    np.testing.assert_allclose(report.entries[3].error, expected, rtol=1e-6)
    assert report.entries[3].bytes_after == 2 * 4 + 2 * 10 * 4 + 8


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_every_format_is_that_of_its_numbers(name, key):
    array = jax.random.normal(key, (64, 6))
    smaller, report = compress({"w": array}, [Rule(pattern="w", technique=RoundToNearest(format=FORMATS[name]))])
    numbers, wide = np.asarray(dequantize(smaller["w"]), np.float64), np.asarray(array, np.float64)
    (entry,) = report.entries
    np.testing.assert_allclose(entry.error, np.linalg.norm(numbers - wide) / np.linalg.norm(wide), rtol=1e-5)
    assert entry.bytes_after == smaller["w"].nbytes and 0 < entry.error < {8: 0.05, 4: 0.3, 2: 0.9}[FORMATS[name].bits]


def test_zeros_have_no_error():
    _, report = compress({"w": jnp.zeros((4, 2))}, [Rule(pattern="*", technique=RoundToNearest())])
    assert report.entries[0].error == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, r"RoundToNearest.group_size is 0; it must be at least 1"),
        ({"format": MXFP4, "group_size": 64}, r"group_size is 64; mxfp4 has groups of 32 alone"),
        ({"format": MXFP4, "zero_points": True}, r"zero_points is True; the codes of mxfp4 are not integers"),
    ],
)
def test_options_that_a_format_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RoundToNearest(**options)
