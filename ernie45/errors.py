"""The package's errors: one small family, so that callers can catch what they can act on.

A message says what is wrong, with which value, what was expected and what to do about it. The command line prints it as
one line and exits with `exit_code`; a traceback appears only with `--debug`.
"""


class Ernie45Error(Exception):
    """Base of everything that this package raises on purpose."""

    exit_code = 1


class ConfigError(Ernie45Error):
    """A model or run configuration is inconsistent, incomplete or names something unknown."""


class CheckpointError(Ernie45Error):
    """A weight file or folder is missing pieces, corrupted, inconsistent or not a format that can be read."""


class ShapeError(Ernie45Error):
    """A tensor handed to a public function has the wrong shape, dtype or device."""


class RequestError(Ernie45Error):
    """A request (prompt, messages, sampling parameters) cannot be honoured as it stands."""


class ContextLengthError(RequestError):
    """Prompt and wanted answer together are longer than what is served."""


class CapacityError(Ernie45Error):
    """Memory, disk or context is too small for what was asked."""


class EngineDownError(Ernie45Error):
    """The engine's process is not there to take or finish a request: it loads, restarts or shuts down. Try again."""


class TrainingError(Ernie45Error):
    """A training run cannot go on: loss or gradient is not finite, or the data gives nothing to learn."""


class TransferError(Ernie45Error):
    """A download failed or brought other bytes than promised."""


class UsageError(Ernie45Error):
    """The command line was used in a way that it does not understand."""

    exit_code = 2


class NotFoundError(Ernie45Error):
    """A model, file or name does not exist."""

    exit_code = 4
