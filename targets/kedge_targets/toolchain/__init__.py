"""Toolchains: vendor stacks that conflict with others, each in an isolated environment.

A backend declares one in ``backends/<name>/toolchain/``: ``toolchain.toml`` (description, the Python versions of the
lock, disk space), ``requirements.txt`` (locked, with hashes) and ``driver.py`` (speaks the worker's protocol with only
the standard library and the vendor stack; never imports Kedge). The environments lie in the user's data folder as
``toolchains/<name>-<key>``; the key depends on the lock and the Python version, so another lock is another environment.
"""

from kedge_targets.toolchain.declaration import Declaration, names
from kedge_targets.toolchain.installation import install
from kedge_targets.toolchain.store import Toolchain, ToolchainState, find, list_toolchains, remove

__all__ = ["Declaration", "Toolchain", "ToolchainState", "find", "install", "list_toolchains", "names", "remove"]
