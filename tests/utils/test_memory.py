from pathlib import Path

import psutil
import pytest

from resnet_in1k.utils import device as memory

VERSION_2 = {"max": "memory.max", "current": "memory.current", "cache": "inactive_file"}
VERSION_1 = {"max": "memory.limit_in_bytes", "current": "memory.usage_in_bytes", "cache": "total_inactive_file"}


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    return tmp_path


def limit(folder: Path, names: dict[str, str], maximum: str, current: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names["max"]).write_text(f"{maximum}\n")
    (folder / names["current"]).write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names['cache']} {cache}\n")


def test_no_limit_is_the_machine(cgroups: Path):
    own = psutil.virtual_memory().available
    assert memory.available_memory() == pytest.approx(own, rel=0.2)
    (cgroups / "own").write_text("0::/job\n")
    limit(cgroups / "job", VERSION_2, "max", 900, 0)
    assert memory.available_memory() == pytest.approx(own, rel=0.2)


@pytest.mark.parametrize(
    ("line", "root", "names"), [("0::/job/step_0", "", VERSION_2), ("4:memory:/job/step_0", "memory", VERSION_1)]
)
def test_the_narrowest_limit_counts(cgroups: Path, line: str, root: str, names: dict[str, str]):
    """Slurm limits the job and its step; the page cache within is no loss."""
    (cgroups / "own").write_text(f"9:name=systemd:/\n{line}\n")
    limit(cgroups / root / "job", names, "5000", 3000, 500)
    limit(cgroups / root / "job/step_0", names, "9000", 3000, 500)
    assert memory.available_memory() == 2500
    limit(cgroups / root / "job/step_0", names, "4000", 3900, 0)
    assert memory.available_memory() == 100
    limit(cgroups / root / "job/step_0", names, "4000", 5000, 0)
    assert memory.available_memory() == 0
