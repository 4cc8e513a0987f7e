"""The object stores that hold recovery points, behind one protocol."""
