"""Simulated fleets: devices that run the real update machine, with stand-ins for disk and runtime alone.

:func:`simulate` runs a scenario in virtual time against the real controller; see docs/simulate.md.
"""
