"""Hub folder to the Hub: one commit, verified by downloading it; after any failure, running it again completes it."""

import hashlib
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch

from resnet_in1k.model.pretrained import ResNet
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.weights import WEIGHTS_NAME
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

T = TypeVar("T")

MAIN = "main"
DELETED_IF_ABSENT = ("recipe.json", "curves.png", "model.onnx", "model.pt2", ".eval_results/*")
"""Files of an earlier publication that are deleted if this one does not have them."""
MAX_ATTEMPTS = 5
MAX_WAIT_SECONDS = 300.0
"""The Hub counts requests in windows of five minutes."""
TRANSIENT_STATUS = {408, 409, 412, 425, 429, 500, 502, 503, 504}
"""412: another commit came first, most often our own, whose response was lost."""
TRANSIENT_ERRORS = {"TransportError", "ConnectionError", "TimeoutError"}
"""By name: huggingface_hub 1 uses httpx, 2 uses httpx2."""
STATUS_MEANINGS = {
    401: "the token is not valid (401); run `hf auth login`",
    403: "the token has no permission for this (403)",
    429: "too many requests (429)",
}


@dataclass
class Upload:
    """The upload of one hub folder; each step can be repeated without harm. Raises UserError if there is no token."""

    folder: Path
    """From `build_hub_folder`."""
    run_weights: Path
    """The run's own weights file: the published weights must give its logits."""
    repo_id: str
    private: bool
    revision: str
    """The branch to commit to, created if it does not exist."""
    pr: bool
    """Open a pull request instead."""
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi, get_token

        self.token = get_token() or ""
        if not self.token:
            raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")
        self.api: HfApi = HfApi(token=self.token)
        self.files = files_in(self.folder)
        self.title = f"Publish {self.repo_id.split('/')[1]}, {files.sha256_of(self.folder / WEIGHTS_NAME)[:12]}"
        self.progress = "nothing was published"

    def run(self) -> None:
        """Upload and verify.

        Raises:
            UserError: if the Hub refuses, cannot be reached after several attempts, or serves other files.
            KeyboardInterrupt: after reporting what is published by then.
        """
        try:
            user = self._sign_in()
            self._validate_card()
            revision = self._prepare_revision(user)
            self._verify(self._commit(revision))
        except KeyboardInterrupt:
            self.say(f"interrupted: {self.progress}; run the same command to complete it")
            raise
        argument = f', revision="{revision}"' if revision != MAIN else ""
        self.say(f'load it:  ResNet.from_pretrained("{self.repo_id}"{argument})')

    def _sign_in(self) -> str:
        """The user's name; raises UserError if the token does not permit the publication."""
        account = self._with_retries("sign in", self.api.whoami)
        user, owner = account["name"], self.repo_id.split("/")[0]
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(
                f"the token of {user} is read-only; create one with write access: {self.api.endpoint}/settings/tokens"
            )
        allowed = {user, *(organization["name"] for organization in account.get("orgs", []))}
        if owner not in allowed and not self.pr:
            raise UserError(
                f"--repo-id {self.repo_id}: {user} has no permission to publish as {owner}; use "
                f"{' or '.join(f'{name}/…' for name in sorted(allowed))}, or open a pull request by --pr"
            )
        self.say(f"signed in as {user}")
        return user

    def _validate_card(self) -> None:
        """By the Hub, which knows the licenses there are; before anything is created."""
        from huggingface_hub import ModelCard

        card = ModelCard.load(self.folder / "README.md")

        def validate() -> None:
            try:
                card.validate()
            except ValueError as error:
                reason = " ".join(str(error).split())
                reason = reason[:300] + "…" * (len(reason) > 300)  # the Hub lists all licenses
                raise UserError(f"the Hub refuses the card's metadata: {reason}; {self.progress}") from None

        self._with_retries("validate the card", validate)

    def _prepare_revision(self, user: str) -> str:
        """Create repository, branch or pull request if they do not exist; returns the revision to commit to."""
        api, repo_id = self.api, self.repo_id
        exists = self._with_retries("look up the repository", lambda: api.repo_exists(repo_id))
        if not exists:
            create = {"private": self.private or None, "exist_ok": True}
            self._with_retries("create the repository", lambda: api.create_repo(repo_id, **create))
            self.progress = f"{repo_id} was created, and is still empty"
            self.say(f"created {api.endpoint}/{repo_id}")
        elif self.private and not self._with_retries("look up the repository", lambda: api.repo_info(repo_id)).private:
            raise UserError(f"{repo_id} exists and is public; leave out --private, or change its settings")
        if self.pr:
            if exists and self._with_retries("look up the files", lambda: self._is_up_to_date(self._head(MAIN))):
                return MAIN  # merged or published before: there is nothing to propose
            return f"refs/pr/{self._with_retries('open the pull request', lambda: self._pull_request(user))}"
        if self.revision != MAIN:
            branch = {"branch": self.revision, "exist_ok": True}
            self._with_retries("create the branch", lambda: api.create_branch(repo_id, **branch))
        return self.revision

    def _pull_request(self, user: str) -> int:
        """The number of this user's open pull request with these weights; of a new one if there is none."""
        for discussion in self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request"):
            if (discussion.author, discussion.title) == (user, self.title) and discussion.status in ("draft", "open"):
                return discussion.num
        return self.api.create_pull_request(self.repo_id, title=self.title, description="See README.md.").num

    def _commit(self, revision: str) -> str:
        """Upload in one commit, unless the revision has exactly these files; returns the commit's id."""

        def upload() -> tuple[str, str]:
            head = self._head(revision)
            if self._is_up_to_date(head):
                return head.sha, f"nothing to do: commit {head.sha[:12]} has exactly these files"
            self.progress = f"it is not known whether all files are in {self.repo_id}"
            commit = self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=self.folder,
                revision=revision,
                commit_message=self.title,
                parent_commit=head.sha,  # a commit whose response was lost cannot be made a second time
                delete_patterns=list(DELETED_IF_ABSENT),
            )
            return commit.oid, f"published in commit {commit.oid[:12]}"

        commit, outcome = self._with_retries("upload", upload)
        self.progress = f"all files are published in commit {commit[:12]}, but not verified"
        self.say(outcome)
        if revision.startswith("refs/pr/"):
            self.say(f"pull request: {self.api.endpoint}/{self.repo_id}/discussions/{revision.rpartition('/')[2]}")
        return commit

    def _head(self, revision: str) -> Any:
        return self.api.repo_info(self.repo_id, revision=revision, files_metadata=True)

    def _is_up_to_date(self, head: Any) -> bool:
        """Whether a commit has each of our files with the same content, and none that is to be deleted."""
        remote = {file.rfilename: file for file in head.siblings or []}
        if any(fnmatch(name, pattern) for name in remote.keys() - self.files.keys() for pattern in DELETED_IF_ABSENT):
            return False

        def is_same(name: str, path: Path) -> bool:
            lfs = remote[name].lfs
            return files.sha256_of(path) == lfs.sha256 if lfs else git_blob_sha1_of(path) == remote[name].blob_id

        return self.files.keys() <= remote.keys() and all(is_same(name, path) for name, path in self.files.items())

    def _verify(self, commit: str) -> None:
        """Raises UserError if the commit, downloaded, has other files or other logits."""
        # Twice: the client does not notice a download with changed bytes.
        differing = self._differing_in_download(commit) and self._differing_in_download(commit)
        if differing:
            raise UserError(
                f"the files downloaded from {self.repo_id} are not those published: {', '.join(differing)} differ; "
                "run the same command again to verify them"
            )
        self.progress = f"all files are published in commit {commit[:12]} and verified"
        self.say(f"verified: {len(self.files)} files downloaded, with equal checksums and logits")

    def _differing_in_download(self, commit: str) -> list[str]:
        """The files that differ after a download into an empty cache; if there are none, logits are compared, too."""
        with tempfile.TemporaryDirectory() as cache:
            arguments = {"revision": commit, "cache_dir": cache, "allow_patterns": list(self.files)}
            download = self._with_retries(
                "download the files for verification", lambda: self.api.snapshot_download(self.repo_id, **arguments)
            )
            downloaded = files_in(Path(download))
            differing = [
                name
                for name, path in self.files.items()
                if name not in downloaded or files.sha256_of(downloaded[name]) != files.sha256_of(path)
            ]
            if not differing:
                self._compare_logits(Path(download))
            return differing

    def _compare_logits(self, downloaded: Path) -> None:
        images = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
        with torch.inference_mode():
            expected = load_model(self.run_weights).eval()(images)
            actual = ResNet.from_pretrained(downloaded)(images)
        if not torch.equal(expected, actual):
            raise UserError(f"{self.run_weights} has changed since it was published; run the same command again")

    def _with_retries(self, what: str, call: Callable[[], T]) -> T:
        """Call again, with growing pauses, after an error that may be temporary.

        Raises:
            UserError: for any other error, and after the last attempt.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return call()
            except UserError:
                raise
            except Exception as error:  # the client's errors have no common base class across its versions
                status, wait_seconds = cause_and_wait(error, attempt)
                reason = STATUS_MEANINGS.get(status or 0) or first_line(error).replace(self.token, "…")
                if wait_seconds is None or attempt == MAX_ATTEMPTS:
                    raise UserError(
                        f"could not {what}: {reason}; {self.progress}; run the same command to complete it"
                    ) from None
                self.say(f"could not {what} ({reason}); trying again in {wait_seconds:.0f} s")
                time.sleep(wait_seconds)
        raise AssertionError("the loop returns or raises")


def files_in(folder: Path) -> dict[str, Path]:
    """All files below a folder by their relative POSIX path, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def git_blob_sha1_of(path: Path) -> str:
    """The id that git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def cause_and_wait(error: BaseException, attempt: int) -> tuple[int | None, float | None]:
    """The HTTP status that caused an error, if one did; and the seconds before the next attempt, if it is temporary."""
    cause: BaseException | None = error
    while cause is not None:
        if (response := getattr(cause, "response", None)) is not None:
            status = int(response.status_code)
            if status not in TRANSIENT_STATUS:
                return status, None
            window = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))  # the Hub's rate limits
            requested = response.headers.get("Retry-After", "") or (window[1] if window and status == 429 else "")
            return status, min(float(requested), MAX_WAIT_SECONDS) if requested.isdigit() else 2.0 ** (attempt - 1)
        if TRANSIENT_ERRORS & {cls.__name__ for cls in type(cause).__mro__}:
            return None, 2.0 ** (attempt - 1)
        cause = cause.__cause__ or cause.__context__
    return None, None
