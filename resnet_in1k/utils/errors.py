"""Errors that a user can act on."""


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked.

    The message is one line: what is wrong, where, and a cure. Scripts print it and exit with status 2, without a
    traceback. All processes of a run raise such an error together, and the main process prints it.
    """


class ProcessError(UserError):
    """A UserError that one process may raise alone, and therefore prints itself."""


class BadImageError(ProcessError):
    """A file that no decoder can read as an image."""

    @classmethod
    def about(cls, name: str, reason: str) -> "BadImageError":
        return cls(
            f"{name} cannot be read as an image ({reason}); replace or remove the file, or train without it by "
            "--on-bad-image skip"
        )


class Preempted(Exception):
    """The run was asked to stop and has saved everything; the message explains how to resume."""
