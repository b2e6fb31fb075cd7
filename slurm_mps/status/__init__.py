"""Looks at MPS on this node now. Prints nothing, takes no lock, changes nothing."""
