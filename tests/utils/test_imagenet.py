from resnet_in1k.utils import imagenet


def test_wordnet_ids_in_the_order_of_their_labels():
    """Labels number the folder names in alphabetical order; the names are at torchvision's labels."""
    names = imagenet.names_by_wnid()
    assert list(names) == sorted(names)
    assert len(names) == len(set(names.values())) == 1000
    assert [list(names).index(wnid) for wnid in ("n01440764", "n01443537", "n15075141")] == [0, 1, 999]
    known = {
        "n01440764": "tench",
        "n02099601": "golden retriever",
        "n03445777": "golf ball",
        "n15075141": "toilet tissue",
    }
    assert {wnid: names[wnid] for wnid in known} == known
