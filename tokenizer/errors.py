"""Errors caused by user input, which recipes and commands print as one line. Does not import torch."""


class InputError(ValueError):
    """User input that cannot be used; the message says what was found, what was expected and how to fix it."""
