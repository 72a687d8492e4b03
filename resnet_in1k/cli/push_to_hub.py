"""Publish a run folder on the Hub, with a model card."""

from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.options import PushOptions
from resnet_in1k.hub.hub_folder import build_hub_folder
from resnet_in1k.hub.upload import Upload
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.format import file_size


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
