"""Whether the model and data hub answers. Asked before its client is, which would retry for half a minute. No MLX."""

import threading
from functools import cache

TIMEOUT = 3  # seconds


def switched_off() -> bool:
    """Whether the user has told the hub's client not to use the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@cache
def fault() -> str:
    """Return why the hub does not answer, an empty string if it does; asked once per process."""
    from huggingface_hub import constants

    answers: list[str] = []
    # In a thread, as looking a name up can take longer than any timeout given to the request.
    worker = threading.Thread(target=lambda: answers.append(_ask(constants.ENDPOINT)), daemon=True)
    worker.start()
    worker.join(TIMEOUT)
    return answers[0] if answers else f"no answer in {TIMEOUT} seconds"


def _ask(address: str) -> str:
    """Return what is wrong with a web address, an empty string if it answers."""
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            return ""
    except urllib.error.HTTPError as error:
        return f"status {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
