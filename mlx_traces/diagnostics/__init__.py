"""Does this machine compute correctly, and how fast? The doctor, the self-test, benches against other tools."""
