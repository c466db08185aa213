"""Data as people have it: pictures in class folders, COCO JSON, YOLO's labels, wav files with a table, lines of text.

``kinds`` tells what lies there, each reader lists it (:class:`kedge.importing.data_folders.listing.Listing`), and
``converting`` runs the list through the model's pipeline, item by item, into ``.npy`` files.
"""
