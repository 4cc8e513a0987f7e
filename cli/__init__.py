"""The godwit command line: parse, call one function, render."""
