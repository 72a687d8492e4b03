"""Some recipes, small, one after the other by the processes of one launch: each is trained, rewound in a copy, resumed.

Run as `python -m torch.distributed.run … tests/helpers/recipes_by_two.py DATA OUTPUT RECIPE…`.
"""

import sys
from pathlib import Path


def main(data: Path, output: Path, names: list[str]) -> None:
    from torch.distributed import PrefixStore

    from helpers.training import narrow_resnet18, rewind, run, small_version
    from resnet_in1k.utils import launch

    store = launch.Launch.connect().store
    for name in names:
        recipe, how = small_version(name)
        for again in ("", "-resumed"):
            # A training is made to be the only one of its launch: what one has left in the store is not for the next.
            launch.Launch._connect_store = lambda self, key=name + again: PrefixStore(key, store)
            with narrow_resnet18():
                folder = run(recipe, data, output / (name + again), resume=True, **how)
            if not again and launch.rank() == 0:
                rewind(folder, 2, output / f"{name}-resumed")
                store.set(f"{name} copied", "")
            store.wait([f"{name} copied"])


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(root), str(root / "tests")]
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
