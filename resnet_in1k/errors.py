"""What went wrong, said once and clearly, to the person who can mend it."""


class UserError(Exception):
    """Bad input or a machine that cannot do what was asked.

    The message is one line: what is wrong, where, and what to do. Scripts print it and exit with status 2; a traceback
    would only hide it. All processes of a run meet such an error alike, and the main one speaks.
    """


class ProcessError(UserError):
    """A UserError that one process may meet alone, and so tells itself."""


class BadImageError(ProcessError):
    """A file that no decoder could read as an image."""

    @classmethod
    def about(cls, name: str, reason: str) -> "BadImageError":
        return cls(
            f"{name} cannot be read as an image ({reason}); replace or remove the file, or train without it by "
            "--on-bad-image skip"
        )


def first_line(error: BaseException) -> str:
    """Of what it says; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Preempted(Exception):
    """The run was asked to stop, and everything is saved; the message says how to go on."""
