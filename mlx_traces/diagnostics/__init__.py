"""Is this machine right, and how fast is it? doctor, the self-test, benches beside the peers."""
