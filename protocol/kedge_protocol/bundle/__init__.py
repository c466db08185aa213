"""A bundle: one model for one target, as an OCI image manifest; a release: the bundles of one version.

``config`` is a bundle's description of itself, ``oci`` the documents around it; ``layout`` reads and ``write`` writes
an OCI image layout on disk.
"""
