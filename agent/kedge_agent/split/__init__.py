"""Language models whose layers are on several devices of one site: the link between them, and both of its ends."""
