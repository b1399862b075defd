"""Show runs: tables, figures, curves, an HTML page, the terminal. Nothing here loads MLX."""
