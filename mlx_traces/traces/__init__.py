"""Trace files: made, imported, generated, scored, filtered, reformatted, encoded as tokens."""
