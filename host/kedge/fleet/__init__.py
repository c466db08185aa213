"""The fleet: what every device shall run, what it says it runs, and the way between.

``service`` is the room of all verbs; the command line calls it, the controller reconciles from it.
"""
