"""Reads data sets in common formats: pictures in class folders, COCO JSON, YOLO labels, wav files with a table, lines
of text.

``kinds`` recognizes the format, each reader lists the items
(:class:`kedge.importing.data_folders.listing.Listing`), and ``converting`` runs them through the model's pipeline, item
by item, into ``.npy`` files.
"""
