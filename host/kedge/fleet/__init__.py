"""The fleet: the desired and the reported state of every device, and the transfer of models between them.

``service`` is the room of all verbs; the command line calls it, the controller reconciles from it.
"""
