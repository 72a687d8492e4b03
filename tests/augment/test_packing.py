import itertools

import torch

from resnet_in1k.augment.packing import ALIGNMENT, pack

DRAWS = [
    {"mirrored": torch.tensor([True, False, True]), "sizes": [[1, 2], [3, 0]]},
    {},
    {"degrees": torch.tensor([1.5, -2.0, 3.0]), "rows": torch.arange(12).view(3, 4).T, "none": torch.empty(0, 2)},
    {"weight": torch.tensor(0.25, dtype=torch.float64)},
]


def test_what_is_packed_comes_back_with_its_names_types_and_shapes():
    unpacked = pack(DRAWS, pin=False).to(torch.device("cpu"))
    assert [each.keys() for each in unpacked] == [each.keys() for each in DRAWS]
    assert unpacked[0].pop("sizes") == [[1, 2], [3, 0]]
    for ours, theirs in zip(unpacked, DRAWS, strict=True):
        for name, tensor in ours.items():
            assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
            assert torch.equal(tensor, theirs[name])


def test_all_tensors_are_in_one_buffer_and_do_not_overlap():
    packed = pack(DRAWS, pin=False)
    tensors = [value for each in packed.to(torch.device("cpu")) for value in each.values() if torch.is_tensor(value)]
    start = packed.buffer.data_ptr()
    assert packed.buffer.nbytes < 3 + 3 * 4 + 12 * 8 + 8 + len(tensors) * ALIGNMENT
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {start}
    places = sorted((tensor.data_ptr() - start, tensor.nbytes) for tensor in tensors if tensor.nbytes)
    assert all(place % ALIGNMENT == 0 for place, _ in places)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))


def test_nothing_at_all_can_be_packed():
    assert pack([], pin=False).to(torch.device("cpu")) == []
    assert pack([{}], pin=False).to(torch.device("cpu")) == [{}]
