"""Fingerprints tell weights apart by numbers, names, shapes and types."""

import jax.numpy as jnp
import numpy as np

from dynamoe.dynamic import fingerprint


def test_equal_weights_have_one_fingerprint_and_others_another():
    base = {"a": np.arange(6, dtype=np.float32), "b": np.zeros(2, np.float32)}
    assert fingerprint(base) == fingerprint({name: jnp.asarray(array) for name, array in base.items()})
    others = [
        base | {"a": base["a"] + 1},
        base | {"a": base["a"].reshape(2, 3)},
        base | {"a": base["a"].astype(np.float64)},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({fingerprint(weights) for weights in [base, *others]}) == 5
