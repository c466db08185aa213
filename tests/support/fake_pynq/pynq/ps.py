"""The processing system's clocks."""


class Clocks:
    fclk0_mhz = 100.0
