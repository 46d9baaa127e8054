"""The one error class for what a user can cause."""


class RetrievalError(ValueError):
    """A mistake the user can mend, told in one sentence: what was wrong and what to do."""
