"""What a user is told when something is refused."""

import pytest

from retrieval_core.errors import RetrievalError


def sentence(call, *arguments, **named):
    """The message of the refusal, after checking that it is one sentence."""
    with pytest.raises(RetrievalError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    return message
