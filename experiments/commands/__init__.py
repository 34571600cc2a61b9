"""The commands of `dynamoe`, one file each: a dataclass whose fields are the options, and `run`."""
