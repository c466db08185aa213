"""Imports models of other formats as ONNX graphs that compute the same.

:mod:`kedge.importing.api` is the entry point; :mod:`kedge.importing.worker_tasks` does the work in the worker's child
process, because it runs the user's own code and frameworks that may not live beside others.
"""
