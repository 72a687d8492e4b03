"""The training images that were replaced because they cannot be read: collected from all processes, counted, listed."""

from collections.abc import Callable
from pathlib import Path

from accelerate.utils import gather_object

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import max_bad_images, too_many_bad_images
from resnet_in1k.train.checkpoint import TrainState
from resnet_in1k.train.writer import RunWriter
from resnet_in1k.utils.errors import UserError


class SkippedImages:
    def __init__(self, source: Source, writer: RunWriter, listed_in: Path, report: Callable[[str], None]):
        self._source, self._writer, self._listed_in, self._report = source, writer, listed_in, report
        self._uncollected: dict[int, str] = {}

    def add(self, bad_images: dict[int, str]) -> None:
        """Of one batch of this process, by index, with the decoder's reasons."""
        self._uncollected.update(bad_images)

    def collect(self, state: TrainState) -> None:
        """Add those of all processes to the state and to the list.

        Raises:
            UserError: if all processes together have skipped too many.
        """
        found = {index: reason for part in gather_object([self._uncollected]) for index, reason in part.items()}
        self._uncollected.clear()
        new = sorted(found.keys() - set(state.bad_images))
        if not new:
            return
        state.bad_images = sorted([*state.bad_images, *new])
        self.write_list(state)
        for index in new:
            self._report(f"replaced by the next: {self._source.image_name(index)} ({found[index]})")
        if len(state.bad_images) > max_bad_images(len(self._source)):
            raise UserError(
                f"{too_many_bad_images(state.bad_images, self._source)}; they are listed in {self._listed_in}"
            )

    def write_list(self, state: TrainState) -> None:
        self._writer.write_list(self._listed_in, [self._source.image_name(index) for index in state.bad_images])
