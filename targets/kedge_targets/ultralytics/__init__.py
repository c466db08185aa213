"""Checkpoints of Ultralytics' YOLO, read by Ultralytics' own code in a toolchain: it is AGPL, and no part of Kedge."""
