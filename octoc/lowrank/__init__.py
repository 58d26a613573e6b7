"""Methods that write a weight as the product of two smaller ones, one a file. The file's name is the method's name."""
