"""The update logic without I/O: events in, actions out, and the time given with each event.

The same code runs on a device (where :mod:`kedge_agent.effects` performs the actions), in a test and in a simulation.
Nothing here opens a file, reads a clock, starts a thread or uses MQTT.
"""
