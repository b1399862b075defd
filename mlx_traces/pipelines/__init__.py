"""Several steps as one command: compare, study, rounds, and what they will take and whether their figures are true."""
