from pathlib import Path

import psutil
import pytest

from resnet_in1k.utils import device as memory


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    return tmp_path


def limit(folder: Path, maximum: str, current: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def test_no_limit_is_the_machine(cgroups: Path):
    own = psutil.virtual_memory().available
    assert memory.available_memory() == pytest.approx(own, rel=0.2)
    (cgroups / "own").write_text("0::/job\n")
    limit(cgroups / "job", "max", 900, 0)
    assert memory.available_memory() == pytest.approx(own, rel=0.2)


def test_the_narrowest_limit_counts(cgroups: Path):
    """Slurm limits the job and its step; the page cache within is no loss."""
    (cgroups / "own").write_text("9:name=systemd:/\n0::/job/step_0\n")
    limit(cgroups / "job", "5000", 3000, 500)
    limit(cgroups / "job/step_0", "9000", 3000, 500)
    assert memory.available_memory() == 2500
    limit(cgroups / "job/step_0", "4000", 3900, 0)
    assert memory.available_memory() == 100
    limit(cgroups / "job/step_0", "4000", 5000, 0)
    assert memory.available_memory() == 0
