"""All named recipes, small, one after the other by the processes of one launch; what is there already is resumed.

Run as `python -m torch.distributed.run … tests/helpers/recipes_by_two.py DATA OUTPUT`.
"""

import sys
from pathlib import Path


def main(data: Path, output: Path) -> None:
    from torch.distributed import PrefixStore

    from helpers.training import reset_accelerate_state, run, shallow_resnet18, small_version
    from resnet_in1k.recipes.published import RECIPES
    from resnet_in1k.utils import launch

    connect = launch._connect_store
    for name in RECIPES:
        recipe, how = small_version(name)
        reset_accelerate_state()
        # A training is made to be the only one of its launch: what one has left in the store is not for the next.
        launch._connect_store = lambda name=name: PrefixStore(name, connect())
        with shallow_resnet18():
            run(recipe, data, output / name, resume=True, **how)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(root), str(root / "tests")]
    main(Path(sys.argv[1]), Path(sys.argv[2]))
