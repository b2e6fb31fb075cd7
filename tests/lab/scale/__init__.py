"""Many nodes and many jobs: what they cost the controller, and whether anything grows with their number."""
