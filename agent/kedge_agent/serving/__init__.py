"""Inference over HTTP: the serving process, and the agent's side that starts and watches it.

The agent's side (:mod:`supervisor`, :mod:`bundle_watch`, :mod:`status_pipe`) does not load numpy; the rest runs only in
the serving process.
"""
