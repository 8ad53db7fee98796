"""User errors: what was wrong, the numbers, what to change. Each carries the exit status of the command."""


class MswiftError(Exception):
    """Base of every error that a user can mend; the CLI prints its text in place of a traceback."""

    exit_status = 1


class ConfigError(MswiftError):
    """The command was wrong: a flag, a recipe, a path or a model that is not supported."""

    exit_status = 2


class LayoutError(ConfigError):
    """The parallel layout does not fit the model, the batch or the number of processes."""


class CheckpointError(MswiftError):
    """A checkpoint is damaged, incomplete, or is not what the table of its family says."""


class DataError(MswiftError):
    """A data set cannot be read, or holds nothing to train on."""
