"""Every exception this package raises on purpose.

    KnnDiffusionError            catch this one to catch them all (exit code 1)
    ├── UsageError               the request itself is wrong: an option, a k, an existing output (exit code 2)
    ├── ConfigError              a configuration with an unknown key or an impossible value (exit code 2)
    ├── ImageError               one image that cannot be used: unreadable, truncated, too large
    ├── CheckpointError          a model part that is missing, damaged, or of another shape or version
    ├── FingerprintError         an index, model or query made by another encoder
    ├── StoreError               an image index that is missing, damaged or locked
    ├── HubError                 a repository of the hub that is not there, may not be read or cannot be reached
    ├── TrainingError            a loss that is not finite, data that does not fit the model
    ├── PeerError                another process of the same run stopped, and says why itself
    └── MissingDependencyError   an optional package or a font, with the command that installs it

A message is *expected, got, cure* in one line.
"""


class KnnDiffusionError(Exception):
    """Base of all errors of this package; its text is one line: expected, got, cure."""

    exit_code = 1


class UsageError(KnnDiffusionError):
    """The request cannot be carried out as it was asked."""

    exit_code = 2


class ConfigError(KnnDiffusionError):
    """A configuration holds an unknown key or a value outside its range."""

    exit_code = 2


class ImageError(KnnDiffusionError):
    """One image cannot be used; a job over many images lists it and goes on."""


class CheckpointError(KnnDiffusionError):
    """A model part is missing, damaged, or of another shape or version."""


class FingerprintError(KnnDiffusionError):
    """Two things that must share an encoder were made by different ones."""


class StoreError(KnnDiffusionError):
    """An image index is missing, damaged, read-only or in use by another writer."""


class HubError(KnnDiffusionError):
    """A repository of the Hugging Face hub is not there, may not be read or written, or cannot be reached."""


class TrainingError(KnnDiffusionError):
    """Training cannot go on: a loss that is not finite, or data that does not fit."""


class PeerError(KnnDiffusionError):
    """Another process of the same run stopped; it says why itself, so that the command line need not."""


class MissingDependencyError(KnnDiffusionError):
    """Something optional is not installed; the text holds the command that installs it."""
