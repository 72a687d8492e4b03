"""What benchmark.py compares with: the tutorial's own loader and step, decoding alone, and a bare training loop."""

import contextlib
import io
from collections.abc import Callable

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import decode
from resnet_in1k.data.loader import PREFETCH_FACTOR
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.device import PRECISIONS
from resnet_in1k.utils.pool import worker_context


class TutorialDataset(Dataset):
    """The tutorial's: Pillow, and all of its transforms image by image, to float tensors."""

    def __init__(self, source: Source, recipe: Recipe):
        self._source = source
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe.image_size),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(10),
                transforms.ColorJitter(0.2, 0.2, 0.2, 0.2),
                transforms.ToTensor(),
                transforms.Normalize(imagenet.MEAN, imagenet.STD),
            ]
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(io.BytesIO(self._source.read(index).tobytes())) as image:
            return self._transform(image.convert("RGB")), int(self._source.labels[index])


class DecodeOnly(Dataset):
    """The limit of any loader: workers that decode, and send nothing back."""

    def __init__(self, source: Source):
        self._source = source

    def __getitem__(self, index: int) -> int:
        return decode(self._source.read(index)).ndim


def reference_loader(dataset: Dataset, batches: list[list[int]], workers: int, pin_memory: bool) -> DataLoader:
    """torch's DataLoader, with as many batches ahead as ours has."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=PREFETCH_FACTOR,
        pin_memory=pin_memory,
        multiprocessing_context=worker_context(),
    )


class TutorialStep:
    """The tutorial's loop: float32, NCHW, plain SGD, and the loss read at each step."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self._model = getattr(torchvision.models, recipe.model)().to(device)
        self._loss_function = torch.nn.CrossEntropyLoss()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        self._optimizer.zero_grad()
        loss = self._loss_function(self._model(images), labels)
        loss.backward()
        self._optimizer.step()
        return loss.item()


def bare_step(
    recipe: Recipe, device: torch.device, mixed_precision: str
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """The least that trains in our precision: no Accelerate, no schedule, no log."""
    model = getattr(torchvision.models, recipe.model)().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    dtype = PRECISIONS[mixed_precision].autocast_dtype

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
