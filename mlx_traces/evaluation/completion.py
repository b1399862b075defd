"""A completion as it is graded, whoever made it: our engine or a server."""

from dataclasses import dataclass

from mlx_traces.records import Rollout
from mlx_traces.tasks import thoughts


@dataclass(frozen=True)
class Completion:
    """A rollout as the grader sees it: what the model was shown, and what its turn held before it began.

    ``own_tags`` are those that the model thinks between, if they are not among ``thoughts.TAGS``.
    """

    prompt: str
    opened: str
    rollout: Rollout
    own_tags: thoughts.Pair | None = None

    @property
    def whole(self) -> str:
        """The assistant's whole turn, its thought between tags that graders know."""
        return thoughts.usual(self.opened + self.text, self.own_tags)

    @property
    def text(self) -> str:
        """What the model said, without the stop token."""
        return self.rollout.text

    @property
    def tokens(self) -> int:
        """How many tokens that took, the stop token included."""
        return len(self.rollout.completion_ids)

    @property
    def finish_reason(self) -> str:
        """Why it ended."""
        return self.rollout.finish_reason

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, None for none."""
        return self.rollout.stop_string


@dataclass(frozen=True)
class Answered:
    """What a server answered: the prompt and the text of it.

    ``tokens`` is None where it does not count them, ``stop_string`` where none ended it or the server does not say.
    """

    prompt: str
    opened: str
    text: str
    tokens: int | None
    finish_reason: str
    stop_string: str | None = None

    @property
    def whole(self) -> str:
        """The assistant's whole turn."""
        return self.opened + self.text
