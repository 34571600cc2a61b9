"""The vision transformer: Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929.

    VisionTransformer(image=(28, 28, 1), patch=4, classes=10, ffn=MoE(experts=8), exits=Exits(after=(2,)))

An image is cut into patches, each one token by one linear map, with a learned position added. With a mixture of experts
in some layers it is V-MoE, Riquelme et al. 2021, https://arxiv.org/abs/2106.05974. Beside the paper: RMSNorm for
LayerNorm, gated feed-forward networks, the mean of the tokens for a class token unless asked otherwise
(https://arxiv.org/abs/2205.01580). Letters: B images, S patches, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from .classifier import Classifier, Inputs, Vectors
from .linear import linear


@dataclass(frozen=True, kw_only=True)
class VisionTransformer(Classifier):
    """Configuration of a vision transformer."""

    image: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels of an image, in pixels."""
    patch: int = 4
    """Height and width of a patch, in pixels."""
    stride: int | None = None
    """Pixels from one patch to the next; fewer than `patch` let patches overlap, as in PVT v2, Wang et al. 2021,
    https://arxiv.org/abs/2106.13797. None: `patch`. The last patch must end where the image does."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.image) != 3 or min(self.image) < 1:
            raise ValueError(
                f"VisionTransformer.image is {self.image}; it must be height, width, channels, each 1 or more"
            )
        if self.patch < 1 or not 1 <= self.step <= self.patch:
            raise ValueError(
                f"VisionTransformer.patch is {self.patch} and stride {self.stride}; the patch must be 1 or more, the "
                "stride from 1 to the patch"
            )
        for size in self.image[:2]:
            if size < self.patch or (size - self.patch) % self.step:
                raise ValueError(
                    f"VisionTransformer.patch is {self.patch} and stride {self.stride}; in {size} pixels of "
                    f"VisionTransformer.image = {self.image} the last patch does not end where the image does"
                )

    @property
    def tokens(self) -> int:
        """Patches of an image, S."""
        height, width = ((size - self.patch) // self.step + 1 for size in self.image[:2])
        return height * width

    @property
    def step(self) -> int:
        """Pixels from one patch to the next."""
        return self.patch if self.stride is None else self.stride

    def build_inputs(self, key: jax.Array) -> "Patches":
        return Patches(self, key)

    def example(self, rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *self.image), jnp.uint8)


class Patches(Inputs):
    """Kernel [patch * patch * channels, D] and positions [S, D]."""

    linear_kernels = {"kernel": 1}  # see models.quantization

    def __init__(self, config: VisionTransformer, key: jax.Array):
        kernel, positions = jax.random.split(key)
        size = config.patch**2 * config.image[2]
        self.image, self.patch, self.step = config.image, config.patch, config.step
        self.kernel = nnx.Param(jax.nn.initializers.lecun_normal()(kernel, (size, config.width)), axes=(None, "embed"))
        self.positions = nnx.Param(
            0.02 * jax.random.normal(positions, (config.tokens, config.width)), axes=(None, "embed")
        )

    def __call__(self, inputs: UInt8[Array, "B height width channels"] | Float[Array, "B height width channels"]):
        """Vectors of images: bytes, brought to -1..1, or floats, taken as they are.

        Raises:
            ValueError: the images have another size than the configuration's.
        """
        if inputs.shape[1:] != self.image:
            raise ValueError(f"inputs are images of {inputs.shape[1:]}; VisionTransformer.image is {self.image}")
        pixels = inputs.astype(jnp.float32) / 127.5 - 1 if inputs.dtype == jnp.uint8 else inputs
        x = linear(cut_patches(pixels, self.patch, self.step), self.kernel[...]) + self.positions[...][None]
        shape = x.shape[:2]
        return Vectors(x, jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))


def cut_patches(images: Float[Array, "B height width channels"], patch: int, step: int) -> Float[Array, "B S size"]:
    """Patches from left to right and from top to bottom, each one row by row with its channels innermost."""
    rows, height, width, channels = images.shape
    if step == patch:  # a plain transposition, which costs less
        cut = images.reshape(rows, height // patch, patch, width // patch, patch, channels).swapaxes(2, 3)
        return cut.reshape(rows, -1, patch * patch * channels)
    down, right = height - patch + 1, width - patch + 1
    shifted = [images[:, y : y + down : step, x : x + right : step] for y in range(patch) for x in range(patch)]
    return jnp.stack(shifted, axis=3).reshape(rows, -1, patch * patch * channels)
