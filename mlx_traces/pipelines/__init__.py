"""Several steps as one command: compare, study and rounds; estimate what these take; verify their results."""
