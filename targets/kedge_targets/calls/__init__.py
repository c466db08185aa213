"""How the calls of a bundle are run on this device: chosen by measurement when it is proved, kept, and followed."""
