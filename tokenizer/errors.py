"""What goes wrong because of what a user gave, free of torch: recipes and commands print it as one line."""


class InputError(ValueError):
    """Something given cannot be used; the message says what was found, what was expected and how to mend it."""
