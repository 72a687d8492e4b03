"""The flags that change how images are prepared for given weights."""

from dataclasses import dataclass, field

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.model.foreign import RGB
from resnet_in1k.model.resolve import Weights
from resnet_in1k.recipes.recipe import Interpolation
from resnet_in1k.utils.validation import above, at_least


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """Each by default as the weights were evaluated, or as their own config.json says."""

    image_size: int | None = field(default=None, metadata=at_least(1))
    """Side of the center crop, in pixels; by default as the weights were evaluated."""
    eval_crop_ratio: float | None = field(default=None, metadata=above(0, at_most=1))
    """The short side is resized to image_size / this before the crop; by default as the weights were evaluated."""
    eval_interpolation: Interpolation | None = None
    """How images are resized; by default as the weights were evaluated."""
    mean: RGB | None = None
    """Of the RGB values from 0 to 1, by which images are normalized; by default as the weights were evaluated."""
    std: RGB | None = None
    """Standard deviation of the same."""

    def for_weights(self, weights: Weights) -> EvalPreprocessing:
        return weights.preprocessing(
            self.image_size, self.eval_crop_ratio, self.eval_interpolation, self.mean, self.std
        )
