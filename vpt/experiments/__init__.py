"""Many runs as one experiment: the published search, few shots, combinations, transfer, cost, and reports."""
