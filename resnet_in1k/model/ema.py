"""Exponential moving average of weights and buffers, by torch.optim.swa_utils.

An average of recent weights is closer to the minimum than the weights of any one step, while the learning rate is high
(https://arxiv.org/abs/1803.05407; for its use in these recipes https://github.com/pytorch/vision/pull/4406).
"""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.utils import imagenet


def steps_between_updates(schedule: StepCounts) -> int:
    """The recipe's, but at least one update in each epoch: on small data an epoch can have fewer steps."""
    return min(schedule.recipe.ema_every_steps, schedule.steps_per_epoch)


def adjusted_decay(schedule: StepCounts) -> float:
    """The decay of one update, from the recipe's, as torchvision's training reference adjusts it: 1 - decay grows by
    the steps between two updates × global batch / epochs.

    That makes the average cover the same share of a run, however long it is and whatever its batch, for ImageNet's
    number of images. Here it does for any number: with n images 1 - decay also grows by ImageNet's number / n.
    """
    recipe = schedule.recipe
    adjustment = steps_between_updates(schedule) * recipe.global_batch_size / recipe.epochs
    of_other_data = imagenet.NUM_TRAIN_IMAGES / schedule.num_train_images
    return 1 - min(1.0, (1 - recipe.ema_decay) * adjustment * of_other_data)


class MovingAverage:
    """Of a model in training. It has no state but the averaged tensors: what an update does depends on the step."""

    def __init__(self, model: torch.nn.Module, schedule: StepCounts):
        """`model`: a copy that is this average's from now on; it has clean keys."""
        self._average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(adjusted_decay(schedule)), use_buffers=True
        )
        self._every_steps = steps_between_updates(schedule)
        self._last_copied_step = max(schedule.warmup_steps, self._every_steps)

    @property
    def model(self) -> torch.nn.Module:
        return self._average.module

    def update(self, model: torch.nn.Module, step: int) -> None:
        """After optimizer step `step`. Until warm-up ends, the average is a copy, as torchvision has it: the first
        weights are not worth remembering."""
        if step % self._every_steps == 0:
            self._average.n_averaged.fill_(step > self._last_copied_step)  # 0: copy
            self._average.update_parameters(model)
