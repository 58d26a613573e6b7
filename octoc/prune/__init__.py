"""Methods that remove weights, one a file. The file's name is the method's name."""
