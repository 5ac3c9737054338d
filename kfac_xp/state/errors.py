"""What is raised where a saved state cannot be used."""


class StateError(ValueError):
    """A saved state that is damaged, or does not fit what it is loaded into.

    The message names the file or the key. Nothing has been changed.
    """
