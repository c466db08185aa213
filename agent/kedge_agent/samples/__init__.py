"""Samples that this device sends home when a signed desired state asks for them and its configuration allows it:
``single`` takes samples out of calls, ``reservoir`` keeps the chosen ones on disk, ``collection`` is one request from
its arrival to its last chunk, ``runner`` the device's requests."""
