"""Several processes that train one model: how they meet, agree, and end together."""

from .job import Job
from .meeting import Meeting

__all__ = ["Job", "Meeting"]
