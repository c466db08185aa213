"""Toolchains: vendor stacks that do not live well beside others, each in an isolated environment.

A backend declares one in ``backends/<name>/toolchain/``: ``toolchain.toml`` (description, the Python versions that
the lock is made for, disk space), ``requirements.txt`` (locked, with hashes) and ``driver.py`` (speaks the worker's
lines with the standard library and the vendor stack; never imports Kedge). The environments lie in the user's data
folder as ``toolchains/<name>-<key>``, where the key is of the lock and the Python version: another lock is another
environment.
"""

from kedge_targets.toolchain.declaration import Declaration, names
from kedge_targets.toolchain.installation import install
from kedge_targets.toolchain.store import Toolchain, ToolchainState, find, list_toolchains, remove

__all__ = ["Declaration", "Toolchain", "ToolchainState", "find", "install", "list_toolchains", "names", "remove"]
