"""Staged rollouts: waves, gates and the evidence that they judge by.

:mod:`.policy` is the document, :mod:`.selectors` and :mod:`.waves` make the plan, :mod:`.machine` decides,
:mod:`.engine` reads facts from the database and writes decisions into it.
"""
