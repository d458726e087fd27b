"""The exceptions jaxmoe raises on purpose.

Every message says what was given, what was wanted and what to change. Anything else that escapes is
a bug.
"""


class JaxMoeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(JaxMoeError):
    """An engine option or a model configuration is unusable or unsupported."""


class CheckpointError(JaxMoeError):
    """A checkpoint directory is incomplete, damaged or not of the model its config names."""


class RequestError(JaxMoeError):
    """A request is malformed or cannot be served as given; no other request is affected."""


class CapacityError(JaxMoeError):
    """The machine or the engine has no room for this now."""


class EngineDeadError(JaxMoeError):
    """The engine stopped; the message names the cause."""
