"""The checks, by what they look at; each module registers its own (doctor/finding.py)."""
