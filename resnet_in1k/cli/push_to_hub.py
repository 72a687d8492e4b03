"""Publish a run folder on the Hub, with a model card."""

from dataclasses import dataclass
from pathlib import Path

from resnet_in1k.cli.arguments import parse
from resnet_in1k.hub.hub_folder import build_hub_folder
from resnet_in1k.hub.upload import MAIN, Upload
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Publish a run's best weights, with their metrics as a model card.

    Examples:
        {prog} --run runs/tutorial --repo-id USER/NAME --dry-run
        {prog} --run runs/tutorial --repo-id USER/NAME --private
        {prog} --run runs/tutorial --repo-id USER/NAME --pr
    """

    run: Path
    """The run folder; its hub/ gets the files to publish."""
    repo_id: str
    """USER/NAME on the Hub."""
    license: str = "apache-2.0"
    """License of the weights, by the Hub's identifier."""
    private: bool = False
    """Create the repository as private."""
    revision: str = MAIN
    """The branch to publish on, created if it does not exist."""
    pr: bool = False
    """Open a pull request instead of publishing on a branch."""
    dry_run: bool = False
    """List the files that would be published, then exit."""

    def __post_init__(self) -> None:
        if self.pr and self.revision != MAIN:
            raise UserError("--pr opens a pull request to main; leave out --revision")


def main() -> None:
    """Build RUN/hub, list its files, upload them, download them again and compare."""
    options = parse(PushOptions)
    folder = build_hub_folder(RunFolder(options.run), options.repo_id, options.license)
    target = "a pull request" if options.pr else f"branch {options.revision}"
    print(f"{options.repo_id}, {target} ← {folder}" + (", private" * options.private))
    for path in sorted(folder.iterdir()):
        print(f"  {path.name:<17}  {file_size(path.stat().st_size):>8}")
    if options.dry_run:
        print("dry run: nothing was sent, and the Hub has not checked the card")
        return
    Upload(folder, options.repo_id, private=options.private, revision=options.revision, pr=options.pr).run()
