"""The one error of this layer."""


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one sentence for the user, with the remedy."""
