"""Classifiers of images and texts: against NumPy in float64, exit by exit, and with padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.dynamic import Buckets, Constant, Exits, OwnHead, SharedHead, Top2Gap, run_with_exits
from dynamoe.models import Attention, ClassToken, Dense, MeanPool, TextClassifier, VisionTransformer, with_layers
from dynamoe.models.norm import RMSNorm
from dynamoe.models.staged import staged, whole
from dynamoe.models.vision_transformer import cut_patches
from dynamoe.moe import CapacityDispatcher, DroplessDispatcher, MoE, SwiGLU, TopK

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 1)).astype(np.uint8)
VISION = VisionTransformer(
    image=(6, 6, 1),
    patch=3,
    width=8,
    layers=3,
    classes=4,
    attention=Attention(heads=2),
    ffn=Dense(hidden=8),
    exits=Exits(after=(1, 2), head=OwnHead()),
)
TEXT = TextClassifier(
    vocab=20, length=6, width=8, layers=2, classes=2, attention=Attention(heads=2), ffn=Dense(hidden=8)
)


def numbers(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def norm(x: np.ndarray, module) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * numbers(module.scale)


def expected(model, images: np.ndarray, pooling) -> list[np.ndarray]:
    """Logits of every exit by plain loops over images, heads and patches."""
    answers = []
    for image in images.astype(np.float64):
        patches = [image[y : y + 3, x : x + 3].reshape(-1) / 127.5 - 1 for y in (0, 3) for x in (0, 3)]
        x = np.array(patches) @ numbers(model.inputs.kernel) + numbers(model.inputs.positions)
        if isinstance(pooling, ClassToken):
            x = np.concatenate([numbers(model.class_token)[None], x])
        logits = []
        for depth, segment in enumerate(model.segments, 1):
            block = segment.unit.layers[0]
            attention, mixed = block.attention, np.zeros_like(x)
            normed = norm(x, block.attention_norm)
            for head in range(2):
                query, keys, values = (
                    normed @ numbers(kernel)[:, head] for kernel in (attention.query, attention.key, attention.value)
                )
                scores = np.exp(query @ keys.T / 2)  # the root of a head's width of 4
                mixed += scores / scores.sum(axis=1, keepdims=True) @ values @ numbers(attention.output)[head]
            x = x + mixed
            normed = norm(x, block.ffn_norm)
            gate = normed @ numbers(block.ffn.gate)
            x = x + (gate / (1 + np.exp(-gate)) * (normed @ numbers(block.ffn.up))) @ numbers(block.ffn.down)
            last = depth == len(model.segments)
            final, kernel = (
                (model.final_norm, model.head_kernel)
                if last
                else (model.exit_heads[depth - 1].norm, model.exit_heads[depth - 1].kernel)
            )
            tokens = norm(x, final)
            logits.append((tokens[0] if isinstance(pooling, ClassToken) else tokens.mean(axis=0)) @ numbers(kernel))
        answers.append(logits)
    return np.array(answers).swapaxes(0, 1)


@pytest.mark.parametrize("pooling", [MeanPool(), ClassToken()])
def test_a_vision_transformer_is_what_numpy_computes_in_float64(pooling) -> None:
    model = dataclasses.replace(VISION, pooling=pooling).build(jax.random.key(0), stacked=False)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, RMSNorm):
            module.scale[...] = 1 + 0.1 * jnp.arange(8, dtype=jnp.float32)
    found = model(jnp.asarray(IMAGES))
    np.testing.assert_allclose(found.logits, expected(model, IMAGES, pooling), atol=2e-5)


def test_patches_that_overlap_begin_a_stride_apart() -> None:
    images = jnp.arange(2 * 7 * 7 * 2, dtype=jnp.float32).reshape(2, 7, 7, 2)
    found = cut_patches(images, 3, 2)
    assert found.shape == (2, 9, 18)
    np.testing.assert_array_equal(found[1, 5], images[1, 2:5, 4:7].reshape(-1))
    square = images[:, :6, :6]
    np.testing.assert_array_equal(
        cut_patches(square, 3, 3),
        np.stack([square[:, y : y + 3, x : x + 3].reshape(2, -1) for y in (0, 3) for x in (0, 3)], 1),
    )
    assert dataclasses.replace(VISION, image=(8, 6, 1), patch=4, stride=2).tokens == 3 * 2


def test_float_images_are_taken_as_they_are() -> None:
    model = VISION.build(jax.random.key(0))
    scaled = jnp.asarray(IMAGES).astype(jnp.float32) / 127.5 - 1
    np.testing.assert_allclose(model(jnp.asarray(IMAGES)).logits, model(scaled).logits, atol=1e-6)
    with pytest.raises(ValueError, match=r"inputs are images of \(5, 6, 1\); VisionTransformer.image is \(6, 6, 1\)"):
        model(scaled[:, :5])


MIXTURE = MoE(experts=4, router=TopK(k=2), expert=SwiGLU(hidden=8), dispatcher=DroplessDispatcher())


@pytest.mark.parametrize("head", [SharedHead(), OwnHead()])
@pytest.mark.parametrize("ffn", [Dense(hidden=8), MIXTURE])
def test_stages_one_after_another_are_the_whole_model(head, ffn) -> None:
    config = dataclasses.replace(VISION, exits=Exits(after=(1, 2), head=head), ffn=ffn)
    model = config.build(jax.random.key(0))
    logits, pooled, stats, _ = model(jnp.asarray(IMAGES))
    carried, unstacked = jnp.asarray(IMAGES), with_layers(model, stacked=False)
    for exit in range(3):
        output = unstacked.stage(exit, carried)
        np.testing.assert_allclose(output.logits, logits[exit], atol=1e-5)
        np.testing.assert_allclose(output.hidden, pooled[exit], atol=1e-5)
        carried = output.carried
    np.testing.assert_allclose(whole(model)(jnp.asarray(IMAGES)), logits[-1], atol=1e-5)
    assert (stats[0] is None) == isinstance(ffn, Dense)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_in_buckets_get_the_answers_of_the_whole_model(rows: int) -> None:
    model = VISION.build(jax.random.key(0))
    logits = np.asarray(model(jnp.asarray(IMAGES[:rows])).logits)
    gaps = np.sort(jax.nn.softmax(logits), axis=2)
    sure = gaps[:-1, :, -1] - gaps[:-1, :, -2] >= 0.2
    exits = np.where(sure.any(axis=0), sure.argmax(axis=0), 2)
    run = run_with_exits(
        staged(model), IMAGES[:rows], Top2Gap(), Constant(threshold=0.2), Buckets(smallest=1, largest=4)
    )
    np.testing.assert_array_equal(run.exit_index, exits)
    np.testing.assert_allclose(run.logits, logits[exits, np.arange(rows)], atol=1e-5)


def test_exits_in_buckets_refuse_rows_that_depend_on_each_other() -> None:
    crowded = dataclasses.replace(MIXTURE, dispatcher=CapacityDispatcher(capacity_factor=1.0))
    model = dataclasses.replace(VISION, ffn=crowded).build(jax.random.key(0))
    with pytest.raises(ValueError, match="VisionTransformer.ffn of layer 0 has .* depends on the other tokens"):
        staged(model)


def test_padding_changes_no_answer_and_an_empty_text_stays_finite() -> None:
    model = TEXT.build(jax.random.key(0))
    tokens = jnp.array([[3, 5, 7, -1, -1, -1], [1, 2, 3, 4, 5, 6], [-1] * 6])
    logits = model(tokens).logits[-1]
    np.testing.assert_allclose(logits[0], model(tokens[:1, :3]).logits[-1][0], atol=1e-6)
    assert np.isfinite(logits[2]).all() and np.isnan(model(jnp.array([[20, 1]])).logits).all()


def test_every_token_sees_those_before_and_behind_it() -> None:
    model = dataclasses.replace(TEXT, pooling=ClassToken()).build(jax.random.key(0))
    tokens = jnp.array([[3, 5, 7, 9, 1, 2]])
    first = model(tokens).logits[-1]
    assert not np.allclose(first, model(tokens.at[0, 5].set(8)).logits[-1], atol=1e-4)


def test_rows_that_are_padding_load_no_expert() -> None:
    model = dataclasses.replace(VISION, ffn=MIXTURE).build(jax.random.key(0))
    images = jnp.asarray(IMAGES)
    alone, among = model(images[:3]), model(images, jnp.array([True, True, True, False, False]))
    np.testing.assert_allclose(among.logits[:, :3], alone.logits, atol=1e-5)
    np.testing.assert_allclose(among.stats[0].load, alone.stats[0].load, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"patch": 4},
            r"patch is 4 and stride None; in 6 pixels of VisionTransformer.image = \(6, 6, 1\) the last patch",
        ),
        ({"stride": 4}, "patch is 3 and stride 4; the patch must be 1 or more, the stride from 1 to the patch"),
        ({"image": (6, 6)}, r"VisionTransformer.image is \(6, 6\); it must be height, width, channels"),
        ({"classes": 1}, "VisionTransformer.classes is 1; it must be at least 2"),
        ({"layers": 2}, r"Exits.after is \(1, 2\); with 2 layers exits may follow layers 1 to 1"),
        ({"dtype": "int8"}, "VisionTransformer.dtype is 'int8'; allowed are 'float32' and 'bfloat16'"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(wrong, message, unchecked) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VISION, **wrong)


def test_a_text_model_refuses_a_length_of_zero_and_stages_need_unstacked_layers() -> None:
    with pytest.raises(ValueError, match="TextClassifier.length is 0; it must be at least 1"):
        dataclasses.replace(TEXT, length=0)
    with pytest.raises(ValueError, match="needs the layers unstacked"):
        dataclasses.replace(VISION, exits=None).build(jax.random.key(0)).stage(0, jnp.asarray(IMAGES))
