"""The errors that a user can act on."""


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked.

    The message is one line: what is wrong, where, and what to do. Scripts print it and exit with status 2, without a
    traceback. All processes of a run raise such an error together, and the main one prints it.
    """


class ProcessError(UserError):
    """A UserError that one process may raise alone, and so prints itself."""


class BadImageError(ProcessError):
    """A file that no decoder can read as an image."""

    @classmethod
    def about(cls, name: str, reason: str) -> "BadImageError":
        return cls(
            f"{name} cannot be read as an image ({reason}); replace or remove the file, or train without it by "
            "--on-bad-image skip"
        )


class Preempted(Exception):
    """The run was asked to stop, and everything is saved; the message says how to resume."""
