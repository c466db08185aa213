"""The blobs of published releases, with their block maps."""
