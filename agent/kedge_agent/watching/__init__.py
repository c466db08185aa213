"""``kedge-agent watch``: a pipeline over the frames of a folder, a video or a camera."""
