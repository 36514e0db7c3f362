"""The images of a request: read, decoded in turn, and made what the graph takes."""
