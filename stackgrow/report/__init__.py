"""What people read: plans, summaries, curves."""
