"""What can go wrong on the device; `status` is the exit status that the command line ends in.

BundleError (ValueError)    2  a bundle that cannot be used: not there, not complete, of a newer schema
├── TamperedError           2  a file that differs from the manifest, is missing, was added, or is a link
├── BadImages               2  images of the wrong shape, type or range
├── MissingRuntime          2  the inference runtime or provider that was asked for is not there
├── BadOption                2  an option of a command that cannot be used, such as a port that is taken
└── EngineError             3  TensorRT refused the graph, crashed, or built nothing
"""


class BundleError(ValueError):
    status = 2


class TamperedError(BundleError):
    """Bytes that are not the recorded ones, or a file that should not be there."""


class BadImages(BundleError):
    """Images that the network was not made for."""


class MissingRuntime(BundleError):
    """No inference runtime that can run the model as asked."""


class BadOption(BundleError):
    """An option that cannot be used here."""


class EngineError(BundleError):
    """TensorRT's own parser, builder or runtime said no; the text carries its messages."""

    status = 3
