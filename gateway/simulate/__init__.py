"""Lines that fail on command, and what becomes of the promises there."""
