"""``python -m mlx_traces``: the command line."""

from mlx_traces.cli import main

main(prog_name="mlx-traces")
