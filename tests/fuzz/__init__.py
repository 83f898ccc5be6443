"""Inputs that mean harm, for everything that reads files from elsewhere.

A target is a module with

  build(choices) -> bytes: a file, good as long as `choices` has nothing to say;
    each choice changes something of it, such as a size in a header.
  run(path): reads the file, by the code under test.

`judge` says what may come of it: success, or a UserError of one line.
"""
