"""Proves bundles for ARM on an emulated processor: the device's own runtimes, its golden vectors, its code."""
