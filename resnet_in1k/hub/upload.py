"""Upload a hub folder in one commit, download it again and compare; after any failure a second run completes it."""

import filecmp
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_in1k.model.weights import WEIGHTS_NAME
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

MAIN = "main"
DELETED_IF_ABSENT = ["recipe.json", "curves.png", "model.onnx", "model.pt2", ".eval_results/*"]
"""Files of an earlier publication that are deleted on the Hub if this one does not have them."""
MAX_ATTEMPTS = 5
MAX_WAIT_SECONDS = 300  # the Hub counts requests in windows of five minutes
# 412: parent_commit is outdated, usually because the first attempt succeeded and its response was lost.
TRANSIENT_STATUS = {408, 409, 412, 425, 429, 500, 502, 503, 504}


class Upload:
    """Upload of one hub folder; `pr` opens a pull request instead of a commit to `revision`."""

    def __init__(self, folder: Path, repo_id: str, *, private: bool = False, revision: str = MAIN, pr: bool = False):
        from huggingface_hub import HfApi, get_token

        self.token = get_token() or ""
        if not self.token:
            raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")
        self.api, self.folder, self.repo_id = HfApi(token=self.token), folder, repo_id
        self.private, self.revision, self.pr = private, revision, pr
        self.title = f"Publish {repo_id.split('/')[1]}, {files.sha256_of(folder / WEIGHTS_NAME)[:12]}"
        self.progress = "nothing was published"

    def run(self) -> None:
        """Upload and verify; each step can be repeated without harm.

        Raises:
            UserError: if the Hub refuses, cannot be reached after several attempts, or serves different files.
            KeyboardInterrupt: after printing what has been published.
        """
        from huggingface_hub import ModelCard

        try:
            user = self._retry("sign in", self.api.whoami)["name"]
            print(f"signed in as {user}")
            # By the Hub, which knows the licenses, and before anything is created.
            self._retry("validate the card", ModelCard.load(self.folder / "README.md").validate)
            self._retry("prepare the repository", self._prepare)
            commit = self._retry("upload", self._commit, user)
            self._retry("verify the published files", self._verify, commit)
        except KeyboardInterrupt:
            print(f"interrupted: {self.progress}; run the same command to complete it")
            raise
        revision_argument = f', revision="{self.revision}"' if self.revision != MAIN else ""
        print(f'load it:  ResNet.from_pretrained("{self.repo_id}"{revision_argument})')

    def _prepare(self) -> None:
        """Create repository and branch if they do not exist."""
        api, repo_id = self.api, self.repo_id
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=self.private or None, exist_ok=True)  # None: the organization's default
            print(f"created {api.endpoint}/{repo_id}")
        elif self.private and not api.repo_info(repo_id).private:
            raise UserError(f"{repo_id} exists and is public; leave out --private, or change its settings")
        if self.revision != MAIN:
            api.create_branch(repo_id, branch=self.revision, exist_ok=True)

    def _commit(self, user: str) -> str:
        """Upload in one commit, unless the revision has exactly these files; return the commit's id."""
        api, repo_id = self.api, self.repo_id
        if self.pr:  # continue an earlier pull request with these weights that is still open
            found = api.get_repo_discussions(repo_id, author=user, discussion_type="pull_request")
            opened = [each for each in found if each.title == self.title and each.status in ("draft", "open")]
            self.revision = opened[0].git_reference if opened else MAIN
        head = api.repo_info(repo_id, revision=self.revision).sha
        self.progress = f"the upload to {repo_id} may be incomplete"
        commit = api.upload_folder(
            folder_path=self.folder,
            repo_id=repo_id,
            revision=self.revision,
            create_pr=self.pr and self.revision == MAIN,
            commit_message=self.title,
            parent_commit=head,  # so that a commit whose response was lost is not made a second time
            delete_patterns=DELETED_IF_ABSENT,
        )
        self.progress = f"all files are published in commit {commit.oid[:12]}, but not verified"
        self.revision = commit.pr_revision or self.revision
        nothing_changed = f"nothing to do: commit {head[:12]} has exactly these files"
        print(nothing_changed if commit.oid == head else f"published in commit {commit.oid[:12]}")
        if self.revision.startswith("refs/pr/"):
            print(f"pull request: {api.endpoint}/{repo_id}/discussions/{self.revision.rpartition('/')[2]}")
        return commit.oid

    def _verify(self, commit: str) -> None:
        """Download the commit to an empty cache and compare the files."""
        names = [path.name for path in self.folder.iterdir()]
        with tempfile.TemporaryDirectory() as cache:
            download = self.api.snapshot_download(self.repo_id, revision=commit, cache_dir=cache, allow_patterns=names)
            _, different, missing = filecmp.cmpfiles(self.folder, download, names, shallow=False)
        if different or missing:  # retried, because the client does not notice a download with changed bytes
            raise ConnectionError(f"{', '.join(different + missing)} differ from the published files")
        print(f"verified: {len(names)} files downloaded, with equal bytes")

    def _retry(self, what: str, step: Callable[..., Any], *args: Any) -> Any:
        """Call `step`; retry temporary errors with growing pauses, raise UserError for others."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return step(*args)
            except UserError:
                raise
            except Exception as error:  # the client's errors have no common base class across its versions
                reason = " ".join(str(error).split()).replace(self.token, "…")[:300] or type(error).__name__
                wait_seconds = seconds_before_retry(error, attempt)
                if wait_seconds is None or attempt == MAX_ATTEMPTS:
                    advice = "run the same command to complete it"
                    raise UserError(f"could not {what}: {reason}; {self.progress}; {advice}") from None
                print(f"could not {what} ({reason}); trying again in {wait_seconds} s")
                time.sleep(wait_seconds)


def seconds_before_retry(error: BaseException | None, attempt: int) -> int | None:
    """Return how long to wait before the next attempt; None if the Hub's answer would stay the same."""
    from huggingface_hub.utils import parse_ratelimit_headers

    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__ or error.__context__
    seconds = 2 ** (attempt - 1)
    if error is None:  # there was no answer
        return seconds
    status, headers = error.response.status_code, error.response.headers
    if status not in TRANSIENT_STATUS:
        return None
    if headers.get("Retry-After", "").isdigit():
        seconds = int(headers["Retry-After"])
    elif status == 429 and (limit := parse_ratelimit_headers(headers)):
        seconds = limit.reset_in_seconds
    return min(seconds, MAX_WAIT_SECONDS)
