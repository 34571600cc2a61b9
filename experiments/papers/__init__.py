"""One paper, one file: `dynamoe reproduce` with its name runs it. Each defines paper() -> Paper."""
