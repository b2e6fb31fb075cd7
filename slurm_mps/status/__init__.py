"""What MPS does on this node, and in the cluster, right now. Prints nothing, takes no lock, changes nothing."""
