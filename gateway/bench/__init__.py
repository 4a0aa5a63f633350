"""`lineside bench`: what this machine does with Lineside and, beside it, with whatever of the peers is installed."""
