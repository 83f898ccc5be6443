"""Fuzz tests for all code that reads untrusted files.

A target is a module with two functions:

  build(choices) -> bytes: return a file, valid if `choices` is empty; each
    choice changes one detail, such as a size in a header.
  run(path): read the file with the code under test.

`judge` accepts two outcomes: success, or a one-line UserError.
"""
