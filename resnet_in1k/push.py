"""Hub folder to the Hub: signed in, one commit, verified; whatever interrupts it, running it again finishes it."""

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch

from resnet_in1k import files
from resnet_in1k.errors import UserError
from resnet_in1k.hub import build_hub_folder
from resnet_in1k.model import WEIGHTS_NAME, ResNet, load_model
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.stopwatch import size

T = TypeVar("T")

OWNED = ("recipe.json", "curves.png", ".eval_results/*")
"""What an earlier publication may have left that is no part of this one: deleted with it."""
MAX_ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 300.0
"""The Hub counts requests in windows of five minutes."""
TRANSIENT_STATUS = {408, 409, 412, 425, 429, 500, 502, 503, 504}
"""412: a commit came between, most often our own, whose answer was lost."""


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Publish a run's best weights, with their metrics as a model card."""

    run: Path
    """The run folder; what is published is written to its hub/ first."""
    repo_id: str
    """USER/NAME on the Hub."""
    license: str = "apache-2.0"
    """Licence of the weights, as the Hub names it."""
    private: bool = False
    """Make the repository private, if it is made now."""
    revision: str = "main"
    """The branch to publish on, made if need be."""
    pr: bool = False
    """Propose it in a pull request, in place of publishing it on a branch."""
    dry_run: bool = False
    """Show what would be published, and stop."""

    def __post_init__(self) -> None:
        if self.pr and self.revision != "main":
            raise UserError("--pr proposes a change to main; leave out --revision")


def push(options: PushOptions, say: Callable[[str], None] = print) -> None:
    """Build RUN/hub, show it, upload it and verify what arrived.

    Raises:
        UserError: before anything is sent, if run, repository id, licence or token will not do; or when the Hub
            refuses, or cannot be reached after several attempts.
    """
    folder = build_hub_folder(RunFolder(options.run), options.repo_id, options.license)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    width = max(len(str(path.relative_to(folder))) for path in paths)
    where = "a pull request" if options.pr else f"branch {options.revision}"
    say(f"{options.repo_id}, {where} ← {folder}" + (", private" * options.private))
    for path in paths:
        say(f"  {path.relative_to(folder)!s:<{width}}  {size(path.stat().st_size):>8}")
    if options.dry_run:
        say("dry run: nothing was sent")
        return
    Push(options, folder, say).run()


