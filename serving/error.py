"""What this package refuses, each with one line that says what was found and what is allowed."""


class AdapterRefused(ValueError):
    """A folder holds no adapter that this engine computes exactly on its base."""


class UnknownAdapter(LookupError):
    """A request names an adapter that is not loaded; it is never answered by the base instead."""


class BaseRefused(ValueError):
    """The model is of no family whose forward pass this engine has."""


class RequestRefused(ValueError):
    """A request can never be answered: it is empty, or longer than the engine's capacity."""
