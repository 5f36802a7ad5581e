"""Content-addressed artifacts and run folders over fsspec and pyarrow."""