class Push:
    """One publication; each step can be repeated without harm."""

    def __init__(self, options: PushOptions, folder: Path, say: Callable[[str], None]):
        from huggingface_hub import HfApi, get_token

        self.options, self.folder, self.say = options, folder, say
        self.token = get_token() or ""
        if not self.token:
            raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")
        self.api: HfApi = HfApi(token=self.token)
        self.local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.title = f"Publish {options.repo_id.split('/')[1]}, {files.sha256_of(folder / WEIGHTS_NAME)[:12]}"
        self.user = ""
        self.so_far = "nothing was published"

    def run(self) -> None:
        """Raises UserError, or KeyboardInterrupt after saying how far it came."""
        try:
            self._sign_in()
            revision = self._prepare()
            oid = self._publish(revision)
            self._verify(oid)
        except KeyboardInterrupt:
            self.say(f"interrupted: {self.so_far}; the same command finishes it")
            raise
        place = f', revision="{revision}"' if revision != "main" else ""
        self.say(f'load it:  ResNet.from_pretrained("{self.options.repo_id}"{place})')

    def _sign_in(self) -> None:
        who = self._persistently("sign in", self.api.whoami)
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        owner = self.options.repo_id.split("/")[0]
        if role == "read":
            raise UserError(
                f"the token of {who['name']} may only read; make one that may write: "
                f"{self.api.endpoint}/settings/tokens"
            )
        allowed = {who["name"], *(organisation["name"] for organisation in who.get("orgs", []))}
        if owner not in allowed and not self.options.pr:
            raise UserError(
                f"--repo-id {self.options.repo_id}: {who['name']} may not publish as {owner}; choose "
                f"{' or '.join(f'{name}/…' for name in sorted(allowed))}, or propose it with --pr"
            )
        self.user = who["name"]
        self.say(f"signed in as {self.user}")

    def _prepare(self) -> str:
        """The repository and the branch are there after it; returns the branch."""
        options, api = self.options, self.api
        there = self._persistently("look for the repository", lambda: api.repo_exists(options.repo_id))
        if not there:
            self._persistently(
                "create the repository",
                lambda: api.create_repo(options.repo_id, private=options.private or None, exist_ok=True),
            )
            self.so_far = f"{options.repo_id} was created, and is still empty"
            self.say(f"created {api.endpoint}/{options.repo_id}")
        elif options.private and not self._persistently("look", lambda: api.repo_info(options.repo_id)).private:
            raise UserError(
                f"{options.repo_id} is there already and public; leave out --private, or change its settings"
            )
        if options.pr:
            if there and self._persistently("look", lambda: self._is_published("main")):
                return "main"  # merged, or published before: nothing is left to propose
            return f"refs/pr/{self._persistently('open the pull request', self._pull_request)}"
        if options.revision != "main":
            self._persistently(
                "create the branch", lambda: api.create_branch(options.repo_id, branch=options.revision, exist_ok=True)
            )
        return options.revision

    def _pull_request(self) -> int:
        """The number of this user's own that proposes these very weights; opened if there is none."""
        api, repo_id = self.api, self.options.repo_id
        for discussion in api.get_repo_discussions(repo_id, discussion_type="pull_request"):
            mine = discussion.author == self.user and discussion.title == self.title
            if mine and discussion.status in ("draft", "open"):
                return discussion.num
        return api.create_pull_request(repo_id, title=self.title, description="See README.md.").num

    def _publish(self, revision: str) -> str:
        """Upload in one commit, unless just these files are there; returns the commit."""
        api, repo_id = self.api, self.options.repo_id

        def publish() -> tuple[str, bool]:
            head = api.repo_info(repo_id, revision=revision, files_metadata=True)
            if self._are_there(head.siblings or []):
                return head.sha, False
            self.so_far = f"whether all has arrived in {repo_id} is not known"
            # With the parent given, a commit whose answer was lost cannot be made a second time.
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=self.folder,
                revision=revision,
                commit_message=self.title,
                parent_commit=head.sha,
                delete_patterns=list(OWNED),
            )
            return commit.oid, True

        oid, new = self._persistently("upload", publish)
        self.so_far = f"all is published in commit {oid[:12]}, but not verified"
        self.say(f"published in commit {oid[:12]}" if new else f"nothing to do: commit {oid[:12]} has just these files")
        if revision.startswith("refs/pr/"):
            number = int(revision.rpartition("/")[2])
            self.say(f"proposed in {api.endpoint}/{repo_id}/discussions/{number}")
        return oid

    def _is_published(self, revision: str) -> bool:
        head = self.api.repo_info(self.options.repo_id, revision=revision, files_metadata=True)
        return self._are_there(head.siblings or [])

    def _are_there(self, siblings: list[Any]) -> bool:
        """Whether each local file is in the repository with the same content, and nothing of an earlier publication."""
        remote = {file.rfilename: file for file in siblings}
        stale = [name for name in remote.keys() - self.local.keys() if any(fnmatch(name, kind) for kind in OWNED)]
        return (
            not stale
            and self.local.keys() <= remote.keys()
            and all(
                (remote[name].lfs.sha256 == files.sha256_of(path))
                if remote[name].lfs is not None
                else (remote[name].blob_id == files.git_blob_sha1_of(path))
                for name, path in self.local.items()
            )
        )

    def _verify(self, oid: str) -> None:
        """Download the commit into an empty cache: the same bytes, and the same logits."""
        for attempt in (1, 2):
            with tempfile.TemporaryDirectory() as cache:
                there = Path(self._persistently("download it again", lambda cache=cache: self._download(oid, cache)))
                differing = [
                    name
                    for name, path in self.local.items()
                    if not (there / name).is_file() or files.sha256_of(there / name) != files.sha256_of(path)
                ]
                if not differing:
                    self._compare_logits(there)
                    break
                if attempt == 2:
                    raise UserError(
                        f"what was downloaded from {self.options.repo_id} is not what was published: "
                        f"{', '.join(differing)} differ; run the same command again to verify it"
                    )
        self.so_far = f"all is published in commit {oid[:12]} and verified"
        self.say(f"verified: {len(self.local)} files downloaded again, checksums and logits are equal")

    def _download(self, oid: str, cache: str) -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            self.options.repo_id, revision=oid, cache_dir=cache, token=self.token, allow_patterns=list(self.local)
        )

    def _compare_logits(self, downloaded: Path) -> None:
        """Between the run's own weights and what others will load."""
        images = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
        with torch.inference_mode():
            ours = load_model(self.options.run / WEIGHTS_NAME).eval()(images)
            theirs = ResNet.from_pretrained(downloaded)(images)
        if not torch.equal(ours, theirs):
            raise UserError(
                f"{self.options.run / WEIGHTS_NAME} has changed since it was published; run the same command again"
            )

    def _persistently(self, what: str, call: Callable[[], T]) -> T:
        """Call it again, a few times and with growing pauses, while what is wrong may pass.

        Raises:
            UserError: when it is wrong for good.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return call()
            except UserError:
                raise
            except Exception as error:  # the client's errors share no base across its versions
                wait_seconds = _seconds_to_wait(error, attempt)
                reason = self._reason(error)
                if wait_seconds is None or attempt == MAX_ATTEMPTS:
                    raise UserError(
                        f"could not {what}: {reason}; {self.so_far}, and the same command goes on from there"
                    ) from None
                self.say(f"could not {what} ({reason}); trying again in {wait_seconds:.0f} s")
                time.sleep(wait_seconds)
        raise AssertionError("the loop returns or raises")

    def _reason(self, error: BaseException) -> str:
        """In one line, without the token."""
        status = next((status for status in map(_status, _chain(error)) if status), None)
        meanings = {
            401: "the token is not valid (401); run `hf auth login`",
            403: f"the token may not do this in {self.options.repo_id} (403)",
            429: "too many requests (429)",
        }
        if status in meanings:
            return meanings[status]
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines[0] if lines else type(error).__name__).replace(self.token, "…")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    with contextlib.suppress(AttributeError):
        return int(error.response.status_code)  # type: ignore[attr-defined]
    return None


def _seconds_to_wait(error: BaseException, attempt: int) -> float | None:
    """None if waiting does not help: refused, or nothing that a network does."""
    for part in _chain(error):
        if (status := _status(part)) is not None:
            if status not in TRANSIENT_STATUS:
                return None
            headers = part.response.headers  # type: ignore[attr-defined]
            window = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))  # the Hub's own way to say when
            asked = headers.get("Retry-After", "") or (window[1] if window and status == 429 else "")
            return min(float(asked), LONGEST_WAIT_SECONDS) if asked.isdigit() else 2.0 ** (attempt - 1)
        kinds = {cls.__name__ for cls in type(part).__mro__}  # httpx's or httpx2's: the client changed with 2.0
        if kinds & {"TransportError", "ConnectionError", "TimeoutError"}:
            return 2.0 ** (attempt - 1)
    return None
