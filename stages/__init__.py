"""One command a file, named by its verb: read the parameters, call the library, write the outs."""
