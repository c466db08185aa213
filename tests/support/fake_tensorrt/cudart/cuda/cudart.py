"""See the package."""

from fake_cuda import *  # noqa: F403
