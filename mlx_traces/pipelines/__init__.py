"""Several steps as one command: compare, study and rounds; estimate their cost; verify their figures."""
