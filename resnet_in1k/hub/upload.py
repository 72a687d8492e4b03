"""Upload a hub folder in one commit, download it again and compare; after any failure a second run completes it."""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.model.weights import WEIGHTS_NAME
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

Say = Callable[[str], None]
MAIN = "main"
DELETED_IF_ABSENT = ("recipe.json", "curves.png", "model.onnx", "model.pt2", ".eval_results/*")
"""Files of an earlier publication that are deleted on the Hub if this one does not have them."""
MAX_ATTEMPTS = 5
MAX_WAIT_SECONDS = 300.0  # the Hub counts requests in windows of five minutes
# 412: parent_commit is outdated, usually because the first attempt succeeded and its response was lost.
TRANSIENT_STATUS = {408, 409, 412, 425, 429, 500, 502, 503, 504}
# By name, because the client's HTTP library differs between its versions.
TRANSIENT_ERRORS = {"TransportError", "ConnectionError", "TimeoutError"}
STATUS_MEANINGS = {
    401: "the token is not valid (401); run `hf auth login`",
    403: "the token has no permission for this (403)",
    429: "too many requests (429)",
}


@dataclass
class Upload:
    """Upload of one hub folder; `pr` opens a pull request instead of a commit to `revision`."""

    folder: Path
    run_weights: Path
    """The original weights: their logits are compared with those of the download."""
    repo_id: str
    private: bool
    revision: str
    pr: bool
    say: Say = print

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi, get_token

        self.token = get_token() or ""
        if not self.token:
            raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")
        self.api, self.files = HfApi(token=self.token), files_in(self.folder)
        self.title = f"Publish {self.repo_id.split('/')[1]}, {files.sha256_of(self.folder / WEIGHTS_NAME)[:12]}"
        self.progress = "nothing was published"

    def run(self) -> None:
        """Upload and verify; each step can be repeated without harm.

        Raises:
            UserError: if the Hub refuses, cannot be reached after several attempts, or serves different files.
            KeyboardInterrupt: after printing what has been published.
        """
        try:
            user = self._sign_in()
            self._retry("validate the card", self._validate_card)
            revision = self._prepare_revision(user)
            commit = self._retry("upload", self._commit, revision)
            self.progress = f"all files are published in commit {commit[:12]}, but not verified"
            if self.pr and revision != MAIN:
                self.say(f"pull request: {self.api.endpoint}/{self.repo_id}/discussions/{revision.rpartition('/')[2]}")
            self._retry("verify the published files", self._verify, commit)
        except KeyboardInterrupt:
            self.say(f"interrupted: {self.progress}; run the same command to complete it")
            raise
        revision_argument = f', revision="{revision}"' if revision != MAIN else ""
        self.say(f'load it:  ResNet.from_pretrained("{self.repo_id}"{revision_argument})')

    def _sign_in(self) -> str:
        """Return the user's name; raises UserError if the token does not permit the publication."""
        account = self._retry("sign in", self.api.whoami)
        user, owner = account["name"], self.repo_id.split("/")[0]
        allowed = [user, *(organization["name"] for organization in account.get("orgs", []))]
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            page = f"{self.api.endpoint}/settings/tokens"
            raise UserError(f"the token of {user} is read-only; create one with write access: {page}")
        if owner not in allowed and not self.pr:
            advice = f"use {' or '.join(f'{name}/…' for name in allowed)}, or open a pull request with --pr"
            raise UserError(f"--repo-id {self.repo_id}: {user} has no permission to publish as {owner}; {advice}")
        self.say(f"signed in as {user}")
        return user

    def _validate_card(self) -> None:
        """Have the Hub validate the card, with its list of licenses, before anything is created."""
        from huggingface_hub import ModelCard

        try:
            ModelCard.load(self.folder / "README.md").validate()
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]  # the Hub's message lists all licenses
            raise UserError(f"the Hub refuses the card's metadata: {reason}; {self.progress}") from None

    def _prepare_revision(self, user: str) -> str:
        """Create repository, branch or pull request if they do not exist; return the revision to commit to."""
        api, repo_id = self.api, self.repo_id
        exists = self._retry("look up the repository", api.repo_exists, repo_id)
        if not exists:
            private = self.private or None  # None: the organization's default
            self._retry("create the repository", api.create_repo, repo_id, private=private, exist_ok=True)
            self.progress = f"{repo_id} was created, and is still empty"
            self.say(f"created {api.endpoint}/{repo_id}")
        elif self.private and not self._retry("look up the repository", api.repo_info, repo_id).private:
            raise UserError(f"{repo_id} exists and is public; leave out --private, or change its settings")
        if self.pr and exists and not self._retry("compare the files", self._differences, self.folder, MAIN):
            return MAIN  # merged or published before: nothing to propose
        if self.pr:
            return f"refs/pr/{self._retry('open the pull request', self._pull_request, user)}"
        if self.revision != MAIN:
            self._retry("create the branch", api.create_branch, repo_id, branch=self.revision, exist_ok=True)
        return self.revision

    def _pull_request(self, user: str) -> int:
        """Return the number of this user's open pull request with these weights, or of a new one."""
        for each in self.api.get_repo_discussions(self.repo_id, author=user, discussion_type="pull_request"):
            if each.title == self.title and each.status in ("draft", "open"):
                return each.num
        return self.api.create_pull_request(self.repo_id, title=self.title, description="See README.md.").num

    def _commit(self, revision: str) -> str:
        """Upload in one commit, unless the revision already has exactly these files; return the commit's id."""
        head = self.api.repo_info(self.repo_id, revision=revision).sha
        if not self._differences(self.folder, head):
            self.say(f"nothing to do: commit {head[:12]} has exactly these files")
            return head
        self.progress = f"the upload to {self.repo_id} may be incomplete"
        options = {"repo_id": self.repo_id, "revision": revision, "commit_message": self.title}
        # With parent_commit, a commit whose response was lost cannot be made a second time.
        options |= {"parent_commit": head, "delete_patterns": list(DELETED_IF_ABSENT)}
        commit = self.api.upload_folder(folder_path=self.folder, **options).oid
        self.say(f"published in commit {commit[:12]}")
        return commit

    def _differences(self, folder: Path, revision: str) -> list[str]:
        """Return the names of our files that differ on the Hub, and of files to delete there."""
        found = self.api.verify_repo_checksums(self.repo_id, revision=revision, local_dir=folder)
        patterns = (*self.files, *DELETED_IF_ABSENT)
        missing = [name for name in found.missing_paths if any(fnmatch(name, pattern) for pattern in patterns)]
        return sorted({*missing, *found.extra_paths, *(mismatch["path"] for mismatch in found.mismatches)})

    def _verify(self, commit: str) -> None:
        """Download the commit to an empty cache and compare checksums and logits."""
        images = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
        with tempfile.TemporaryDirectory() as cache:
            options = {"revision": commit, "cache_dir": cache, "allow_patterns": list(self.files)}
            download = Path(self.api.snapshot_download(self.repo_id, **options))
            for folder in (self.folder, download):
                if differing := self._differences(folder, commit):
                    # Retried: the client does not notice a download with changed bytes.
                    raise ConnectionError(f"{', '.join(differing)} differ from the published files")
            with torch.inference_mode():
                expected, actual = load_model(self.run_weights).eval()(images), ResNet.from_pretrained(download)(images)
        if not torch.equal(expected, actual):
            raise UserError(f"{self.run_weights} has changed since it was published; run the same command again")
        self.progress = f"all files are published in commit {commit[:12]} and verified"
        self.say(f"verified: {len(self.files)} files downloaded, with equal checksums and logits")

    def _retry(self, what: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call `call`; retry temporary errors with growing pauses, raise UserError for others."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return call(*args, **options)
            except UserError:
                raise
            except Exception as error:  # the client's errors have no common base class across its versions
                status, wait_seconds = cause_and_wait(error, attempt)
                reason = STATUS_MEANINGS.get(status or 0, first_line(error).replace(self.token, "…"))
                if wait_seconds is None or attempt == MAX_ATTEMPTS:
                    raise UserError(
                        f"could not {what}: {reason}; {self.progress}; run the same command to complete it"
                    ) from None
                self.say(f"could not {what} ({reason}); trying again in {wait_seconds:.0f} s")
                time.sleep(wait_seconds)
        raise AssertionError("the loop returns or raises")


def files_in(folder: Path) -> dict[str, Path]:
    """Return all files below a folder by their relative POSIX paths, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def cause_and_wait(error: BaseException, attempt: int) -> tuple[int | None, float | None]:
    """Return the HTTP status behind an error, and the seconds before the next attempt; None for none."""
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
