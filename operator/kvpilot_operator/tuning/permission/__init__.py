"""What tuning may do now: modes and approvals, windows, pins, budgets, limits of the fleet."""
