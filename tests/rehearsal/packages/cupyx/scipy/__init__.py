"""Empty, but for `linalg`."""
