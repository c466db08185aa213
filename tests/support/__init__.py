"""What several tests share: builders of real bundles and releases."""
